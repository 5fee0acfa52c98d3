"""A small real HTTP server that stores what is pushed and answers as Grafana 11 does.

Only what `sere-ray dashboards` uses. Written after Grafana's HTTP API documentation; no Grafana
server was available to compare it with.
"""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

TOKEN = "glsa_right"


class Store:
    """What the server holds, and what was written to it."""

    def __init__(self):
        self.folders, self.sources, self.dashboards, self.groups = {}, {}, {}, {}
        self.annotations = []
        self.writes = []
        self.role = "Admin"
        self.saved_by_others = 0

    def answer(self, method, path, query, body):
        """``(status, JSON)``."""
        if method != "GET":
            if self.role != "Admin":
                return 403, {"message": "You'll need additional permissions", "accessErrorId": "x"}
            self.writes.append((method, path))
        for pattern, handler in (
            (r"/api/folders(?:/(\S+))?", self._folder),
            (r"/api/datasources(?:/uid/(\S+))?", self._source),
            (r"/api/dashboards/(?:uid/(\S+)|db)", self._dashboard),
            (r"/api/v1/provisioning/folder/\S+/rule-groups/(\S+)", self._group),
            (r"/api/annotations()", self._annotation),
        ):
            if match := re.fullmatch(pattern, path):
                return handler(method, match[1], query, body)
        return 404, {"message": "Not found"}

    def _folder(self, method, uid, query, body):
        if method == "POST":
            if body["uid"] in self.folders:
                return 412, {"message": "a folder with the same name already exists"}
            self.folders[body["uid"]] = {**body, "id": 1, "version": 1}
            return 200, self.folders[body["uid"]]
        return _found(self.folders, uid, "folder not found")

    def _source(self, method, uid, query, body):
        if method in ("POST", "PUT"):
            uid = body["uid"]
            if method == "POST" and uid in self.sources:
                return 409, {"message": "data source with the same name already exists"}
            self.sources[uid] = {"orgId": 1, "isDefault": False, **body}
            return 200, {"datasource": self.sources[uid], "message": "Datasource added"}
        return _found(self.sources, uid, "Data source not found")

    def _dashboard(self, method, uid, query, body):
        if method == "GET":
            if self.saved_by_others and uid in self.dashboards:  # after this reading
                held = json.loads(json.dumps(self.dashboards[uid]))
                self.dashboards[uid]["dashboard"]["version"] += 1
                self.saved_by_others -= 1
                return 200, held
            return _found(self.dashboards, uid, "Dashboard not found")
        new = body["dashboard"]
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        held = self.dashboards.get(new["uid"])
        version = held["dashboard"]["version"] if held else 0
        if held and new.get("version") != version and not body["overwrite"]:
            return 412, {"status": "version-mismatch", "message": "changed by someone else"}
        saved = {**new, "id": 7, "version": version + 1}
        self.dashboards[new["uid"]] = {
            "dashboard": saved,
            "meta": {"folderUid": body["folderUid"]},
        }
        return 200, {"status": "success", "uid": new["uid"], "version": version + 1}

    def _group(self, method, name, query, body):
        if method == "PUT":
            rules = [{"id": i, "provenance": "", **rule} for i, rule in enumerate(body["rules"])]
            self.groups[name] = {**body, "rules": rules}
        return _found(self.groups, name, "rule group not found")

    def _annotation(self, method, _, query, body):
        if method == "POST":
            self.annotations.append({**body, "id": len(self.annotations) + 1})
            return 200, {"message": "Annotation added", "id": len(self.annotations)}
        wanted = set(query.get("tags", []))
        found = [a for a in self.annotations if wanted <= set(a["tags"])]
        return 200, found[: int(query.get("limit", ["100"])[0])]


def _found(held, uid, message):
    return (200, held[uid]) if uid in held else (404, {"message": message})


@contextmanager
def grafana():
    """``(url, store)`` of a running stub."""
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self):
            url = urlparse(self.path)
            body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                status, answer = 401, {"message": "Invalid API key"}
            else:
                status, answer = store.answer(self.command, url.path, parse_qs(url.query), body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
