"""The first run with a hub id: only what is needed, only where it fits, and offline with a hint."""

import importlib
import logging
import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub.errors import HfHubHTTPError

from tests.support.experts import pair_folder
from tests.support.hub import serving
from wanlora.errors import ModelError
from wanlora.wan import hub, model_folder


@pytest.fixture
def hub_home(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def first_run(code, address, home):
    """Run code in a process that has downloaded nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_ENDPOINT": address, "HF_HOME": str(home), "PATH": "", "HOME": "/nowhere",
             "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


ONE_EXPERT = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from wanlora.commands.train.base_model import find_base
from wanlora.errors import ModelError
for expert in (None, "low"):
    try:
        print(find_base("org/model", expert).part.subfolder)
    except ModelError as error:
        print(error)
"""


def test_of_a_model_with_two_transformers_only_the_experts_is_downloaded(tmp_path):
    pair = pair_folder(tmp_path / "model")
    with serving(pair) as (address, downloaded):
        done = first_run(ONE_EXPERT, address, tmp_path)
    refused, subfolder = done.stdout.splitlines()
    assert "--expert low" in refused
    assert subfolder == "transformer_2"
    assert len(re.findall(r"downloading .*\(transformer_2 [^,]*\)", done.stderr)) == 1
    weights = [name for name in downloaded if name.endswith(".safetensors")]
    assert {name.partition("/")[0] for name in weights} == {"transformer_2"}
    # A file with the content of another one is not sent again.
    assert {name for name in downloaded if name not in weights} <= {
        "model_index.json", "transformer/config.json", "transformer_2/config.json",
    }  # fmt: skip


SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from wanlora.wan.model_folder import ENCODERS, TRANSFORMER, resolve
for parts in (TRANSFORMER, ENCODERS, ENCODERS):
    folder = resolve("org/model", parts)
    print(json.dumps(sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))))
"""


def test_only_the_needed_parts_are_downloaded_once_and_their_size_is_said(
    micro_folder, tmp_path
):  # fmt: skip
    with serving(micro_folder) as (address, downloaded):
        done = first_run(SCRIPT, address, tmp_path)
    first, second, third = done.stdout.splitlines()
    assert "vae" not in first
    assert "text_encoder" not in first
    assert second == third
    assert len(downloaded) == len(set(downloaded))
    assert len(re.findall(r"downloading \d[\d.]* [kMG]?B of", done.stderr)) == 2
    assert re.search(r"transformer \d[\d.]* [kMG]?B", done.stderr)
    assert not [name for name in downloaded if name.startswith("scheduler/")]


def planned(num_bytes):
    """What the hub's dry run returns."""
    from huggingface_hub import DryRunFileInfo

    def answer(model, *, allow_patterns, dry_run):
        assert dry_run
        return [
            DryRunFileInfo("c", num_bytes, "vae/a.safetensors", "x", False, True),
            DryRunFileInfo("c", 10**12, "vae/there.safetensors", "x", True, False),
        ]

    return answer


def test_a_disk_that_cannot_hold_the_download_is_refused_before_it(monkeypatch, hub_home, caplog):
    import huggingface_hub

    free = shutil.disk_usage("/").free
    monkeypatch.setattr(huggingface_hub, "snapshot_download", planned(free))
    with pytest.raises(ModelError, match=r" GB .*expected 1\.1 .*HF_HOME"):
        hub.check_room("org/model", ["vae/*"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", planned(2_500_000_000))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3e9))
    with caplog.at_level(logging.INFO, logger="wanlora"):
        assert hub.check_room("org/model", ["vae/*"]) == 2_500_000_000
    assert "downloading 2.5 GB of org/model (vae 2.5 GB)" in caplog.text


def test_offline_the_line_to_run_elsewhere_is_given(monkeypatch, hub_home):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hf download org/model --include model_index.json 'vae/"):
        model_folder.resolve("org/model", model_folder.ENCODERS)


@pytest.mark.parametrize("failure", ["timeout", "xet"])
def test_a_download_that_stops_half_way_says_that_the_same_command_goes_on(
    monkeypatch, hub_home, failure
):
    import huggingface_hub

    # The hub's own HTTP client: httpx2 since huggingface_hub 2, httpx before.
    client = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

    def stopping(model, *, allow_patterns, dry_run=False):
        raise client.ReadTimeout("timed out") if failure == "timeout" else RuntimeError("CAS")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stopping)
    with pytest.raises(ModelError, match=r"org/model .*same command"):
        model_folder.resolve("org/model", model_folder.ENCODERS)
