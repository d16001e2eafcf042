"""A page in Chromium, if there is one on this machine."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def title_in_a_browser(page: Path, folder: Path):
    """JSON that a page's script leaves as its title.

    The browser's clock does not wait for videos to be decoded, so a busy machine needs more of it.
    """
    for budget_ms in (8_000, 32_000, 128_000, 512_000):
        done = subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", f"--user-data-dir={folder / str(budget_ms)}",
                "--window-size=1300,900", f"--virtual-time-budget={budget_ms}", "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
        if title.startswith("{"):
            return json.loads(title)
    pytest.fail(f"the script did not end; the title is {title!r}")
