"""The ``sere-ray`` command, a module for each group of commands."""
