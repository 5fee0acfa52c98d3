"""The demo: a small trained model, its held-out data, and one command that compares policies."""
