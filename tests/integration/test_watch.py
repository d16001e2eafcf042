"""`wanlora watch`: a real server, raw requests, the command, and what a browser shows."""

import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest
from filelock import FileLock

from tests.support import cli
from tests.support.watched import lines, metrics_row, write_run
from wanlora.commands.watch import run as watch
from wanlora.commands.watch import server as server_module
from wanlora.commands.watch.pages import Pages
from wanlora.commands.watch.run_files import Folder
from wanlora.commands.watch.server import Server
from wanlora.config import WatchConfig
from wanlora.errors import OutputError, RunError
from wanlora.report import run_status
from wanlora.report.page import page, script_source
from wanlora.runs import run_folder

CHROMIUM = shutil.which("chromium")
PROMPT = "A person <b>clapping</b>"
HOSTILE = 'a "b" & <script>document.title = "hacked"</script> ü 100%25 +x'


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    write_run(folder / "fast", status_values={}, rank=32, prompts=[PROMPT, "a dog"])
    write_run(folder / "slow run", status_values={"state": "stopped"}, rate=5e-5, prompts=[PROMPT])
    write_run(folder / HOSTILE, status_values={"state": "failed", "reason": "<i>reason</i>"})
    (tmp_path / "secret.txt").write_text("the secret")
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    return folder


@pytest.fixture
def server(outputs):
    with Server(0, Pages(outputs, Folder(outputs)).routes) as started:
        thread = threading.Thread(target=started.serve_forever, args=(0.01,))
        thread.start()
        yield started
        started.shutdown()
        thread.join()


def get(server, path, method="GET", **headers):
    """Send a request with http.client; return status, headers and text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=names)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def send(server, data, *, wait_s=20.0):
    """Send bytes as they are; return what comes back."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=wait_s) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while part := connection.recv(65536):
                received += part
        except OSError:  # the server has closed the connection
            return b""
    return received


def test_the_list_names_every_run_and_no_link(server):
    status, headers, text = get(server, "/")
    assert status == 200
    assert "1 finished, 1 stopped, 1 failed" in text
    assert "followed: link" in text
    assert "&lt;script&gt;document.title" in text
    assert "&lt;i&gt;reason" in text
    assert '<script>document.title = "hacked"' not in text
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_each_listed_link_leads_to_its_run(server):
    _, _, text = get(server, "/")
    links = re.findall(r'href="(/run\?name=[^"]+)"', text)
    assert len(links) == 3
    for link in links:
        status, _, page_of_run = get(server, link)
        assert status == 200
        assert "Validation loss" in page_of_run
        assert '<a href="/"' in page_of_run


def test_two_runs_side_by_side(server):
    status, _, text = get(server, "/compare?run=fast&run=slow%20run")
    assert status == 200
    differing = text.split("Settings that differ")[1]
    assert re.search(r"lora\.rank</td><td>32</td><td>16", differing)
    assert re.search(r"learning_rate</td><td>0.0001</td><td>5e-05", differing)
    assert "model</td>" not in differing
    assert text.count("data:image/gif;base64,") == 3
    assert "&lt;b&gt;clapping" in text


def test_runs_measured_on_different_clips_are_not_compared_silently(server, outputs):
    assert "different clips" not in get(server, "/compare?run=fast&run=slow%20run")[2]
    write_run(outputs / "other", panel="another")
    assert "different clips" in get(server, "/compare?run=fast&run=other")[2]


def test_pages_are_compressed_for_a_client_that_can_read_them(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", "/", headers={"Accept-Encoding": "gzip, br"})
    answer = connection.getresponse()
    packed = answer.read()
    connection.close()
    assert answer.headers["Content-Encoding"] == "gzip"
    assert b"slow run" in gzip.decompress(packed)


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 400), ("?run=fast", 400), ("?run=fast&run=fast", 400), ("?run=fast&run=gone", 404),
     ("?" + "&".join(f"run={n}" for n in range(9)), 400),
     ("?" + "&".join(f"run={n}" for n in range(99)), 400)],
)  # fmt: skip
def test_a_wrong_selection_is_refused(server, query, status):
    assert get(server, f"/compare{query}")[0] == status


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/%2e%2e/secret.txt", "/%2e%2e%2fsecret.txt", "/%252e%252e%252fsecret.txt",
     "/..%5csecret.txt", "/..\\secret.txt", "//etc/passwd", "/etc/passwd", "/fast/metrics.jsonl",
     "/run/fast", "/run%00", "/run/../compare", "/link/secret.txt",
     "/fast/checkpoints/x.safetensors", "http://127.0.0.1/", "http://elsewhere/run?name=fast", "*"],
)  # fmt: skip
def test_no_path_leads_to_a_file(server, path):
    answer = send(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.0 404", b"HTTP/1.0 400")), answer[:40]
    assert b"secret" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../secret.txt", "%2e%2e", "%252e%252e", "link", "link/secret.txt", "/etc", "fast/",
     "fast/../fast", "..\\fast", "fast%00", "%FF", "", "FAST"],
)  # fmt: skip
def test_a_name_that_is_not_a_run_of_the_folder_is_refused(server, name):
    status, _, text = get(server, f"/run?name={name}")
    assert status in (400, 404)
    assert "the secret" not in text


def test_links_inside_a_run_are_not_followed(server, outputs, tmp_path):
    secret = tmp_path / "secret.html"
    secret.write_text("<html><body><main>the secret</main></body></html>")
    for name in (run_folder.PAGE_NAME, "config.toml"):
        (outputs / "fast" / name).unlink(missing_ok=True)
        (outputs / "fast" / name).symlink_to(secret)
    (outputs / "fast" / "previews" / "step-000020" / "00.gif").unlink()
    (outputs / "fast" / "previews" / "step-000020" / "00.gif").symlink_to(secret)
    for path in ("/", "/run?name=fast", "/compare?run=fast&run=slow%20run"):
        status, _, text = get(server, path)
        assert status == 200
        assert "the secret" not in text
    assert get(server, "/compare?run=fast&run=slow%20run")[2].count("data:image/gif") == 2


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("localhost", 200), ("[::1]:9000", 200),
     ("LOCALHOST:9000", 200), ("evil.example", 403), ("evil.example:{port}", 403),
     ("127.0.0.1.evil.example", 403), ("localhost.", 403), ("0.0.0.0:{port}", 403),
     ("127.0.0.2:{port}", 403), ("user@localhost", 403), ("localhost/x", 403),
     ("localhost:port", 403), ("", 403)],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(server, host, status):
    host = host.format(port=server.server_port)
    answer = send(server, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.0 {status}".encode())
    assert (b"slow run" in answer) == (status == 200)


@pytest.mark.parametrize("hosts", ["", "Host: localhost\r\nHost: evil.example\r\n"])
def test_a_request_without_one_host_is_refused(server, hosts):
    answer = send(server, f"GET / HTTP/1.1\r\n{hosts}\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 403")


def test_another_sites_requests_are_refused(server):
    own = f"http://127.0.0.1:{server.server_port}"
    assert get(server, "/", Sec_Fetch_Site="same-origin", Origin=own)[0] == 200
    assert get(server, "/", Sec_Fetch_Site="none")[0] == 200
    for site in ("cross-site", "same-site", "anything"):
        assert get(server, "/", Sec_Fetch_Site=site)[0] == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{own}.evil.example"):
        assert get(server, "/", Origin=origin)[0] == 403


@pytest.mark.parametrize("path", ["/", "/run?name=fast", "/compare?run=fast&run=slow%20run", "/x"])
def test_every_answer_has_strict_headers(server, path):
    _, headers, _ = get(server, path)
    policy = headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert "Python" not in headers["Server"]


def test_a_script_of_a_run_html_made_elsewhere_may_not_run(server, outputs):
    own = page("Run fast", ["TEXT"], script=run_status.SCRIPT)
    (outputs / "fast" / "run.html").write_text(own.replace("TEXT", "<script>alert(1)</script>"))
    _, headers, text = get(server, "/run?name=fast")
    assert "<script>alert(1)" in text
    allowed = re.search(r"script-src ([^;]+)", headers["Content-Security-Policy"])[1]
    assert allowed == script_source(run_status.SCRIPT)
    assert f"<script>{own.rpartition('<script>')[2]}" in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_only_get_and_head_are_allowed(server, method):
    status, headers, _ = get(server, "/", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_has_the_headers_of_get_without_the_page(server):
    answer = send(server, b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert (head[:12], body) == (b"HTTP/1.0 200", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n",
     b"GET / " + b"x" * 70_000 + b"\r\n\r\n", b"GET /" + b"a" * 100_000,
     b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5_000 + b"\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
     b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\nHost: evil\r\n\r\n", b"\0" * 1000],
)  # fmt: skip
def test_malformed_requests_change_nothing_for_the_next(server, data):
    assert not send(server, data).startswith(b"HTTP/1.0 200")
    assert get(server, "/")[0] == 200


def test_silent_clients_are_dropped_and_block_nobody(server, monkeypatch):
    monkeypatch.setattr(server_module.Handler, "timeout", 0.5)
    idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(20)]
    for connection in idle:
        connection.sendall(b"GET / HT")
    assert get(server, "/")[0] == 200
    for connection in idle:
        connection.settimeout(20)
        assert connection.recv(1) in (b"", b"H")
        connection.close()


def test_a_client_that_sends_a_byte_at_a_time_is_dropped(server, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_REQUEST_S", 0.5)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        try:
            for _ in range(200):
                connection.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            return
    pytest.fail("the connection stayed open")


def test_connections_beyond_the_limit_are_closed(server):
    for _ in range(server_module.MAX_CONNECTIONS - 1):
        assert server._free.acquire(timeout=30)
    with socket.create_connection(("127.0.0.1", server.server_port)):
        time.sleep(0.2)
        assert send(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    server._free.release(server_module.MAX_CONNECTIONS - 1)


def test_a_run_that_vanishes_or_is_damaged_breaks_no_page(server, outputs):
    for name in (
        run_folder.METRICS_NAME,
        run_folder.VALIDATION_NAME,
        run_folder.CONFIG_NAME,
        run_folder.STATUS_NAME,
    ):
        (outputs / "slow run" / name).write_bytes(b'\xff{"step": 1,\n[]\n{"step": 3}\n')
    assert get(server, "/")[0] == 200
    _, _, text = get(server, "/compare?run=fast&run=slow%20run")
    assert "2 damaged lines of metrics.jsonl" in text
    assert get(server, "/run?name=slow%20run")[0] == 200
    (outputs / "slow run" / run_folder.CONFIG_NAME).write_text("validation = 5\nlora = 3\n")
    (outputs / "slow run" / run_folder.METRICS_NAME).write_text(
        lines([metrics_row(0, peak_memory_gb=None)])
    )
    for path in ("/", "/run?name=slow%20run", "/compare?run=fast&run=slow%20run"):
        assert get(server, path)[0] == 200
    shutil.rmtree(outputs / "slow run")
    assert get(server, "/run?name=slow%20run")[0] == 404
    shutil.rmtree(outputs)
    assert "No runs" in get(server, "/")[2]


def test_the_page_of_a_run_is_its_run_html_unless_that_is_late(server, outputs):
    path = outputs / "fast" / "run.html"
    path.write_text(page("Run fast", ["written while training"]))
    assert "written while training" in get(server, "/run?name=fast")[2]
    old = path.stat().st_mtime - 1000
    subprocess.run(["touch", "-d", f"@{old:.0f}", path], check=True)
    _, _, text = get(server, "/run?name=fast")
    assert "written while training" not in text
    assert "Training loss" in text


def test_a_killed_run_is_named_on_its_page(server, outputs):
    run = write_run(outputs / "killed", status_values={"state": "training"})
    assert "no sign of life" in get(server, "/run?name=killed")[2]
    with FileLock(run / ".lock"):
        assert "no sign of life" not in get(server, "/run?name=killed")[2]


def tree(folder):
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
    }


def test_watching_writes_nothing(server, outputs):
    (outputs / "fast" / ".lock").touch()
    before = tree(outputs.parent)
    for path in ("/", "/run?name=fast", "/compare?run=fast&run=slow%20run"):
        assert get(server, path)[0] == 200
    assert tree(outputs.parent) == before


def test_the_list_as_json_and_as_text(outputs):
    done = cli.invoke("watch", outputs, "--json")
    assert done.exit_code == 0
    found = {each["name"]: each for each in json.loads(done.stdout)["runs"]}
    assert found.keys() == {"fast", "slow run", HOSTILE}
    assert found["fast"]["best"]["loss"] == 0.42
    assert "slow run" in cli.invoke("watch", outputs, "--once").stdout


@pytest.mark.parametrize(("name", "words"), [("missing", "no folder"), ("file", "is a file")])
def test_a_folder_that_is_not_there_is_refused(tmp_path, name, words):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=words):
        watch(WatchConfig(folder=tmp_path / name))


def test_a_busy_port_is_refused_if_it_was_asked_for(server, outputs):
    with pytest.raises(OutputError, match=rf"port {server.server_port} .*--port"):
        watch(WatchConfig(folder=outputs, port=server.server_port))


def start(outputs, *arguments):
    """Start the command; return the process and the port that it logs."""
    process = subprocess.Popen(
        cli.command("watch", outputs, *arguments), env=os.environ | cli.ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if address := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
            return process, int(address[1])
    pytest.fail("no address was logged")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal(outputs, number, code):
    process, port = start(outputs, "--port", 0)
    with process, socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.0 200"
        process.send_signal(number)  # while a connection is open
        assert process.wait(timeout=60) == code
        assert "Traceback" not in process.stderr.read()


def test_the_command_loads_no_model_library(outputs):
    modules = cli.modules_after("watch", outputs, "--once")
    assert not modules & {"torch", "diffusers", "transformers", "peft", "zarr", "av"}


def browse(tmp_path, url, *options):
    """Return the page as chromium holds it after its scripts have run, and its console."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900",
            "--enable-logging=stderr", *options, "--dump-dom", url,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_runs_the_list_and_shows_a_run_that_begins_meanwhile(
    server, outputs, tmp_path, monkeypatch
):
    show_list = server.routes["/"]

    def show_list_and_begin(query):
        answer = show_list(query)
        if not (outputs / "begun").exists():
            write_run(outputs / "begun", status_values={})
        return answer

    monkeypatch.setitem(server.routes, "/", show_list_and_begin)
    dom, console = browse(tmp_path, server.url, "--virtual-time-budget=12000")
    assert console == []
    assert "<title>Runs in" in dom  # the name of a run has not replaced it
    assert "name=begun" in dom
    assert re.search(r'id="fresh"[^>]*>Updated', dom)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_runs_only_the_script_of_this_release(server, outputs, tmp_path):
    hostile = "<script>document.title = 'hacked'</script><img src=x onerror='document.title=1'>"
    own = page("Run fast", ["TEXT"], script=run_status.SCRIPT)
    (outputs / "fast" / "run.html").write_text(own.replace("TEXT", hostile))
    dom, console = browse(tmp_path, f"{server.url}run?name=fast")
    assert "<title>Run fast" in dom
    assert len(console) >= 2
    assert all("Content Security Policy" in line for line in console)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_two_runs_side_by_side(server, tmp_path):
    dom, console = browse(tmp_path, f"{server.url}compare?run=fast&run=slow%20run")
    assert console == []
    assert dom.count('role="img"') == 4
