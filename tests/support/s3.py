"""An S3 server on loopback, in a process group of its own, and a proxy in front that fails."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

BUCKET = "clips"


def _wait_until_it_answers(port: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert process.poll() is None, "the S3 server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the S3 server does not answer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """moto's server, ended with everything it started."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_it_answers(port, process)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@pytest.fixture
def s3(s3_port, monkeypatch, tmp_path) -> str:
    """Address of an empty place in a bucket; the environment has what a user would set."""
    import obstore

    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import urllib.request

    make = urllib.request.Request(f"http://127.0.0.1:{s3_port}/{BUCKET}", method="PUT")
    with urllib.request.urlopen(make):
        pass
    assert obstore is not None
    return f"s3://{BUCKET}/{tmp_path.name}"


@contextmanager
def failing_proxy(port: int, every: int) -> Iterator[tuple[int, list[int]]]:
    """Forward connections to a port; of every so many requests one is answered with 503.

    Each request gets a connection of its own (`Connection: close`), so that it can be counted.
    """
    counts = [0, 0]
    lock = threading.Lock()
    server = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                block = client.recv(65536)
                if not block:
                    return
                head += block
            with lock:
                counts[0] += 1
                fails = counts[0] % every == 0
                counts[1] += fails
            if fails:
                client.sendall(
                    b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                return
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                upstream.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                back = threading.Thread(target=_pump, args=(upstream, client))
                back.start()
                _pump(client, upstream, until=back)
                back.join()

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1], counts
    finally:
        server.close()


def _pump(
    source: socket.socket, target: socket.socket, until: threading.Thread | None = None
) -> None:
    source.settimeout(0.2)
    while True:
        try:
            block = source.recv(65536)
        except TimeoutError:
            if until is not None and not until.is_alive():
                return
            continue
        except OSError:
            return
        if not block:
            return
        try:
            target.sendall(block)
        except OSError:
            return


@contextmanager
def slow_proxy(port: int, bytes_per_s: float) -> Iterator[int]:
    """Forward connections to a port; all of them together get a rate, in both directions."""
    lock = threading.Lock()
    free_at = [0.0]
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                with lock:
                    free_at[0] = max(free_at[0], time.monotonic()) + len(block) / bytes_per_s
                    wait = free_at[0] - time.monotonic()
                time.sleep(max(0.0, wait))
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as upstream:
            back = threading.Thread(target=pump, args=(upstream, client))
            back.start()
            pump(client, upstream)
            back.join()

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()
