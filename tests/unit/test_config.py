import pytest

from wanlora.config import PrepareConfig, TrainConfig, command_line, load
from wanlora.errors import ConfigError


def test_flag_beats_set_beats_file_beats_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\nsave_steps = 10\nbatch_size = 3\n[lora]\nrank = 4\nalpha = 8.0\n")
    config = load(
        TrainConfig, file=file, sets=["save_steps=20", "lora.rank=16"], flags={"seed": "5"}
    )
    assert (config.seed, config.save_steps, config.batch_size) == (5, 20, 3)
    assert (config.lora.rank, config.lora.alpha) == (16, 8.0)
    assert config.num_epochs == 10


def test_an_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"lora\.rnak.*lora\.rank"):
        load(TrainConfig, sets=["lora.rnak=4"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": "fast"}, r"learning_rate: .*found 'fast'"),
        ({"batch_size": "0"}, r"batch_size: .*greater than or equal to 1"),
        ({"device": "tpu"}, r"device: "),
    ],
)
def test_a_bad_value_names_its_setting_and_what_was_found(flags, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, flags=flags)


def test_eighty_frames_are_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="use 77 or 81"):
        load(PrepareConfig, flags={"sources": ["videos"], "num_frames": "80"})


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no configuration file"), ("seed = ", "is not TOML")]
)
def test_a_missing_or_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "x.toml"
    if content:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, file=file)


def test_a_set_without_a_value_says_how_to_write_it():
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        load(TrainConfig, sets=["lora.rank"])


def test_a_command_has_whole_numbers_without_a_fraction():
    config = TrainConfig(num_epochs=3, learning_rate=1e-5, optimizer={"max_grad_norm": 2})
    words = command_line("train", config).split()
    assert words[words.index("--num-epochs") + 1] == "3"
    assert words[words.index("--learning-rate") + 1] == "1e-05"
    assert words[words.index("--set") + 1] == "optimizer.max_grad_norm=2"
