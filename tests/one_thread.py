"""Sums of several threads differ from run to run: tests that compare bits have one."""

from torch import set_num_threads  # as it is before any engine runs: vLLM replaces it


def one_thread() -> None:
    """Compute in one thread from now on, whatever an engine did before in this process."""
    set_num_threads(1)
