"""The policy: its keys, bound to a model, by rows of a step, and where it can run."""
