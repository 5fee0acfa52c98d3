"""Every ``sere-ray bench`` command."""
