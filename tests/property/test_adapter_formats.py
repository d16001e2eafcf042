"""An adapter goes through any formats in any order: its expert, scales and updates stay."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.adapters import modules, pairs, tensors_of
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.formats import DTYPES, FORMATS, encode
from wanlora.adapters.updates import relative_error


@settings(max_examples=40)
@given(
    forms=st.lists(st.sampled_from(list(FORMATS)), min_size=1, max_size=5),
    expert=st.sampled_from(["high", "low", None]),
    rank=st.integers(1, 5),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    seed=st.integers(0, 999),
)
def test_formats_keep_the_expert_and_every_update(forms, expert, rank, alpha, rslora, seed):
    shape = LoraShape(rank, alpha, rslora=rslora)
    facts = {"model": "x", "variant": "t2v-a14b"} | ({"expert": expert} if expert else {})
    with TemporaryDirectory() as home:
        tensors = tensors_of(pairs(modules(), rank, seed))
        adapter = first = read_adapter(
            save_adapter(Path(home, "a.safetensors"), tensors, shape, provenance=facts)
        )
        for number, form in enumerate(forms):
            files = encode(
                adapter, form, DTYPES["float32"], title="x", provenance=adapter.provenance
            )
            folder = Path(home, str(number))
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            adapter = read_adapter(folder)
            assert (adapter.expert, adapter.format) == (expert, form)
    found, expected = adapter.updates(), first.updates()
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in found) < 1e-6
