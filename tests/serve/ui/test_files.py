"""The page's files: what is served, with which headers, and nothing else."""

import pytest
from fastapi.testclient import TestClient

from sere_ray.serve.gateway.ui import FILES, FOLDER, PAGE, PATHS
from tests.serve.deployment import ADMIN


@pytest.fixture
def client(site):
    return TestClient(site.app, base_url="http://127.0.0.1", follow_redirects=False)


def test_every_file_is_served_to_anybody_with_headers_that_keep_it_to_itself(client):
    for path in PATHS - {"/sere/ui/"}:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/sere/ui/").headers["location"] == "../ui"


def test_the_folder_holds_what_is_served_and_a_licence():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {*FILES, PAGE, "uPlot.LICENSE.txt"}
    assert sum((FOLDER / name).stat().st_size for name in names) < 200_000


def test_nothing_else_is_open(client):
    for path in (
        "/sere/ui/__init__.py",
        "/sere/ui/other.js",
        "/sere/ui/app.js/",
        "/sere/ui/../policy",
        "/sere/ui/%2e%2e/policy",
        "/sere/ui/..%2fpolicy",
        "/sere/ui//app.js",
        "/sere/UI",
        "/sere/policy",
        "/sere/openapi.json",
    ):
        assert client.get(path).status_code == 401, path
    assert client.request("PUT", "/sere/ui", json={}).status_code == 401


def test_a_path_that_is_no_file_of_the_page_is_not_found(client):
    token = {"authorization": f"Bearer {ADMIN}"}
    for name in ("__init__.py", "other.js", "%2e%2e/ui/__init__.py", "..%2f__init__.py"):
        assert client.get(f"/sere/ui/{name}", headers=token).status_code == 404
