"""Model hubs on loopback: one serves a folder as one repository, one takes uploads."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Quiet(BaseHTTPRequestHandler):
    """Answers in JSON and logs nothing."""

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def receiving(*, status: int = 200) -> Iterator[tuple[str, dict[str, bytes], list[dict]]]:
    """Take uploads; the address, the files that were uploaded, and the repositories made.

    Args:
        status: Of the answers about the repository; 403 for one without access.
    """
    uploaded: dict[str, bytes] = {}
    made: list[dict] = []

    class Handler(_Quiet):
        def do_GET(self) -> None:
            self.answer({"id": "user/run", "sha": COMMIT, "siblings": []}, status)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.startswith("/api/repos/create"):
                made.append(json.loads(body))
                self.answer({"url": f"{address}/user/run", "error": "no"}, status)
            elif "/preupload/" in self.path:
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for file in json.loads(body)["files"]]  # fmt: skip
                self.answer({"files": files})
            elif "/commit/" in self.path:
                for item in map(json.loads, body.splitlines()):
                    if item["key"] == "file":
                        content = base64.b64decode(item["value"]["content"])
                        uploaded[item["value"]["path"]] = content
                self.answer({"commitUrl": f"{address}/user/run/commit/{COMMIT}",
                             "commitOid": COMMIT, "success": True})  # fmt: skip
            else:  # /api/validate-yaml
                self.answer({"errors": [], "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, uploaded, made
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; the address, and the files that were downloaded."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if "/resolve/" in path:
                name = path.split("/resolve/")[1].split("/", 1)[1]
                data = files[name].read_bytes()
                if self.command == "GET":
                    downloaded.append(name)
                headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.answer(data, headers)
                return
            tree = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": file.stat().st_size}
                for name, file in sorted(files.items())
            ]  # fmt: skip
            siblings = [{"rfilename": item["path"], "size": item["size"]} for item in tree]
            about = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings,
                     "private": False, "gated": False, "tags": []}  # fmt: skip
            body = json.dumps(tree if "/tree/" in path else about).encode()
            self.answer(body, {"Content-Type": "application/json"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", downloaded
    finally:
        server.shutdown()
        server.server_close()
