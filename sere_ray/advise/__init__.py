"""From a checkpoint and a text to a decision: `sere-ray advise`."""
