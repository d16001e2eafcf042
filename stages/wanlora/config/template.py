"""`wanlora config`: a commented TOML file of a command's settings, or of a whole job.

Owns: the layout of these files. Every setting is commented out, so a file only contains the changes
of its author. Must not know: torch, or any stage.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from wanlora.config.describe import as_toml, type_of
from wanlora.config.settings import Setting, Settings, settings_of

WIDTH = 96


@dataclass(frozen=True)
class TemplateResult:
    """A TOML file with comments.

    Attributes:
        command: Command that reads it.
        toml: Its text.
    """

    command: str
    toml: str
    exit_code: int = 0

    def lines(self) -> list[str]:
        """Return the lines of the file."""
        return self.toml.splitlines()


def settings_file(command: str, model: type[Settings]) -> TemplateResult:
    """Write all settings of a command, for its `--config`."""
    head = [
        f"# Settings of wanlora {command}, with their defaults. Remove the # before a setting to",
        f"# change it, then run: wanlora {command} --config FILE.toml",
    ]
    return TemplateResult(command, "\n".join([*head, *_tables(settings_of(model), prefix="")]))


def job_file(commands: Mapping[str, type[Settings]]) -> TemplateResult:
    """Write the everyday settings of several commands, for `wanlora run`.

    Args:
        commands: Commands in the order in which they run.
    """
    lines = [
        "# A whole job: wanlora run FILE.toml runs the stages below in this order. Run it again to",
        "# continue; finished work is not repeated. A stage without a table is skipped, and each",
        "# stage reads the output of the stages before it. These are the most used settings with",
        "# their defaults; remove a # to change one. All settings of a stage: wanlora config STAGE",
    ]
    for command, model in commands.items():
        lines += ["", "", *_comment(f"{command}: {model.__doc__}"), f"[{command}]"]
        given = GIVEN.get(command, {})
        lines += [f"{name} = {as_toml(value)}" for name, value in given.items()]
        left_out = {*given, *DECIDED, *PASSED_ON.get(command, ())}
        everyday = (each for each in settings_of(model) if each.flag and each.name not in left_out)
        lines += _tables(everyday, prefix=f"{command}.")
    return TemplateResult("run", "\n".join(lines))


GIVEN: dict[str, dict[str, object]] = {"prepare": {"sources": ["videos"]}}
"""Settings that every job needs, with an example."""

DECIDED = {
    "dry_run": "use wanlora run FILE --dry-run",
    "resume": "a job continues its run by itself",
}
"""Settings that a job file cannot contain, and what to do instead."""

PASSED_ON = {
    "cache-latents": ("manifest",),
    "train": ("cache", "view"),
    "sample": ("cache", "view", "adapter", "output_dir", "skip_existing"),
    "evaluate": ("cache", "view", "adapter", "output_dir"),
}
"""Settings whose default in a job comes from the stages before."""


def _tables(settings: Iterable[Setting], *, prefix: str) -> Iterator[str]:
    """Write settings by table: those outside of a group come first, as TOML requires."""
    ordered = sorted(settings, key=lambda setting: "." in setting.name)
    table = ""
    for setting in ordered:
        group, _, name = setting.name.rpartition(".")
        if group != table:
            yield from ("", f"[{prefix}{group}]")
            table = group
        yield from ("", *_comment(str(setting.field.description)), f"# {_facts(setting)}")
        field = setting.field
        unset = field.is_required() or field.default is None
        yield f"#{name} = {'...' if unset else as_toml(field.default)}"


def _facts(setting: Setting) -> str:
    required = " (required)" if setting.field.is_required() else ""
    flags = [name for name in setting.options if name.startswith("-")]
    facts = [f"{type_of(setting.field)}{required}", ", ".join(flags)]
    facts.append(f"default: {setting.unset}" if setting.unset else "")
    return "; ".join(filter(None, facts))


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent="# ", subsequent_indent="# ",
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
