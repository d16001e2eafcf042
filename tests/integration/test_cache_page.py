"""The page of a cache, in a real browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli
from tests.support.stores import build_store, row_of, segment_writer
from wanlora.commands.inspect import run as inspect
from wanlora.commands.inspect.page_rows import strip
from wanlora.config import InspectConfig
from wanlora.store.latent_rgb import normal_equations
from wanlora.store.views import read_view, write_view

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture
def cache(tmp_path) -> Path:
    """Twelve clips with pictures, one of which stands out and one whose row is lost."""
    folder = tmp_path / "cache"
    view = build_store(folder, num_clips=10)
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    frames = np.broadcast_to(ramp[None, :, None, None], (17, 64, 64, 3)).copy()
    with segment_writer(folder, "latents") as writer:
        for name, scale in (("odd", 4.0), ("even", 1.0)):
            latents = scale * row_of("latents", name).astype(np.float32)
            writer.add(name, latents, rgb=normal_equations(latents, frames))
    more = [
        replace(view.clips[0], clip_id="<odd & clip>", key="odd", activity="jumping"),
        replace(view.clips[0], clip_id="even-clip", key="even"),
        replace(view.clips[0], clip_id="lost-clip", key="0" * 64),
    ]
    write_view(folder, "default", replace(view, clips=(*view.clips, *more)))
    return folder


def test_the_page_holds_every_clip_its_picture_caption_and_numbers(cache, tmp_path):
    target = tmp_path / "pages" / "cache.html"
    result = inspect(InspectConfig(path=cache, html=target))
    assert result.page == str(target)
    text = target.read_text()
    assert text.count("<img ") == 12
    assert "&lt;odd &amp; clip&gt;" in text
    assert "<odd" not in text
    assert re.search(r"std \+[34]\.\d+ \(\+\d+ deviations\)", text)
    assert "is not in" in text  # the lost row, said in its place
    assert "http://" not in text
    assert "https://" not in text
    assert "12 of 13 clips" not in text
    few = inspect(InspectConfig(path=cache, html=target, html_clips=3))
    assert few.clips == 12
    assert "3 of 13 clips" in target.read_text()


def test_captions_come_from_the_cache(cache_fp16, tmp_path):
    target = tmp_path / "cache.html"
    result = cli.invoke("inspect", cache_fp16, "--html", target, "--json")
    assert json.loads(result.stdout)["page"] == str(target)
    text = target.read_text()
    assert "A person clapping their hands" in text
    assert html.escape("A person walking  to the left &amp; back") in text  # as it was given
    for clip in read_view(cache_fp16, "default").clips:
        assert clip.clip_id in text
        assert clip.key in text


def test_a_strip_shows_the_first_frame_on_the_left():
    projection = np.zeros((17, 3))
    projection[0] = 1.0
    latents = np.zeros((16, 21, 4, 8))
    latents[0] = np.linspace(0, 1, 21)[:, None, None]
    picture = strip(latents, projection)
    assert picture.shape == (72, 6 * 8 * 18, 3)
    columns = picture[0, 9 :: 8 * 18, 0].astype(int)
    assert (columns[0], columns[-1]) == (0, 255)
    assert (np.diff(columns) > 0).all()


def browse(page: Path, tmp_path: Path, *arguments: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_pictures_and_sorts_by_a_heading(cache, tmp_path):
    page = tmp_path / "cache.html"
    inspect(InspectConfig(path=cache, html=page))
    clicking = tmp_path / "clicking.html"
    script = """<script>
      const table = [...document.querySelectorAll("table")].at(-1);
      const heads = [...table.querySelectorAll("th")];
      const column = heads.findIndex(head => head.textContent === "std");
      heads[column].click(); heads[column].click();
      const images = [...document.querySelectorAll("img")];
      document.body.dataset.first = table.tBodies[0].rows[0].cells[0].firstChild.textContent;
      document.body.dataset.shown = images.filter(i => i.src.startsWith("data:")).length;
    </script></body>"""
    clicking.write_text(page.read_text().replace("</body>", script))
    body = re.search(r"<body[^>]*>", browse(clicking, tmp_path, "--dump-dom"))
    assert body is not None
    assert 'data-first="&lt;odd &amp; clip&gt;"' in body.group() or (
        'data-first="<odd &amp; clip>"' in body.group()
    )
    assert 'data-shown="12"' in body.group()
