"""`wanlora demo`: train the embedded model on something new and measure the difference."""

from wanlora.commands.demo.demo import DemoResult, run

__all__ = ["DemoResult", "run"]
