"""What the host knows of the counted steps."""

from dataclasses import dataclass


@dataclass
class StepTotals:
    """Steps of one kind, decode-only or mixed."""

    steps: int = 0
    steps_counted: int = 0
    """Of these, steps under the modes ``on`` and ``observe``: only they count experts and slots."""
    rows: int = 0
    """Rows of this rank, of prompts and of exact requests, too."""
    decode_rows: int = 0
    """Rows that may be re-routed."""
    draft_rows: int = 0
    """Of these, rows that verify a draft of speculative decoding."""
    forward_seconds: float | None = None
    """Wall time of the forward passes; None where they run asynchronously (GPU)."""
