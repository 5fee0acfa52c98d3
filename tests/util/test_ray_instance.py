import socket
import threading

import psutil
import pytest

from sere_ray.util.errors import SereError
from sere_ray.util.ports import free_port
from sere_ray.util.ray_instance import start_ray


@pytest.mark.engine
def test_once_more_when_a_process_of_ray_has_ended():
    """Its metrics agent does, on a port that is taken; the second start finds it free."""
    import ray

    port = free_port()
    before = psutil.Process().children()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        timer = threading.Timer(15, taken.close)  # Ray waits for 30 s
        timer.start()
        try:
            start_ray(metrics_port=port, num_cpus=1)
        finally:
            timer.cancel()
    try:
        started = [p for p in psutil.Process().children() if p not in before]
        servers = [p for p in started if p.name().startswith("gcs_server")]
        assert len(servers) == 1, "what the first start left has not ended"
        assert ray.get(ray.remote(lambda: 4).remote()) == 4
    finally:
        ray.shutdown()


def test_twice_in_vain(monkeypatch, has_words):
    import ray

    def init(**options):
        starts.append(options["_metrics_export_port"])
        raise Exception("The current node timed out during startup. This could happen because ...")

    starts = []
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SereError) as error:
        start_ray(metrics_port=8080)
    has_words(str(error.value), "did not start, 2 times", "port 8080", "dashboard_agent.log")
    assert starts == [8080, 8080]


def test_other_errors_are_rays_own(monkeypatch):
    import ray

    def init(**options):
        raise ValueError("num_cpus")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="num_cpus"):
        start_ray()
