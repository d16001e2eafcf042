"""The layout of `--help`: flags under headings, with names that are never truncated.

Owns: how help fits the width of a terminal. Must not know: any command.
"""

import textwrap
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

MAX_WIDTH = 100
"""Maximum line length in characters."""
WIDEST_NAME = 26
"""Maximum length of a name in characters; a longer one has its description below it."""
GENERAL = "General"


def print_help(command: Any, context: Any) -> None:
    """Print the help of a command or of the whole program."""
    console = Console(highlight=False, soft_wrap=True)
    width = min(console.width, MAX_WIDTH)
    console.print(Text(command.get_usage(context), style="bold"))
    console.print()
    for paragraph in (command.help or "").split("\n\n"):
        _print_wrapped(console, Text.from_markup(" ".join(paragraph.split())).plain, width)
    for heading, rows in _sections(command, context).items():
        console.print()
        console.print(Text(heading, style="bold yellow"))
        for row in rows:
            _print_row(console, row, width)
    if command.epilog:
        console.print()
        console.print(Text.from_markup(command.epilog.replace("\n\n", "\n")))


def _sections(command: Any, context: Any) -> dict[str, list[tuple[str, str, str]]]:
    """List commands, arguments and options: name, value and description of each, by heading."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            sub: Any = command.get_command(context, name)
            summary = str(sub.help).partition("\n\n")[0]
            sections.setdefault(sub.rich_help_panel, []).append((name, "", summary))
    for option in command.get_params(context):
        if getattr(option, "hidden", False):
            continue
        positional = option.param_type_name == "argument"
        many = positional and (option.nargs != 1 or option.multiple)
        name = str(option.name).upper() + ("..." if many else "")
        opts = sorted(option.opts, key=lambda each: each.startswith("--"))  # -h, --help
        names = name if positional else ", ".join(opts)
        value = "" if positional or option.is_flag else str(option.metavar or "")
        heading = option.rich_help_panel or (GENERAL if not positional else "Arguments")
        sections.setdefault(heading, []).append((names, value, option.help or ""))
    if GENERAL in sections:
        sections[GENERAL] = sections.pop(GENERAL)  # last
    return sections


def _print_row(console: Console, row: tuple[str, str, str], width: int) -> None:
    names, value, text = row
    column = min(WIDEST_NAME, width // 3) + 4
    line = Text("  ").append(names, style="bold cyan")
    if value:
        indent = len(line) + 1
        first, *others = _broken_at_bars(value, width - indent)
        line.append(f" {first}")
        for more in others:
            line.append(f"\n{' ' * indent}{more}")
    lines = textwrap.wrap(
        " ".join(text.split()), width - column, break_long_words=False, break_on_hyphens=False
    )
    if lines and len(line) <= column - 2:
        line.append(" " * (column - len(line)) + lines.pop(0))
    console.print(line)
    for rest in lines:
        console.print(Text(" " * column + rest))


def _broken_at_bars(value: str, width: int) -> list[str]:
    """Break a list of choices into lines, each but the last with its bar at the end."""
    words = value.replace("|", "| ")
    return [line.replace(" ", "") for line in textwrap.wrap(words, width, break_long_words=False)]


def _print_wrapped(console: Console, text: str, width: int) -> None:
    for line in textwrap.wrap(text, width):
        console.print(Text(line))
