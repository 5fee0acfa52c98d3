"""Workers of a training as threads of this process, over real gloo."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed import HashStore, ProcessGroupGloo

from sere_ray.masks.exchange import Exchange


def together(workers, work):
    """What ``work(exchange)`` returns in each of so many threads, by rank; raises what one did."""
    store = HashStore()

    def worker(rank):
        return work(Exchange(ProcessGroupGloo(store, rank, workers, timedelta(seconds=60))))

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(worker, range(workers)))
