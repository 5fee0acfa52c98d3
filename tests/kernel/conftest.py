import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Folder of kernels compiled for the CPU."""
    return tmp_path_factory.mktemp("kernels")
