"""`wanlora demo`: teach the embedded model something it has never seen, and watch the difference.

stage.py     run(): draw videos and run the real commands, each step once
folder.py    demo.json: the steps that are done, so that an interrupted demo continues
summary.py   the last step: measure, and write the report
measure.py   what is measured beside them: recognised clips, and a step without a cache
page.py      report.html, and the picture of base and adapter side by side
"""

from wanlora.demo.stage import DemoResult, run

__all__ = ["DemoResult", "run"]
