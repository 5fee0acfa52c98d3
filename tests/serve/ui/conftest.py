"""The page in a browser, over the real control API, access layer and router, without engines."""

import threading
from types import SimpleNamespace

import pytest
import uvicorn
from ray import serve

from sere_ray.serve.gateway import control_api
from tests.browser import chromium, watched
from tests.serve.deployment import ADMIN, wait_for
from tests.serve.ui.actions import UNAUTHORIZED, connect, poll
from tests.serve.ui.site import Site


@pytest.fixture
def make_site(tmp_path, monkeypatch):
    running = []

    def make(has_keys=True, auto=None):
        site = Site(tmp_path, has_keys, auto)
        monkeypatch.setattr(control_api, "find_router", site.find_router)
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
        server = uvicorn.Server(
            uvicorn.Config(
                site.app, port=site.port, log_level="warning", timeout_graceful_shutdown=1
            )
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_for(lambda: server.started, 10, "the server")
        return site

    yield make
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture(scope="package")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, site):
    """Connected, after the first interval."""
    with watched(browser, site.url) as page:
        page.expected_errors.append(UNAUTHORIZED)  # the first question, without a token
        page.clock.install()
        connect(page, ADMIN)
        page.locator("#tiles").wait_for()
        poll(page)
        yield page
