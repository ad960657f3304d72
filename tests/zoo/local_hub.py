"""A model hub on this machine: as much of the Hugging Face Hub's protocol as its client needs for one repository."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """Answer the client; ``files`` is what has been committed, by path."""

    files: dict[str, bytes]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.answer({"url": f"{address}/{json.loads(sent)['organization']}/{json.loads(sent)['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(sent)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{address}/me/agent/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in self.files:
                self.answer({}, 404, **{"X-Error-Code": "EntryNotFound"})
                return
            self.answer(self.files[name], ETag='"' + str(hash(self.files[name])) + '"')
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": name, "size": len(data), "oid": "1"} for name, data in self.files.items()])
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "me/agent", "sha": COMMIT, "private": False, "siblings": siblings})
        else:
            self.answer({"error": path}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()


@contextmanager
def local_hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """
    Serve a hub with one empty repository.

    :return: its address, and the files that have been committed, by path
    """
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Handler,), {"files": files}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
