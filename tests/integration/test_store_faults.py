"""What a store does when it is killed, damaged, raced or locked."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli, hooks
from tests.support.server import script
from tests.support.stores import (
    FINGERPRINT,
    build_store,
    keys_from,
    open_rows,
    open_store,
    row_of,
    segment_folders,
    segment_writer,
    segments_of,
    unprivileged,
    users_folder,
    write_rows,
)
from wanlora.core.kinds import Kind
from wanlora.errors import CorruptRowError, StoreError
from wanlora.store import folder
from wanlora.store.reader import StoreReader

MODES = ("half-written", "before-rename", "after-rename")
NUM_PUTS: dict[Kind, int] = {"latents": 10, "text": 13}
"""4 or 3 groups above, then two segments of 3 or 5 objects."""

KEYS = [f"{i:064x}" for i in range(4)]


def check_rows(cache: Path, kind: str) -> set[str]:
    """Every committed row reads, and is the right one."""
    reader = open_rows(cache, kind)
    for key in reader.rows:
        assert np.array_equal(reader.read(key), row_of(kind, key)), key
    return set(reader.rows)


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_killed_at_any_step_of_publishing_whole_segments_are_right_or_invisible(tmp_path, kind):
    numbers = []
    for point, mode in itertools.product(range(NUM_PUTS[kind]), MODES):
        cache = tmp_path / f"{point:02d}-{mode}"
        done = cli.server().run(
            partial(write_rows, cache, kind, KEYS, rows=2),
            before=[partial(hooks.kill_at_publication, point, mode)],
        )
        assert done.returncode == -signal.SIGKILL, (point, mode, done.stderr)
        valid = check_rows(cache, kind)
        assert valid in (set(), set(KEYS[:2]), set(KEYS)), cache.name
        numbers.append(len(valid))
        write_rows(cache, kind, [key for key in KEYS if key not in valid])
        assert check_rows(cache, kind) == set(KEYS), cache.name
    assert {0, 2, 4} == set(numbers)  # the last kill comes after the last commit


def test_killed_at_random_with_two_writers_no_wrong_row_is_valid_and_resume_completes(tmp_path):
    moments = random.Random(0)
    for i in range(5):
        writers = [
            cli.server().start(partial(write_rows, tmp_path, "latents", keys, rows=4))
            for keys in (keys_from(8 * i), keys_from(8 * i + 4))
        ]
        for writer in writers:
            time.sleep(moments.uniform(0.05, 0.3))
            writer.kill()
            assert writer.wait() == -signal.SIGKILL
    valid = check_rows(tmp_path, "latents")
    wanted = valid | {f"{i:064x}" for i in range(40)}
    write_rows(tmp_path, "latents", sorted(wanted - valid))
    assert check_rows(tmp_path, "latents") == wanted


def test_two_writers_at_once_may_repeat_a_row_and_the_lowest_segment_wins(tmp_path):
    keys = [f"{i:064x}" for i in range(12)]
    with (
        segment_writer(tmp_path, "latents", rows=3) as one,
        segment_writer(tmp_path, "latents", rows=3) as two,
    ):
        for a, b in zip(keys[:9], keys[3:], strict=True):
            one.add(a, row_of("latents", a))
            two.add(b, row_of("latents", b))
    assert check_rows(tmp_path, "latents") == set(keys)
    segments = segments_of(tmp_path, "latents", FINGERPRINT["latents"])
    assert sum(len(segment.row_keys) for segment in segments) == 18
    for key, row in open_rows(tmp_path, "latents").rows.items():
        homes = [segment.key for segment in segments if key in segment.row_keys]
        assert row.segment == min(homes)


def test_processes_that_finish_leave_every_row(tmp_path):
    writers = [
        cli.server().start(partial(write_rows, tmp_path, kind, keys_from(first)[:8], rows=2))
        for first in (0, 4)
        for kind in ("latents", "text")
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    for kind in ("latents", "text"):
        assert check_rows(tmp_path, kind) == {f"{i:064x}" for i in range(12)}


def test_ctrl_c_and_errors_publish_what_was_encoded(tmp_path):
    def interrupted(key: str, error: type[BaseException]) -> None:
        with segment_writer(tmp_path, "latents") as writer:
            writer.add(key, row_of("latents", key))
            raise error

    with pytest.raises(KeyboardInterrupt):
        interrupted("1", KeyboardInterrupt)
    with pytest.raises(ValueError, match=r"^$"):
        interrupted("2", ValueError)
    assert check_rows(tmp_path, "latents") == {"1", "2"}


def test_a_row_that_overflows_the_stored_type_is_refused_by_name(tmp_path):
    row = row_of("latents", "k").astype(np.float32)
    row[0, 0, 0, 0] = 70000.0
    with pytest.raises(StoreError, match=r"row k: 1 of 5120 .* float16 .*70000.*dtype=float32"):
        segment_writer(tmp_path, "latents").add("k", row)


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "bit flipped": flip_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("target", ["latents", "text", "length"])
def test_a_damaged_object_is_an_error_that_names_the_row_and_the_way_back(tmp_path, target, damage):
    kind = "latents" if target == "latents" else "text"
    keys = [f"{i:064x}" for i in range(3)]
    write_rows(tmp_path, kind, keys)
    write_rows(tmp_path, kind, ["other"])
    bad = next(
        folder
        for folder in segment_folders(tmp_path, kind)
        if keys[0] in (folder / "zarr.json").read_text()
    )
    victim = next(path for path in shards(bad) if (target == "length") == ("length" in path.parts))
    DAMAGES[damage](victim)
    reader, messages = open_rows(tmp_path, kind), {}
    for key in [*keys, "other"]:
        try:
            assert np.array_equal(reader.read(key), row_of(kind, key))
        except CorruptRowError as error:
            messages[key] = str(error)
    assert messages
    assert "other" not in messages
    for key, message in messages.items():
        assert all(text in message for text in (key, str(bad), "wanlora cache-latents"))
    shutil.rmtree(bad)  # what the message says
    write_rows(tmp_path, kind, keys)
    assert check_rows(tmp_path, kind) == {*keys, "other"}


@pytest.mark.parametrize("document", ["latent/zarr.json", "embedding/zarr.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_array_document_is_an_error_that_names_the_row(tmp_path, document, damage):
    kind = "latents" if document.startswith("latent/") else "text"
    write_rows(tmp_path, kind, ["k"])
    DAMAGES[damage](segment_folders(tmp_path, kind)[0] / document)
    with pytest.raises(CorruptRowError, match="row k"):
        open_rows(tmp_path, kind).read("k")


def test_a_damaged_commit_record_is_refused_by_name_and_a_missing_one_is_no_segment(tmp_path):
    write_rows(tmp_path, "latents", ["k"])
    (folder,) = segment_folders(tmp_path, "latents")
    os.truncate(folder / "zarr.json", 40)
    with pytest.raises(StoreError, match=rf"{folder.name}.*commit record[\s\S]*delete"):
        open_rows(tmp_path, "latents")
    (folder / "zarr.json").unlink()
    assert open_rows(tmp_path, "latents").rows == {}


def test_threads_read_the_same_rows(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    view = build_store(tmp_path, num_clips=8, rows=3)
    reader = StoreReader.of_view(tmp_path, view)
    keys = [clip.key for clip in view.clips] * 5
    with ThreadPoolExecutor(4) as pool:
        for key, latents in zip(keys, pool.map(reader.latents, keys), strict=True):
            assert np.array_equal(latents, row_of("latents", key))


@contextmanager
def locked_folder() -> Iterator[Path]:
    """A folder with a store that this process may read and not write, even as root."""
    with users_folder() as folder:
        cache = folder / "cache"
        build_store(cache, num_clips=2)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with unprivileged():
            yield cache


def test_a_read_only_store_reads_and_refuses_to_be_written_by_name():
    with locked_folder() as cache:
        reader = open_store(cache)
        assert len(reader.latents(next(iter(reader._rows["latents"].rows)))) == 16
        with pytest.raises(StoreError, match=rf"cannot write {cache}.*Permission denied"):
            write_rows(cache, "latents", ["new"])


def test_a_disk_error_while_writing_names_the_path_and_leaves_no_leftovers(tmp_path, monkeypatch):
    def full(temporary: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "publish", full)
    with pytest.raises(StoreError, match=r"zarr\.json: No space left"):
        write_rows(tmp_path, "latents", ["k"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_local_copy_that_cannot_be_written_names_its_own_option(tmp_path):
    view = build_store(tmp_path / "cache", num_clips=1)
    (tmp_path / "file").touch()
    reader = StoreReader.of_view(tmp_path / "cache", view, local_copy=tmp_path / "file" / "copy")
    with pytest.raises(StoreError, match="--local-copy"):
        reader.latents(view.clips[0].key)


def test_half_written_files_lie_outside_the_store(tmp_path, monkeypatch):
    seen = []
    publish = folder.publish

    def watched(temporary: Path, target: Path) -> None:
        seen.append(temporary)
        publish(temporary, target)

    monkeypatch.setattr(folder, "publish", watched)
    build_store(tmp_path, num_clips=1)
    assert seen
    for path in seen:
        assert (tmp_path / "store.zarr") not in path.parents
        assert (tmp_path / "views") not in path.parents


NO_ROOM = """
import resource, signal, sys
from pathlib import Path
from tests.support.stores import row_of, segment_writer
from wanlora.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with_room = Path(sys.argv[1])
writer = segment_writer(with_room, "latents", rows=2)
for key in "ab":
    writer.add(key, row_of("latents", key))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
writer.add("c", row_of("latents", "c"))
try:
    writer.add("d", row_of("latents", "d"))
except StoreError as error:
    refusal = error
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(refusal)
writer.close()
"""


@pytest.mark.parametrize("limit", [0, 100, 3000, 15000])
def test_a_write_cut_short_leaves_no_wrong_row_and_can_be_tried_again(tmp_path, limit):
    """The kernel refuses the rest of a file: at once, in a document, in a shard."""
    done = cli.server().run(script(NO_ROOM, tmp_path, limit))
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert check_rows(tmp_path, "latents") == set("abcd")
    assert not list((tmp_path / ".partial").iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_says_so_and_what_was_committed_stays(tiny_disk):
    cache = tiny_disk / "cache"
    keys = [f"{i:064x}" for i in range(40)]
    with pytest.raises(StoreError, match=r"No space left.*--cache"):
        write_rows(cache, "latents", keys, rows=2)
    valid = check_rows(cache, "latents")
    assert 4 <= len(valid) < 40
    assert len(valid) % 2 == 0
    assert not list((cache / ".partial").iterdir())
