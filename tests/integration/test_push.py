"""`wanlora export --push`: adapter, card and pictures go to the hub, and nothing else."""

import json

import pytest
from safetensors import safe_open

from tests.support import adapters, cli
from tests.support.hub import receiving
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.commands.train.model_card import model_card

MODULES = {f"blocks.{n}.attn1.to_q": (128, 128) for n in range(5)}


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder as it is after training, with a base at a path of this machine."""
    import torch

    folder, model = tmp_path / "run", str(tmp_path / "models" / "wan-mine")
    tensors = {f"{n}.lora_A.weight": torch.randn(2, i) for n, (_, i) in MODULES.items()}
    tensors |= {f"{n}.lora_B.weight": torch.randn(o, 2) for n, (o, _) in MODULES.items()}
    shape = LoraShape(2, 4.0, list(MODULES))
    for part in ("", "best", "checkpoints/step-000010"):
        save_adapter(folder / part, tensors, shape, provenance={"model": model})
    (folder / "checkpoints/step-000010/optimizer.safetensors").write_bytes(b"moments")
    (folder / "config.toml").write_text(f'output_dir = "{folder}"\n')
    (folder / "metrics.jsonl").write_text("{}\n")
    # A card of an older release could hold the path of the base.
    card = model_card({"name": "run", "model": "Wan-AI/x"}).replace("Wan-AI/x", model)
    (folder / "README.md").write_text(card + f"\n{folder}\n")
    for step in (5, 10):
        (folder / f"previews/step-{step:06d}").mkdir(parents=True)
        for name in ("00.gif", "00.safetensors"):
            (folder / f"previews/step-{step:06d}" / name).write_bytes(f"{step}".encode())
    return folder


def push(run_dir, monkeypatch, *more, status=200):
    from huggingface_hub import constants

    with receiving(status=status) as (address, uploaded, made):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        done = cli.invoke("export", "--adapter", run_dir, "--push", "user/run", "--json", *more)
    return done, uploaded, made


def test_the_adapter_the_card_and_the_newest_pictures_are_uploaded_without_paths(
    run_dir, tmp_path, monkeypatch
):
    done, uploaded, made = push(run_dir, monkeypatch, "--private")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["output"].endswith("user/run")
    assert made[0]["name"] == "run"
    assert "private" in (made[0].get("visibility"), *made[0])
    assert sorted(uploaded) == [
        "README.md", "previews/step-000010/00.gif", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert not any(str(tmp_path).encode() in data for data in uploaded.values())
    card = uploaded["README.md"].decode()
    assert 'load_lora_weights("user/run", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "wan-mine" in card
    file = tmp_path / "downloaded.safetensors"
    file.write_bytes(uploaded["pytorch_lora_weights.safetensors"])
    found, expected = read_adapter(file).tensors, read_adapter(run_dir).tensors
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_pushed_is_refused(run_dir, monkeypatch):
    done, uploaded, _ = push(run_dir, monkeypatch, status=403)
    assert done.exit_code == 1
    assert "hf auth login" in done.output
    (run_dir / "README.md").unlink()
    done, uploaded, made = push(run_dir, monkeypatch)
    assert done.exit_code == 1
    assert "README.md" in done.output
    assert not uploaded
    assert not made


@pytest.mark.parametrize(
    "more",
    [
        ("--format", "comfyui"),
        ("--output", "x.safetensors"),
        ("--overwrite",),
        ("--model", "micro"),
    ],
)
def test_flags_that_a_push_does_not_use_are_refused(run_dir, more):
    said = cli.refuses(
        "export", "--adapter", run_dir, "--push", "user/run", *more, exit_code=2
    )  # fmt: skip
    assert more[0] in said


def test_every_export_has_the_name_of_its_base_without_the_path(run_dir, tmp_path):
    for form in ("comfyui", "peft", "diffusers"):
        output = tmp_path / "out" / (form if form == "peft" else f"{form}.safetensors")
        done = cli.invoke("export", "--adapter", run_dir, "--format", form, "--output", output)
        assert done.exit_code == 0, done.output
        files = [path for path in output.rglob("*") if path.is_file()] or [output]
        for file in files:
            assert str(tmp_path).encode() not in file.read_bytes()
        with safe_open(next(f for f in files if f.suffix == ".safetensors"), "pt") as opened:
            assert opened.metadata()["wanlora.model"] == "wan-mine"
    assert adapters.updates_by_diffusers(tmp_path / "out" / "diffusers.safetensors")
