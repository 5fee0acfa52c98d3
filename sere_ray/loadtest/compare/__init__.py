"""``sere-ray compare``: tasks asked of a running deployment under several policies, paired."""
