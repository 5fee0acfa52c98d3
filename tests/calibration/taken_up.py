"""A training run of a recipe that is killed and started again, beside one that is not."""

import torch


def check_taken_up(start):
    """Both have the same weights in the end.

    Args:
        start: begins a run of four steps in the folder of a name.

    Returns:
        The run that was never killed, and the one that went on from a checkpoint.
    """
    whole = start("whole")
    for _ in range(4):
        whole.one_step()
    first = start("parts")
    for _ in range(2):
        first.one_step()
    first.leave()
    first.one_step()  # lost with the process
    second = start("parts")
    assert second.take_up()
    for _ in range(2):
        second.one_step()
    assert second.progress() == 1
    weights = second.model.state_dict()
    assert all(
        torch.equal(weights[name], value) for name, value in whole.model.state_dict().items()
    )
    return whole, second
