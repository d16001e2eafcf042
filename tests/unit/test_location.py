"""Paths, URLs and file names from user data."""

from pathlib import Path
from typing import get_args

import pytest

from wanlora.adapters.header import split_scale
from wanlora.config import COMMANDS, InspectConfig, TrainConfig, load
from wanlora.config.settings import _kinds
from wanlora.core.location import Url, parse
from wanlora.core.text import file_stem
from wanlora.errors import AdapterError, ConfigError


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "{home}"),
        ("~/cache", "{home}/cache"),
        ("./~/cache", f"{Path.cwd()}/~/cache"),
        ("a:b/c", "a:b/c"),
        ("file:///data/my%20cache", "/data/my cache"),
        ("s3://bucket/a/", Url("s3://bucket/a")),
        ("memory://", Url("memory://")),
    ],
)
def test_a_path_or_url_is_read(text, expected, tmp_path):
    wanted = Path(expected.format(home=tmp_path)) if isinstance(expected, str) else expected
    assert parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("s3:/bucket/a", "s3://bucket/a"),
        ("s3:///bucket/a", "s3://bucket/a"),
        ("gs:/bucket", "gs://bucket"),
        ("file:/data", "file:///data"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("s3://", "s3://bucket/prefix"),
    ],
)
def test_a_url_that_would_become_a_folder_is_refused_with_its_right_spelling(text, right):
    with pytest.raises(ConfigError, match=right):
        load(TrainConfig, flags={"cache": text})


def _path_settings():
    for command, config in COMMANDS.items():
        for name, field in config.model_fields.items():
            if Path in _kinds(field.annotation):
                yield pytest.param(config, name, field, id=f"{command}-{name}")


@pytest.mark.parametrize(("config", "name", "field"), list(_path_settings()))
def test_every_path_of_every_command_is_read_alike(config, name, field, tmp_path):
    many = any(getattr(part, "__origin__", part) is tuple or part is Ellipsis
               for part in (field.annotation, *get_args(field.annotation)))  # fmt: skip

    def read(value):
        found = config._read_paths([value] if many else value, _Info(name))
        return found[0] if many else found

    if Url in _kinds(field.annotation):
        assert parse("~/x") == tmp_path / "x"
        return
    assert read("~/x") == tmp_path / "x"
    with pytest.raises(ValueError, match="s3:/bucket"):
        read("s3://bucket".replace("//", "/"))


class _Info:
    def __init__(self, field_name):
        self.field_name = field_name


def test_a_flag_a_file_and_an_adapter_with_a_scale_are_read_alike(tmp_path):
    assert load(TrainConfig, flags={"output_dir": "~/run"}).output_dir == tmp_path / "run"
    assert load(TrainConfig, flags={"manifest": ["~/a.jsonl"]}).manifest == (tmp_path / "a.jsonl",)
    (tmp_path / "c.toml").write_text('path = "~/cache"\n')
    assert load(InspectConfig, file=Path("~/c.toml")).path == tmp_path / "cache"
    assert split_scale("~/run=0.5") == (tmp_path / "run", 0.5)
    with pytest.raises(ConfigError, match="no-such-user"):
        load(TrainConfig, flags={"output_dir": "~no-such-user/run"})
    with pytest.raises(AdapterError, match="s3://bucket"):
        split_scale("s3://bucket/run=0.5")


@pytest.mark.parametrize(
    "text",
    ["../../etc/passwd", "..", ".hidden", "a/b", "a\\b", "", "x" * 1000, "日" * 300, "\ud83d",
     "a\0b", "-rf", "a b"],
)  # fmt: skip
def test_an_id_becomes_one_part_of_a_path(text, tmp_path):
    name = file_stem(text)
    path = tmp_path / f"{name}-81x480x832-16fps.npz"
    assert path.resolve().parent == tmp_path.resolve()
    assert not name.startswith((".", "-"))
    path.touch()
    assert file_stem(text + "x") != name


def test_an_ordinary_id_stays():
    assert file_stem("walk-1f2e3d4c-000000") == "walk-1f2e3d4c-000000"
    assert file_stem("a b") != file_stem("a-b")
