"""Git commit of the working directory that a run was started in."""

import shutil
import subprocess
from pathlib import Path


def git_commit(folder: Path) -> str | None:
    """Commit checked out in a folder, with `-dirty` if files differ; None outside of git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [
        git,
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None if done.returncode == 0 else None
