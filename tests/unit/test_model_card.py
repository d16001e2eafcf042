"""The model card: YAML that the hub accepts, and code that runs."""

import ast
import re
import shlex
import subprocess

import pytest
from huggingface_hub import ModelCard

from wanlora.commands.train.model_card import model_card, updated_card
from wanlora.runs.git import git_commit
from wanlora.runs.run_folder import newest_pictures
from wanlora.wan.model_folder import public_name

HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FACTS = {
    "name": "clapping", "model": HUB, "variant": "t2v-1.3b", "step": 500, "end_step": 1000,
    "seed": 3, "trainable_parameters": 43_700_000, "num_clips": 24,
    "activities": {"walking": 9, "clapping": 15}, "view_sha256": "ab" * 32,
    "settings": {"lora.rank": 32, "learning_rate": 1e-4}, "loss": 0.12345,
    "best": {"step": 400, "mean": 0.1, "base_mean": 0.125, "difference": -0.025,
             "ci95": [-0.03, -0.02], "num_clips": 16, "num_groups": 4},
    "prompts": ["A person's \"hands\" clapping", "two"], "guidance_scales": [5.0],
    "fps": 16.0, "num_frames": 81, "height": 480,
    "provenance": {"wanlora": "0.1.0", "torch": "2.13.0", "git_commit": None},
}  # fmt: skip


def code(card: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def test_the_hub_reads_its_front_matter():
    data = ModelCard(model_card(FACTS)).data
    assert data.base_model == HUB
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-video"
    assert "lora" in data.tags


@pytest.mark.parametrize("model", ["micro", "/models/wan", "models/wan/1.3b"])
def test_a_folder_is_no_base_model_on_the_hub(model):
    card = model_card({"name": "a", "model": model})
    assert ModelCard(card).data.base_model is None
    assert f"`{model}`" in card


def test_an_experts_card_loads_it_into_its_transformer_and_names_its_range():
    expert = {"variant": "t2v-a14b", "guidance_scales": [4.0, 3.0]}
    high = model_card(FACTS | expert | {"expert": "high", "sigmas": (0.875, 1.0)})
    low = model_card(FACTS | expert | {"expert": "low", "sigmas": (0.0, 0.875)})
    assert "load_into_transformer_2=True" in code(low, "python")
    assert "load_into_transformer_2" not in code(high, "python")
    for card, names in ((high, ("high", "transformer", "0.875 to 1")),
                        (low, ("low", "transformer_2", "0 to 0.875"))):  # fmt: skip
        ast.parse(code(card, "python"))
        assert "guidance_scale=4.0, guidance_scale_2=3.0" in card
        assert all(name in card for name in names)
        assert f"| expert | {names[0]} |" in card


@pytest.mark.parametrize("reads_image", [False, True])
def test_the_card_of_an_image_to_video_adapter_starts_from_an_image(reads_image):
    card = model_card(FACTS | {"is_i2v": True, "reads_image": reads_image, "width": 832})
    assert ModelCard(card).data.pipeline_tag == "image-to-video"
    assert "image-to-video" in ModelCard(card).data.tags
    python = code(card, "python")
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    [call] = [node for node in calls if ast.unparse(node.func) == "pipeline"]
    assert ast.unparse(call.args[0]) == "image"
    assert {"prompt", "num_frames", "height", "width"} <= {word.arg for word in call.keywords}
    assert "image.png" in python
    assert ".resize((832, 480))" in python
    assert "WanImageToVideoPipeline.from_pretrained" in python
    assert ("image_encoder=image_encoder" in python) == reads_image
    words = shlex.split(code(card, "sh"))
    assert words[words.index("--image") + 1] == "image.png"
    assert "--image" not in code(model_card(FACTS), "sh")


def test_its_snippets_survive_any_prompt():
    card = model_card(FACTS)
    calls = [
        node for node in ast.walk(ast.parse(code(card, "python"))) if isinstance(node, ast.Call)
    ]
    constants = [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
    assert FACTS["prompts"][0] in constants
    assert shlex.split(code(card, "sh"))[-1] == FACTS["prompts"][0]
    assert "num_frames=81, height=480, guidance_scale=5.0" in card
    assert "fps=16)" in card
    assert "fps=24)" in model_card(FACTS | {"fps": 24.0})
    assert "- two" in card
    keywords = {word.arg: word.value for call in calls for word in call.keywords}
    assert keywords["weight_name"].value == "pytorch_lora_weights.safetensors"


def test_it_has_the_base_models_license_and_the_file_for_comfyui():
    card = model_card(FACTS)
    assert ModelCard(card).data.license == "apache-2.0"
    assert "wanlora export --adapter FOLDER --format comfyui" in card
    assert ModelCard(model_card(FACTS | {"model": "somebody/finetune"})).data.license is None


def test_its_pictures_are_those_of_the_newest_previews(tmp_path):
    for step in (5, 10):
        (tmp_path / f"previews/step-{step:06d}").mkdir(parents=True)
        (tmp_path / f"previews/step-{step:06d}/00.gif").touch()
    assert newest_pictures(tmp_path) == [tmp_path / "previews/step-000010/00.gif"]
    card = model_card(FACTS | {"previews": ["previews/step-000010/00.gif"]})
    assert "](previews/step-000010/00.gif)" in card


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("micro", "micro"),
        (HUB, HUB),
        ("/home/me/models/wan-mine", "wan-mine"),
        ("~/models/wan-mine/", "wan-mine"),
        ("/x/hub/models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/snapshots/0fad780a", HUB),
    ],
)
def test_a_models_name_has_no_path_of_this_machine(model, shown):
    assert public_name(model) == shown


def test_it_says_what_was_trained_on_what_and_how_well():
    card = model_card(FACTS)
    assert "500 of 1,000" in card
    assert "clapping 15, walking 9" in card
    assert f"`{'ab' * 32}`" in card
    assert "43.7 M parameters" in card
    assert "-20.00 %" in card
    assert re.search(r"\b16 clips .*\b4 source groups", card)
    assert "0.1235" in card
    assert "git_commit" not in card  # not known is left out


def test_a_card_needs_little():
    card = model_card({"name": "a", "model": "micro"})
    assert "## Use" in card
    assert "None" not in card
    assert "## Data" not in card


def test_the_commit_of_a_checkout_and_none_elsewhere(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


OLD, NEW = model_card(FACTS), model_card(FACTS | {"step": 1000})


@pytest.mark.parametrize(
    ("edited", "by"),
    [
        ("# My best one", "# clapping"),
        ("license: mit", "license: apache-2.0"),
        ("# clapping\n\nThanks to Ada.", "# clapping"),
        ("the part that training writes -->\n\n## Credits\n", "the part that training writes -->"),
    ],
)
def test_edits_outside_of_the_generated_part_survive(edited, by):
    mine = OLD.replace(by, edited, 1)
    assert mine != OLD
    card = updated_card(mine, NEW)
    assert card == NEW.replace(by, edited, 1)
    assert updated_card(card, OLD) == mine  # and again


def test_other_line_ends_are_not_an_edit():
    card = updated_card(OLD.replace("\n", "\r\n"), NEW)
    assert card is not None
    assert card.startswith("---\r\n")
    assert "\n| steps | 1000 |" in card


@pytest.mark.parametrize(
    "mine",
    [
        OLD.replace("## Use", "## How to use"),
        OLD.replace("LoRA", "lora", 1),
        "".join(line for line in OLD.splitlines(keepends=True) if "<!--" not in line),
        OLD + OLD,
        "my own card",
        "",
    ],
)
def test_an_edited_generated_part_is_left_alone(mine):
    assert updated_card(mine, NEW) is None
