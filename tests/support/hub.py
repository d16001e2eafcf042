"""A model hub on loopback that serves one folder as one repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
