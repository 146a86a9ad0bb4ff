"""A stand-in for the Hugging Face Hub in this process: repositories are made, and what is committed is kept."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """What was asked for: repositories by id, with their files, and the tokens that came along."""

    def __init__(self, refuse=None):
        self.repositories, self.files, self.tokens, self.refuse, self.address = {}, {}, set(), refuse, ""

    def answer(self, method, path, body):
        """Status and JSON."""
        if self.refuse is not None:
            return self.refuse
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            private = wanted.get("private") or wanted.get("visibility") == "private"  # by version
            self.repositories.setdefault(name, []).append(private)
            return 200, {"url": f"{self.address}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            kinds = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return 200, {"files": kinds}
        if "/commit/main" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/me/kept/commit/0", "commitOid": "0" * 40}
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision")[0]
            return 200, {"id": name, "modelId": name, "siblings": [], "tags": [], "sha": "0" * 40}
        return 404, {"error": "not found"}


@contextmanager
def stand_in(hub):
    """Serve it; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            status, content = hub.answer(self.command, self.path.partition("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = serve  # noqa: N815 (http.server's names)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
