"""Text from outside: encodings, halves of characters, Git LFS pointers, prompt files."""

import json
from pathlib import Path

import pytest

from tests.support import videos
from tests.support.clips import clip
from wanlora.adapters.file import read_adapter
from wanlora.commands.prepare.check import check
from wanlora.commands.sample.prompts import read_prompts
from wanlora.core.fingerprint import sha256_text
from wanlora.core.prompts import clean_prompt, prompt_key
from wanlora.core.text import LFS_HEAD, decode_utf8, parse_json, shorten, without_surrogates
from wanlora.data.clip_frames import load_clip
from wanlora.data.columns import is_caption
from wanlora.errors import AdapterError, ConfigError, ManifestError, MediaError, ModelError
from wanlora.files import write_text
from wanlora.wan.model_folder import resolve

POINTER = LFS_HEAD + b"v1\noid sha256:" + b"ab" * 32 + b"\nsize 123456\n"


@pytest.mark.parametrize("text", ["a\ud83d", "\udcff", "\ud83d\ude00", "größer", "走", ""])
def test_any_text_is_written_hashed_and_cleaned(tmp_path, text):
    write_text(tmp_path / "a.txt", text)
    (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert len(sha256_text(text)) == 64
    assert without_surrogates(text).encode().decode() == without_surrogates(text)
    assert prompt_key(without_surrogates(text)) == prompt_key(text)  # as ftfy repairs it


def test_json_escapes_of_halves_survive_a_file(tmp_path):
    write_text(tmp_path / "a.json", json.dumps({"prompt": "a\ud83d"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"prompt": "a\ud83d"}


@pytest.mark.parametrize("text", ["NaN", "[1e999]", "-Infinity", "[" * 100_000, "9" * 5000, "{"])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


@pytest.mark.parametrize("text", ["&nbsp;", "&amp;nbsp;", " \u200b ", "\ufeff", "&#8203;", ""])
def test_a_caption_without_a_visible_character_is_none(text):
    assert not is_caption(text.strip())


@pytest.mark.parametrize("text", ["a", "走", "🚶", "&amp;", "-", "\U0001fae8"])
def test_other_captions_are_captions(text):
    assert is_caption(text)


def test_cleaning_is_not_idempotent_so_a_key_is_of_the_text_as_given():
    text = "< &amp;amp;amp;amp; b"
    cleaned = clean_prompt(text)
    assert clean_prompt(cleaned) != cleaned
    assert prompt_key(text) != prompt_key(cleaned)


def test_a_prompt_that_0_1_0_encoded_cleaned_twice_has_another_key_and_the_others_have_theirs():
    text = "< &amp;amp;amp;amp; b"
    assert clean_prompt(clean_prompt(text)) != clean_prompt(text)
    assert prompt_key(text) != sha256_text(clean_prompt(text))
    for other in ("", "a &amp; b", "  a\n b "):
        assert prompt_key(other) == sha256_text(clean_prompt(other))


def test_a_long_text_is_cut_with_its_length():
    assert shorten("a" * 9000) == f"{'a' * 80!r}... (9,000 characters)"
    assert shorten("a man") == "'a man'"


@pytest.mark.parametrize(
    ("data", "likely"),
    [("größer".encode("cp1252"), "Windows-1252"), ("größer".encode("utf-16"), "UTF-16"),
     (POINTER, "git lfs pull")],
)  # fmt: skip
def test_another_encoding_is_named(data, likely):
    with pytest.raises(ValueError, match=likely):
        decode_utf8(data)


# --- Git LFS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("a.mp4", "video"), ("a.npz", "npz"), ("a.png", "images")]
)
def test_a_pointer_in_place_of_a_source_is_recognized(tmp_path, name, kind):
    path = tmp_path / name
    path.write_bytes(POINTER)
    frames = 1 if kind == "images" else 17
    with pytest.raises(MediaError, match="git lfs pull") as refusal:
        load_clip(clip(path=path, kind=kind, num_frames=frames))
    assert refusal.value.code == "unreadable"
    outcome = check(path, lambda: None, detector="none")
    assert isinstance(outcome, MediaError)
    assert "git lfs pull" in str(outcome)


def test_a_pointer_in_place_of_captions_is_refused(tmp_path):
    from wanlora.data.captions import find

    for name in ("a", "b"):
        videos.write_npz(tmp_path / f"{name}.npz")
        (tmp_path / f"{name}.txt").write_text("x")
    (tmp_path / "a.txt").write_bytes(POINTER)
    assert "git lfs pull" in find([tmp_path], None).failures[0].message
    (tmp_path / "metadata.csv").write_bytes(POINTER)
    with pytest.raises(ManifestError, match="git lfs pull"):
        find([tmp_path], None)


def test_a_pointer_in_place_of_weights_or_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(POINTER)
    with pytest.raises(AdapterError, match="git lfs pull"):
        read_adapter(tmp_path / "adapter.safetensors")
    part = tmp_path / "model" / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    (part / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match="git lfs pull"):
        resolve(str(tmp_path / "model"), ("transformer",))


# --- prompt files --------------------------------------------------------------------------------


def prompts_in(path: Path, text: str) -> list[tuple[str, int | None]]:
    path.write_text(text, encoding="utf-8")
    return [(line.prompt, line.seed) for line in read_prompts(path)]


def test_comments_and_blank_lines_are_skipped(tmp_path):
    text = "# my prompts\n\n a dog \n  # another\n#hashtag\na cat #1 -- with a dash\u2028and more\n"
    assert prompts_in(tmp_path / "a.txt", text) == [
        ("a dog", None), ("a cat #1 -- with a dash\u2028and more", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["a dog --n ugly", "a dog --w 832 --h 480", "--d 42", "x --ar 1:2"]
)
def test_options_of_other_tools_are_refused_by_line(tmp_path, line):
    with pytest.raises(ConfigError, match="line 3") as refusal:
        prompts_in(tmp_path / "a.txt", f"a dog\n# x\n{line}\n")
    for accepted in ("--negative-prompt", "--width", '"seed"'):
        assert accepted in str(refusal.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_and_a_json_list_are_read(tmp_path, name):
    rows = [{"prompt": "a dog --n", "seed": 3}, {"prompt": "# half \ud83d"}]
    wanted = [("a dog --n", 3), ("# half \ufffd", None)]
    assert prompts_in(tmp_path / name, "\n".join(map(json.dumps, rows))) == wanted
    if name == "a.json":
        assert prompts_in(tmp_path / name, json.dumps(rows, indent=1)) == wanted


@pytest.mark.parametrize(
    "line",
    ["{", "3", '{"prompt": 3}', '{"prompt": "x", "seed": true}', '{"seed": 1e999}', "[" * 9999],
)
def test_a_line_that_is_not_a_prompt_is_refused_by_number(tmp_path, line):
    with pytest.raises(ConfigError, match="line 2"):
        prompts_in(tmp_path / "a.jsonl", f'{{"prompt": "x"}}\n{line}\n')


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("data", ["größer".encode("cp1252"), "größer".encode("utf-16"), b"", b"["])
def test_a_file_without_prompts_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    if (name, data) != ("a.txt", b"["):
        with pytest.raises(ConfigError, match=r"a\.(txt|json)"):
            read_prompts(tmp_path / name)
