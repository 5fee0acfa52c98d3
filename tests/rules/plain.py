"""What the oracles share."""


def ranked(ids, weights):
    """Slots of a row from the heaviest; equal weights by slot order."""
    return sorted(range(len(ids)), key=lambda slot: (-weights[slot], slot))
