"""What the workers of a training tell each other; a lone worker tells nobody."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work


@dataclass
class Sum:
    """A sum over workers that is under way."""

    tensor: Tensor
    """Of this worker; the sum, once it has come."""
    work: Work | None

    def wait(self) -> Tensor:
        """The sum."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Exchange:
    """Sums and lists over workers, on the CPU: masks are small, so gloo carries them everywhere.

    Args:
        group: of gloo; None for a lone worker.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self.sent = 0
        """Bytes that this worker had to send, from the sizes of messages: a ring's 2 (N - 1) / N of
        what is summed, N - 1 times what is listed."""

    def start_sum(self, tensor: Tensor) -> Sum:
        """Begin to add up a contiguous CPU tensor, which becomes the sum."""
        if self.group is None:
            return Sum(tensor, None)
        self.sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        return Sum(tensor, self.group.allreduce([tensor]))

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, which has become the sum of all workers', the same bits for each of them."""
        return self.start_sum(tensor).wait()

    def gather(self, tensor: Tensor) -> Tensor:
        """``[workers, ...]``: everybody's tensor, by rank."""
        if self.group is None:
            return tensor[None]
        self.sent += (self.size - 1) * tensor.nbytes
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self.group.allgather([found], [tensor]).wait()
        return torch.stack(found)
