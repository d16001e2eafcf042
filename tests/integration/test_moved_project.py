"""A project that is prepared on one machine and encoded on another."""

import json
import shutil
from pathlib import Path

import pytest

from wanlora.commands import cache_latents, prepare, verify
from wanlora.commands.cache_latents.summary import CacheResult
from wanlora.config import CacheLatentsConfig, PrepareConfig, VerifyConfig
from wanlora.errors import ManifestError

FIXTURE = Path(__file__).parent.parent / "fixtures" / "v0.1.0"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that was prepared elsewhere; the cache has the rows of its clips."""
    laptop = tmp_path / "laptop" / "project"
    shutil.copytree(FIXTURE / "videos", laptop / "videos")
    prepare.run(PrepareConfig(
        sources=(laptop / "videos",), output=laptop / "data" / "processed", num_frames=17,
        height=64, width=96, workers=1,
    ))  # fmt: skip
    project = Path(shutil.copytree(laptop, tmp_path / "gpu" / "project"))  # with the files' times
    shutil.copytree(FIXTURE / "cache", project / "cache")
    shutil.rmtree(laptop)
    return project


def _encode(project: Path, *roots: Path) -> CacheResult:
    return cache_latents.run(CacheLatentsConfig(
        manifest=(project / "data" / "processed",), cache=project / "cache", model="micro",
        device="cpu", source_root=roots, dry_run=True,
    ))  # fmt: skip


def _verify(project: Path, *roots: Path, limit: int = 0) -> verify.VerifyResult:
    return verify.run(VerifyConfig(
        manifests=(project / "data" / "processed",), source_root=roots, limit=limit
    ))  # fmt: skip


def _rewrite(project: Path, root: str) -> None:
    r"""Name the sources as `prepare` on Windows would: `C:\...\walking\a.mp4`."""
    folder = project / "data" / "processed"
    for name in ("train.jsonl", "val.jsonl", "sources.json"):
        if not (folder / name).exists():
            continue
        text = (folder / name).read_text()
        rows = [text] if name == "sources.json" else text.splitlines()
        changed = []
        for row in rows:
            values = json.loads(row)
            if name == "sources.json":
                values = {_at(root, key): entry for key, entry in values.items()}
            else:
                values["source"] = _at(root, values["source"])
            changed.append(json.dumps(values))
        (folder / name).write_text("\n".join(changed) + "\n")


def _at(root: str, relative: str) -> str:
    path = relative.removeprefix("../../videos/")
    assert path != relative
    return root + (path.replace("/", "\\") if "\\" in root else path)


def test_a_project_that_is_copied_as_a_whole_works_as_it_is(project, micro_home):
    assert _verify(project).exit_code == 0
    found = _encode(project)
    assert (found.clips, found.clips_encoded, found.bytes_hashed) == (6, 0, 0)
    assert found.failures == []


@pytest.mark.parametrize(
    "root",
    ["C:\\Users\\me\\videos\\", "C:/Users/me/videos/", "\\\\server\\share\\clips\\",
     "/home/me/videos/", "..\\..\\..\\videos\\", "../../../far/"],
)  # fmt: skip
def test_moved_sources_are_found_under_a_folder(project, micro_home, root):
    _rewrite(project, root)
    lost = _verify(project, limit=4)
    assert lost.exit_code == 3
    assert "--source-root" in lost.missing_sources
    assert "prepare" in lost.missing_sources
    (project / "videos").rename(project / "moved")
    found = _verify(project, project / "moved")
    assert (found.exit_code, len(found.loaded)) == (0, 6)
    assert f"--source-root {project / 'moved'}" in found.lines()[-1]
    encoded = _encode(project, project / "moved")
    assert (encoded.clips, encoded.clips_encoded, encoded.bytes_hashed) == (6, 0, 0)


def test_missing_sources_are_counted_and_the_option_is_named(project, micro_home, caplog):
    shutil.rmtree(project / "cache")
    for video in list((project / "videos").rglob("*.mp4"))[:2]:
        video.unlink()
    _encode(project)
    assert "2 of" in caplog.text
    assert "--source-root" in caplog.text
    shutil.rmtree(project / "videos")
    with pytest.raises(ManifestError, match=r"--source-root FOLDER.*wanlora prepare"):
        _encode(project)
    with pytest.raises(ManifestError, match=r"--source-root .*videos: expected a folder"):
        _encode(project, project / "videos")
