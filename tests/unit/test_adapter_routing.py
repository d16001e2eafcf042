"""Each adapter goes to the expert of its header or flag, or is refused: every combination."""

from itertools import product
from pathlib import Path

import pytest

from wanlora.adapters.header import AdapterHeader
from wanlora.adapters.routing import GivenAdapter, describe, flag_of, route
from wanlora.errors import AdapterError
from wanlora.wan.variants import VARIANTS

PAIR, ONE = VARIANTS["micro-a14b"], VARIANTS["micro"]
HEADERS = {
    "high": {"wanlora.expert": "high", "wanlora.variant": "micro-a14b"},
    "low": {"wanlora.expert": "low", "wanlora.variant": "micro-a14b"},
    "one": {"wanlora.variant": "micro"},
    "larger pair": {"wanlora.expert": "high", "wanlora.variant": "t2v-a14b"},
    "other tool": {},
    "musubi": {"modelspec.timestep_range": "0,875"},
    "person_low_noise": {},
}


def given(header: str, flag: str | None = None, scale: float = 1.0) -> GivenAdapter:
    path = Path(f"{header.replace(' ', '-')}.safetensors")
    recorded = HEADERS[header]
    found = AdapterHeader(path, {}, recorded, recorded.get("wanlora.expert"))
    return GivenAdapter(found, scale, flag)


# Expert that runs it, or the words that its refusal must have, by header and flag.
IN_A_PAIR = {
    ("high", None): "high",
    ("high", "high"): "high",
    ("high", "low"): ("--adapter-low high.safetensors", "--adapter-high", "swapped"),
    ("low", None): "low",
    ("low", "high"): ("--adapter-high low.safetensors", "--adapter-low", "swapped"),
    ("low", "low"): "low",
    ("one", None): ("--adapter one.safetensors", "micro", "--model"),
    ("one", "high"): ("--adapter-high one.safetensors", "--model"),
    ("one", "low"): ("--adapter-low one.safetensors", "--model"),
    ("larger pair", None): ("t2v-a14b", "--model"),
    ("larger pair", "high"): ("t2v-a14b", "--model"),
    ("larger pair", "low"): ("t2v-a14b", "--model"),
    ("other tool", None): ("--adapter-high other-tool.safetensors", "--adapter-low other-tool"),
    ("other tool", "high"): "high",
    ("other tool", "low"): "low",
    ("musubi", None): ("record", "--adapter-low musubi.safetensors"),
    ("musubi", "high"): ("--adapter-high musubi.safetensors", "--adapter-low", "--expert high"),
    ("musubi", "low"): "low",
    ("person_low_noise", None): ("record", "--adapter-low person_low_noise.safetensors"),
    ("person_low_noise", "high"): ("--adapter-low", "swapped", "--expert high"),
    ("person_low_noise", "low"): "low",
}


def test_the_table_has_every_combination():
    assert set(IN_A_PAIR) == set(product(HEADERS, (None, "high", "low")))


@pytest.mark.parametrize(("case", "expected"), IN_A_PAIR.items(), ids=lambda case: f"{case}")
def test_an_adapter_of_a_pair_is_routed_by_its_header_or_its_flag(case, expected):
    if isinstance(expected, str):
        assert route([given(*case)], PAIR, model="pair") == [expected]
        return
    with pytest.raises(AdapterError) as refused:
        route([given(*case)], PAIR, model="pair")
    assert all(word in str(refused.value) for word in expected), refused.value


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("flag", [None, "high", "low"])
def test_a_model_with_one_transformer_takes_only_adapters_of_such_a_model(header, flag):
    item = given(header, flag)
    if header not in ("high", "low", "larger pair") and flag is None:
        assert route([item], ONE, model="micro") == [None]
        return
    with pytest.raises(AdapterError) as refused:
        route([item], ONE, model="micro")
    assert item.text in str(refused.value)
    assert "--model" in str(refused.value)


def test_an_adapter_of_a_transformer_of_another_shape_is_refused_by_name():
    with pytest.raises(AdapterError, match=r"one\.safetensors.*micro.*t2v-1\.3b.*--model"):
        route([given("one")], VARIANTS["t2v-1.3b"], model="x")


def test_two_adapters_of_one_expert_are_refused_unless_its_flag_is_repeated():
    for pair in (("high", None), ("high", None)), (("high", None), ("other tool", "high")):
        with pytest.raises(AdapterError, match=r"2 adapters.*high-noise.*--adapter-high"):
            route([given(*item) for item in pair], PAIR, model="pair")
    added_up = [given("high", "high"), given("other tool", "high"), given("low")]
    assert route(added_up, PAIR, model="pair") == ["high", "high", "low"]


def test_any_order_and_one_expert_alone_are_fine_and_the_other_one_is_named():
    both = [given("low", scale=0.5), given("high")]
    assert route(both, PAIR, model="pair") == ["low", "high"]
    text = describe(both, ["low", "high"])
    assert "high-noise expert: high.safetensors at 1" in text
    assert "low-noise expert: low.safetensors at 0.5" in text
    alone = describe(both[1:], ["high"])
    assert "low-noise expert" in alone
    assert "low.safetensors" not in alone
    assert route([], PAIR, model="pair") == []


def test_flags_are_those_of_the_command_line():
    from wanlora.config import SampleConfig, settings_of

    options = {name for setting in settings_of(SampleConfig) for name in setting.options}
    assert {flag_of(None), flag_of("high"), flag_of("low")} <= options
