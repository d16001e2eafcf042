"""Clients that know nothing of this project read the store, equal to our own reader."""

import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from tests.support.stores import (
    FINGERPRINT,
    build_store,
    open_rows,
    open_store,
    row_of,
    segment_writer,
    segments_of,
)
from wanlora.core.buckets import Bucket
from wanlora.store.reader import StoreReader
from wanlora.store.schema import KINDS

DOC = Path(__file__).parents[2] / "docs" / "store-format.md"
ARRAYS = {
    "latents": "latent", "text": "embedding", "cond_latents": "cond_latent",
    "clip_vision": "image_embedding",
}  # fmt: skip
BUCKETS = (Bucket(17, 64, 64), Bucket(9, 32, 48))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "cache"
    build_store(folder, num_clips=7, buckets=BUCKETS, rows=3, kinds=tuple(KINDS))
    return folder


NUM_ROWS = 4 * 7
"""Seven rows of each kind: clips, and prompts."""


def segments(cache: Path) -> dict[str, tuple]:
    return {
        segment.key.removeprefix("store.zarr/"): (kind, segment)
        for kind in KINDS
        for segment in segments_of(cache, kind, FINGERPRINT[kind])
    }


def test_a_plain_client_lists_every_committed_array_from_the_root(cache):
    found = dict(zarr.open_group(cache / "store.zarr", mode="r").members(max_depth=None))
    listed = {path for path, node in found.items() if isinstance(node, zarr.Array)}
    wanted = set()
    for key, (kind, _) in segments(cache).items():
        names = [ARRAYS[kind], *(["length"] if kind == "text" else [])]
        wanted |= {f"{key}/{name}" for name in names}
    assert listed == wanted
    for path in listed:
        assert len(found[path].metadata.dimension_names) == found[path].ndim


def test_groups_above_segments_do_not_depend_on_the_writer(cache, tmp_path):
    build_store(tmp_path, num_clips=4, buckets=BUCKETS[::-1], rows=1, kinds=tuple(KINDS))
    above = [
        path.relative_to(cache)
        for path in cache.rglob("zarr.json")
        if b'"count"' not in (data := path.read_bytes()) and b'"array"' not in data
    ]
    kinds, sizes = 4, 2 + 2 + 1  # the store, then per kind a group and an encoder; and the shapes
    assert len(above) == 1 + 2 * kinds + sizes
    for path in above:
        assert (tmp_path / path).read_bytes() == (cache / path).read_bytes()


@pytest.mark.parametrize("client", ["zarr", "tensorstore"])
def test_every_row_reads_equal_in_another_client(cache, client):
    def read(path: Path) -> np.ndarray:
        if client == "zarr":
            return zarr.open_array(path, mode="r")[...]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        return tensorstore.open(spec, read=True).result().read().result()

    num_rows = 0
    for key, (kind, segment) in segments(cache).items():
        reader = open_rows(cache, kind)
        values = read(cache / "store.zarr" / key / ARRAYS[kind])
        assert values.dtype == np.float16
        lengths = read(cache / "store.zarr" / key / "length") if kind == "text" else None
        for i, row_key in enumerate(segment.row_keys):
            ours = reader.read(row_key)
            if lengths is None:
                assert np.array_equal(values[i], ours)
            else:
                assert np.array_equal(values[i, : lengths[i]], ours)
                assert not values[i, lengths[i] :].any()
            num_rows += 1
    assert num_rows == NUM_ROWS


ZARRS = """
import sys, json
from pathlib import Path
import numpy as np
import zarr
import zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
out = Path(sys.argv[2])
root = zarr.open_group(sys.argv[1], mode="r")
for path, node in root.members(max_depth=None):
    if isinstance(node, zarr.Array):
        assert "Zarrs" in type(node._async_array.codec_pipeline).__name__
        np.save(out / (path.replace("/", "+") + ".npy"), node[...])
"""


def test_zarrs_reads_every_array_bit_for_bit(cache, tmp_path):
    """In a process of its own: zarrs takes the place of zarr-python's codecs."""
    pytest.importorskip("zarrs", reason="zarrs is not installed")
    done = subprocess.run(
        [sys.executable, "-c", ZARRS, str(cache / "store.zarr"), str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_rows = 0
    for key, (kind, segment) in segments(cache).items():
        folder = key.replace("/", "+")
        reader = open_rows(cache, kind)
        values = np.load(tmp_path / f"{folder}+{ARRAYS[kind]}.npy")
        for i, row_key in enumerate(segment.row_keys):
            ours = reader.read(row_key)
            assert np.array_equal(values[i, : len(ours)], ours)
            assert not values[i, len(ours) :].any()
            num_rows += 1
    assert num_rows == NUM_ROWS


def test_xarray_opens_a_segment_with_its_dimensions(cache):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    for key, (kind, segment) in segments(cache).items():
        data = xarray.open_zarr(cache / "store.zarr" / key, consolidated=False, chunks=None)
        name, dimensions = {
            "latents": ("latent", ("clip", "channel", "frame", "height", "width")),
            "text": ("embedding", ("prompt", "token", "channel")),
            "cond_latents": ("cond_latent", ("clip", "channel", "frame", "height", "width")),
            "clip_vision": ("image_embedding", ("clip", "token", "channel")),
        }[kind]
        assert data[name].dims == dimensions
        ours = open_rows(cache, kind).read(segment.row_keys[0])
        assert np.array_equal(data[name].values[0, : len(ours)], ours)


class Ranges(SimpleHTTPRequestHandler):
    """A plain file server that answers range requests, as web servers do."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        first, end = 0, len(data)
        if wanted:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first = int(low) if low else len(data) - int(high)
            end = int(high) + 1 if low and high else len(data)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - first))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[first:end])

    def log_message(self, *_arguments):
        pass


@pytest.mark.filterwarnings("ignore:.*ObjectStore.*:UserWarning")
def test_an_array_opens_over_plain_http_without_a_listing(cache):
    obstore = pytest.importorskip("obstore.store", reason="obstore is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(cache)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        key, (_, segment) = next(
            item for item in segments(cache).items() if item[1][0] == "latents"
        )
        address = f"http://127.0.0.1:{server.server_port}/store.zarr/{key}/latent"
        store = obstore.from_url(address, client_options={"allow_http": True})
        array = zarr.open_array(zarr.storage.ObjectStore(store, read_only=True), mode="r")
        ours = open_rows(cache, "latents").read(segment.row_keys[0])
        assert np.array_equal(array[0], ours)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_padding_of_prompts_is_not_stored(tmp_path):
    with segment_writer(tmp_path, "text", rows=8) as writer:
        for i in range(8):
            writer.add(f"{i}", np.random.default_rng(i).standard_normal((20, 32)))
    raw = 8 * 20 * 32 * 2
    (shard,) = (path for path in tmp_path.rglob("embedding/c/0/0/0"))
    assert (
        shard.stat().st_size < 1.3 * raw + 8 * 8 * 16 + 8 * 100
    )  # 512/20 = 25 times more if it were


def test_float32_is_kept_as_it_is(tmp_path):
    row = row_of("latents", "k", dtype="float32")
    with segment_writer(tmp_path, "latents", dtype="float32") as writer:
        writer.add("k", row)
    assert np.array_equal(open_rows(tmp_path, "latents").read("k"), row)


def test_normal_equations_of_latent_rgb_add_up_over_segments(tmp_path):
    view = build_store(tmp_path, num_clips=1)
    rng = np.random.default_rng(0)
    pairs = [(rng.random((17, 17)), rng.random((17, 3))) for _ in range(5)]
    with segment_writer(tmp_path, "latents", rows=2) as writer:
        for i, pair in enumerate(pairs):
            writer.add(f"{i}", row_of("latents", f"{i}"), rgb=pair)
    gram, cross = StoreReader.of_view(tmp_path, view).latent_rgb()
    np.testing.assert_allclose(gram, sum(pair[0] for pair in pairs), rtol=1e-12)
    np.testing.assert_allclose(cross, sum(pair[1] for pair in pairs), rtol=1e-12)


def test_the_digest_changes_with_the_index_and_with_nothing_else(cache, tmp_path):
    assert open_store(cache).digest == open_store(cache).digest
    build_store(tmp_path, num_clips=2)
    before = open_store(tmp_path).digest
    with segment_writer(tmp_path, "latents") as writer:
        writer.add("new", row_of("latents", "new"))
    assert open_store(tmp_path).digest != before


def test_the_documentation_reads_the_store_as_printed(cache, monkeypatch):
    monkeypatch.chdir(cache.parent)
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    found = {}
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), found)
        if "first_clip" in found:
            assert found.pop("first_clip").shape in {(16, 5, 8, 8), (16, 3, 4, 6)}
        if "channel_spread" in found:
            assert found.pop("channel_spread").shape == (16,)
        if "first_prompt" in found:
            assert found.pop("first_prompt").shape == (512, 32)
    first = found["view"].clips[0]
    assert np.array_equal(found["latents"], row_of("latents", first.key, bucket=first.bucket))
    assert np.array_equal(found["prompt_embeds"], row_of("text", first.prompts[0]))
