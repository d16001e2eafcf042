"""Writes docs/configuration.md from the config models, as `make docs`; a test finds it stale."""

from pathlib import Path

from wanlora.config import COMMANDS, Setting, Settings, settings_of
from wanlora.config.describe import default_of, type_of

HEAD = """# Configuration

Made from the models in `stages/wanlora/config/` by `make docs`; edit those.

Every setting can be given as `--set NAME=VALUE` (the value is TOML: `--set lora.rank=16`, `--set
lora.targets='["to_q", "to_v"]'`) or in a file, `--config run.toml`. The ones with a flag
are typed every day. Later wins: default, file, `--set`, flag.
"""


def reference() -> str:
    """Write the whole page as Markdown."""
    parts = [HEAD]
    for command, model in COMMANDS.items():
        parts.append(f"## wanlora {command}\n\n{model.__doc__}\n\n" + _table(model))
    return "\n".join(parts)


def _table(model: type[Settings]) -> str:
    rows = ["| setting | flag | type | default | |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *_rows(model)]) + "\n"


def _rows(model: type[Settings]) -> list[str]:
    rows = []
    for setting in settings_of(model):
        field = setting.field
        cells = (
            f"`{setting.name}`",
            _flag(setting),
            type_of(field),
            "required" if field.is_required() else f"`{default_of(field)}`",
            field.description or "",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _flag(setting: Setting) -> str:
    if setting.flag and setting.flag.argument:
        return "positional"
    return ", ".join(f"`{name}`" for name in setting.options)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(reference())
