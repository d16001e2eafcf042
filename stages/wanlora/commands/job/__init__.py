"""`wanlora run`: a whole job from one TOML file."""

from wanlora.commands.job.job import JobResult, run

__all__ = ["JobResult", "run"]
