"""The similarity artifact: saved, loaded, checked, shown."""
