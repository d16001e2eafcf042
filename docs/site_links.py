"""Point links to files outside docs/ at the repository when mkdocs builds the site."""

import re
from typing import Any

OUTSIDE = re.compile(r"\]\((?:\.\./)+(?P<path>[^)]+)\)")


def on_page_markdown(markdown: str, *, config: dict[str, Any], **_: Any) -> str:
    """Replace links such as `../README.md` by their address on GitHub."""
    blob = f"{config['repo_url'].rstrip('/')}/blob/main/"
    return OUTSIDE.sub(lambda link: f"]({blob}{link['path']})", markdown)
