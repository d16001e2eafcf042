"""The command line, in its own process as a user runs it, or in this one where that is enough."""

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from tests.support.server import Forked, Server, Work
from tests.support.server import command as server_command
from wanlora.cli import app

PROBE = """
import json, sys
from wanlora.cli import main
sys.argv = ["wanlora", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as end:
    code = end.code
print(json.dumps({"code": code, "modules": sorted(sys.modules)}))
"""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "default",
    "COLUMNS": "200",
}


PRELOADED = (
    "wanlora.cli", "wanlora.commands.prepare", "wanlora.commands.verify",
    "wanlora.commands.cache_latents.cache_latents",
    "wanlora.commands.train.loop", "wanlora.commands.train.opening",
    "wanlora.commands.sample.sample",
    "wanlora.commands.evaluate.evaluate",
    "wanlora.adapters.reread", "wanlora.commands.inspect", "wanlora.commands.estimate.probe",
)  # fmt: skip
"""Modules that the server of commands has imported: seconds of CPU for each command."""

READ_LATE = ("WANLORA_CACHE_HOME", "PYTEST_CURRENT_TEST", "PYTEST_VERSION")
"""Variables that no library reads when it is imported."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "wanlora", *map(str, arguments)]


@functools.cache
def server() -> Server:
    """The one server of this test process: it starts at the first request."""
    running = Server(PRELOADED, os.environ | ENVIRONMENT)
    atexit.register(running.close)
    return running


def _can_fork() -> bool:
    """Whether the server has this environment: libraries read it when they are imported."""
    mine, its = os.environ | ENVIRONMENT, server().environment
    names = (mine.keys() | its.keys()) - set(READ_LATE)
    return all(mine.get(name) == its.get(name) for name in names)


def run(
    *arguments: object, cwd: Path | None = None, exit_code: int = 0, timeout: float = 300,
    before: Sequence[Work] = (),
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a command in its own process and require its exit code.

    `before` is what the process does first; see `hooks`.
    """
    if before or _can_fork():
        done = server().run(
            server_command(*arguments), before=before, cwd=cwd,
            environment=os.environ | ENVIRONMENT, timeout=timeout,
        )  # fmt: skip
    else:
        done = subprocess.run(
            command(*arguments),
            cwd=cwd,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    assert done.returncode == exit_code, (
        f"wanlora {' '.join(map(str, arguments))}: exit code {done.returncode}, expected "
        f"{exit_code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    )
    return done


def start(
    *arguments: object, cwd: Path | None = None, before: Sequence[Work] = (),
    files: Sequence[str | Path] = (os.devnull, os.devnull), **environment: str,
) -> Forked:  # fmt: skip
    """Start a command in its own process, with more variables; see `Server.start`."""
    return server().start(
        server_command(*arguments), before=before, cwd=cwd, files=files,
        environment=os.environ | ENVIRONMENT | environment,
    )  # fmt: skip


def invoke(*arguments: object) -> Result:
    """Run a command in this process: for refusals, which need no process of their own."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refuses(*arguments: object, exit_code: int = 1) -> str:
    """Run a command that must be refused with a message and no traceback; return the message."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def modules_after(*arguments: object) -> set[str]:
    """Run a command in its own process, and list every module that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([str(a) for a in arguments])],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["code"], done.stdout + done.stderr
    return set(result["modules"])
