"""The vLLM plugin: everything that patches vLLM. ``patches.py`` is where to start reading."""
