"""`wanlora watch`: the runs of a folder in a browser on this machine.

stage.py         run(): the port, and the end
pages.py         which page a request gets
server.py        HTTP on 127.0.0.1: refusals and headers
files.py         reads below one folder: no links, no writes
records.py       rows of a run's files, leniently
summary.py       a run in one line, and its state
details.py       all that is shown of a run
list_page.py  compare_page.py  live.py   what is drawn
"""

from wanlora.watch.stage import WatchResult, run

__all__ = ["WatchResult", "run"]
