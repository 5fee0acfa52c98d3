import pytest


@pytest.fixture(scope="session")
def cache(common):
    """Folder of kernels compiled for the CPU."""
    return common / "kernels"
