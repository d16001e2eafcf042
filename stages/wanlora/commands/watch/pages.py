"""The pages of a folder, as answers to requests.

Owns: which page a request gets. Must not know: HTTP headers, markup.
"""

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path

from wanlora.commands.watch import compare_page, list_page
from wanlora.commands.watch.details import Details
from wanlora.commands.watch.list_page import MAX_COMPARED, MIN_COMPARED
from wanlora.commands.watch.run_files import Folder
from wanlora.commands.watch.server import Answer, Query, Refusal
from wanlora.commands.watch.summary import Summaries, Summary
from wanlora.files import encode_text
from wanlora.report import run_status
from wanlora.report.run_page import run_page
from wanlora.runs import run_folder

MAX_PAGE_BYTES = 256 * 2**20
LATE_PAGE_S = 120.0
"""A live run writes run.html every minute; a page is out of date if the metrics are newer by more
than this."""
BODY = b"<body><main>"


class Pages:
    """The pages of a folder.

    Args:
        name: The folder, as the user typed it.
        folder: The same, opened.
    """

    def __init__(self, name: Path, folder: Folder) -> None:
        self._name = str(name)
        self._folder = folder
        self._summaries = Summaries(folder)
        self._details = Details(folder)
        self._lock = threading.Lock()
        self.routes = {
            "/": self._alone(self.show_list),
            "/run": self._alone(self.show_run),
            "/compare": self._alone(self.show_comparison),
        }

    def _alone(self, show: Callable[[Query], Answer]) -> Callable[[Query], Answer]:
        """Make one page at a time: pages share what was read."""

        def show_alone(query: Query) -> Answer:
            with self._lock:
                return show(query)

        return show_alone

    def summaries(self) -> list[Summary]:
        """Summarise all runs, the last written first."""
        return self._summaries.of(self._folder.find_runs().runs)

    def show_list(self, _query: Query) -> Answer:
        """Make the list."""
        found = self._folder.find_runs()
        html = list_page.list_page(
            self._name, self._summaries.of(found.runs), links=found.links, is_cut=found.is_cut
        )
        return Answer(encode_text(html), list_page.SCRIPT)

    def show_run(self, query: Query) -> Answer:
        """Return the page of a run: its run.html, or one made now if that is missing or late."""
        [summary] = self._named(query.get("name", ()), least=1, most=1)
        html = self._run_html(summary) or self._made_now(summary)
        head = b'<p><a href="/" style="color: inherit">All runs</a>' + _alarm(summary) + b"</p>"
        return Answer(html.replace(BODY, BODY + head, 1), run_status.SCRIPT)

    def show_comparison(self, query: Query) -> Answer:
        """Make the page of several runs side by side."""
        named = self._named(query.get("run", ()), least=MIN_COMPARED, most=MAX_COMPARED)
        html = compare_page.compare_page([self._details.of(summary) for summary in named])
        return Answer(encode_text(html), compare_page.SCRIPT)

    def _named(self, names: Sequence[str], *, least: int, most: int) -> list[Summary]:
        """Summaries of the runs with these names, in this order.

        Raises:
            Refusal: There are too few or too many names, or one is not a run of the folder.
        """
        wanted = list(dict.fromkeys(names))
        if not least <= len(wanted) <= most:
            expected = f"{least} to {most} runs" if most > 1 else "one run"
            raise Refusal(HTTPStatus.BAD_REQUEST, f"Expected {expected}, found {len(wanted)}.")
        known = {summary.name: summary for summary in self.summaries()}
        for name in wanted:
            if name not in known:
                raise Refusal(HTTPStatus.NOT_FOUND, f"{self._name} has no run {name!r}.")
        return [known[name] for name in wanted]

    def _run_html(self, summary: Summary) -> bytes | None:
        """Return run.html, unless it is missing or older than the metrics by `LATE_PAGE_S`."""
        path = f"{summary.name}/{run_folder.PAGE_NAME}"
        page = self._folder.version(path)
        metrics = self._folder.version(f"{summary.name}/{run_folder.METRICS_NAME}")
        late_ns = metrics.mtime_ns - page.mtime_ns if metrics and page else 0
        if page is None or late_ns > 1e9 * LATE_PAGE_S:
            return None
        return self._folder.read(path, max_bytes=MAX_PAGE_BYTES)

    def _made_now(self, summary: Summary) -> bytes:
        data = self._details.of(summary)
        return encode_text(
            run_page(
                summary.name,
                settings=data.settings,
                metrics=data.metrics,
                validations=data.validations,
                note="; ".join(data.notes),
            )
        )


def _alarm(summary: Summary) -> bytes:
    """State of a run that is silent: its page was written while it was alive."""
    if summary.state != "no sign of life":
        return b""
    text = f' <b class="bad">{summary.state}</b>: {summary.reason}'
    return text.encode()
