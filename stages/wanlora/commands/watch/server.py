"""HTTP on 127.0.0.1: three pages, GET and HEAD only.

    /                        the list of runs
    /run?name=NAME           one run
    /compare?run=A&run=B     runs side by side

Owns: the refusals and the headers. Must not know: what a page shows. No part of an address becomes
a path: a run is found by comparing its name with those in the folder.
"""

import gzip
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from wanlora.report.page import script_source

HOST = "127.0.0.1"
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
"""Names under which a browser on this machine, or at the end of an SSH tunnel, finds the server.
Any other name in `Host` is DNS rebinding: a foreign page whose name now leads here."""
MAX_CONNECTIONS = 64
IDLE_S, MAX_REQUEST_S = 10.0, 60.0
MAX_FIELDS = 64

logger = logging.getLogger(__name__)


class Refusal(Exception):  # noqa: N818  (an answer, not an error of this program)
    """A request that is not answered with a page."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """A page.

    Attributes:
        html: The page, in UTF-8.
        script: JavaScript that it may run, as given to `report.page.page`.
    """

    html: bytes
    script: str


Query = Mapping[str, Sequence[str]]
Routes = Mapping[str, Callable[[Query], Answer]]


class Server(ThreadingHTTPServer):
    """A server of some pages, on one port of 127.0.0.1.

    Args:
        port: Port; 0 = any free one.
        routes: Path to the function that makes its page.

    Raises:
        OSError: The port is in use or not allowed.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, routes: Routes) -> None:
        self.routes = routes
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((HOST, port), Handler)

    @property
    def url(self) -> str:
        """Address of the list."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without the lookup of this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread, or close the connection if there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, for a limited time."""
        timer = threading.Timer(MAX_REQUEST_S, _abort, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """Ignore clients that go away."""
        logger.debug("the connection from %s ended early", client_address)


class Handler(BaseHTTPRequestHandler):
    """One request. The connection is closed after it."""

    server: Server
    timeout = IDLE_S
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        """Send a page."""
        try:
            self._check_client()
            answer = self._page()
        except Refusal as refusal:
            self._send(refusal.status, f"{refusal}\n".encode(), "text/plain")
            return
        packed = "gzip" in self.headers.get("Accept-Encoding", "")
        # A list of 300 runs has 400 kB, and is fetched every few seconds, perhaps through SSH.
        body = gzip.compress(answer.html, 1) if packed else answer.html
        script = script_source(answer.script)
        self._send(HTTPStatus.OK, body, "text/html", script=script, packed=packed)

    def do_HEAD(self) -> None:
        """Send a page's headers."""
        self.do_GET()

    def version_string(self) -> str:
        """Name the server, without versions."""
        return "wanlora"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (http.server's name)
        """Log requests for debugging only."""
        logger.debug(format, *args)

    def send_error(self, code: int, *_texts: str | None) -> None:
        """Refuse a malformed request, or a method that is not GET or HEAD."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._send(status, f"{status.phrase}\n".encode(), "text/plain")

    def _check_client(self) -> None:
        """Refuse requests that a page of another site makes.

        Raises:
            Refusal: The host is not this machine, or another site sent the request.
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or _hostname(f"//{hosts[0]}") not in LOCAL_NAMES:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "This server answers only under the names 127.0.0.1 and localhost.",
            )
        origin = self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site", "none")
        foreign = origin is not None and origin != f"http://{hosts[0]}"
        if foreign or site not in ("none", "same-origin"):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "Another site sent this request. Type the address into the browser instead.",
            )

    def _page(self) -> Answer:
        parts = urlsplit(self.path)
        route = self.server.routes.get(parts.path)
        if parts.scheme or parts.netloc or route is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such page.")
        try:
            query = parse_qs(parts.query, errors="surrogateescape", max_num_fields=MAX_FIELDS)
        except ValueError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "There are too many fields.") from None
        try:
            return route(query)
        except Refusal:
            raise
        except Exception:
            logger.exception("a page could not be made: %s", self.path)
            raise Refusal(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "This page could not be made; the terminal of wanlora watch shows the reason.",
            ) from None

    def _send(
        self, status: HTTPStatus, body: bytes, kind: str, *, script: str = "'none'",
        packed: bool = False,
    ) -> None:  # fmt: skip
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": (
                f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
                f"script-src {script}; connect-src 'self'; form-action 'self'; base-uri 'none'; "
                "frame-ancestors 'none'"
            ),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Connection": "close",
        }
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        if packed:
            headers["Content-Encoding"] = "gzip"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _hostname(address: str) -> str | None:
    """Return the host of an address; None if it is malformed or has a user name."""
    try:
        parts = urlsplit(address)
        known = parts.port is None or parts.port > 0
    except ValueError:
        return None
    return parts.hostname if known and "@" not in parts.netloc and not parts.path else None


def _abort(request: socket.socket) -> None:
    """End a connection that takes too long."""
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
