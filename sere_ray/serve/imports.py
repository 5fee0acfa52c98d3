"""What `sere-ray serve` imports while Ray starts: vLLM, and what is built on it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module

HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "sere_ray.serve.gateway.application",
    "sere_ray.serve.replica.server",
)
"""One after the other. Each takes seconds; between two of them a start that has failed ends."""


@contextmanager
def imported_beside() -> Iterator[None]:
    """Import ``HEAVY`` in another thread while the block runs; after it all of it is there.

    The block starts Ray, since Ray's processes die with the thread that started them. It must not
    import anything of ``HEAVY`` itself: imports that wait for each other give half a module. The
    thread has ended before the block's caller goes on, also where the block fails: who ends Ray
    does it alone.

    Raises:
        Exception: whatever an import raises.
    """
    failed = threading.Event()

    def import_all() -> None:
        for name in HEAVY:
            if failed.is_set():
                return
            import_module(name)

    with ThreadPoolExecutor(1) as pool:
        imported = pool.submit(import_all)
        try:
            yield
            imported.result()
        except BaseException:
            failed.set()
            raise
