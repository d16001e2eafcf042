"""Bars and log lines share a terminal of any width; a log holds plain lines."""

import io
import logging
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.support.terminal import Terminal
from wanlora import progress

FIGURES = ("loss 0.1234", "lr 1.0e-04", "mfu 45 %", "data 0 %", "mem 12.3 GB")
LINES = ("first", "a [red]log[/] line [A", "x" * 300)


@contextmanager
def output_to(monkeypatch, stream):
    logger = logging.getLogger("test_progress")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.console():
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield logger
        finally:
            logger.removeHandler(handler)


def _work(logger, every_step=lambda: None):
    with progress.bar(total=1000, description="train", unit="step", done=100) as bar:
        for line in LINES:
            for _ in range(4):
                progress.show_figures(bar, *FIGURES)
                bar.update()
                bar.refresh()
                every_step()
            logger.info("%s", line)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_log_lines_start_at_column_0_and_the_bar_keeps_to_its_line(monkeypatch, width):
    terminal = Terminal(width)
    with output_to(monkeypatch, terminal.stream) as logger:
        _work(logger)
        print("result")
    shown = terminal.shown()
    wrapped = [LINES[2][at : at + width] for at in range(0, 300, width)]
    assert shown.lines[: len(wrapped)] != wrapped
    text = "\n".join(shown.lines)
    assert shown.lines[0] == "first"
    assert "\n".join(wrapped) in text
    assert text.count("train:") == 1
    assert shown.lines[-1] == "result"
    bars = [row for row in shown.rows() if "train:" in row]
    assert max(map(len, bars)) < width
    if width >= 60:
        assert all("step/s" in bar or "s/step" in bar for bar in bars[1:])
        assert all("loss 0.1234" in bar for bar in bars[2:])
    assert all(("mem 12.3 GB" in bar) == (width == 120) for bar in bars[2:])


def test_an_inner_bar_hides_the_outer_one(monkeypatch):
    terminal = Terminal(80)
    with output_to(monkeypatch, terminal.stream) as logger:
        with progress.bar(total=10, description="outer", unit="step") as outer:
            outer.update(3)
            with progress.bar(total=5, description="inner", unit="step") as inner:
                inner.update(5)
                inner.refresh()
                outer.update(1)  # from another thread, for example
                logger.info("inside")
            logger.info("behind")
        print("after")
    shown = terminal.shown()
    assert [line.split()[0] for line in shown.lines] == ["inside", "behind", "outer:", "after"]
    assert "4/10" in shown.lines[2]
    assert b"inner: 5/5" in shown.raw


def test_prints_of_libraries_and_of_other_threads_appear_above_the_bar(monkeypatch):
    terminal = Terminal(80)
    with (
        output_to(monkeypatch, terminal.stream) as logger,
        progress.bar(total=100, description="work", unit="step") as bar,
    ):
        threads = [
            threading.Thread(target=lambda n=n: [logger.info("line %d", n) for _ in range(20)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in range(100):
            bar.update()
            bar.refresh()
        for thread in threads:
            thread.join()
        print("no line ", end="")
        print("end")
        print("unfinished", end="")
    shown = terminal.shown()
    assert sorted(shown.lines[:80]) == sorted(f"line {n}" for n in range(4) for _ in range(20))
    assert shown.lines[80] == "no line end"
    assert shown.lines[81].startswith("work: 100/100")
    assert shown.lines[82] == "unfinished"


def test_a_line_of_another_thread_during_the_first_draw_has_a_row_of_its_own(monkeypatch):
    terminal = Terminal(80)
    draw, threads = progress._draw, []

    def draw_while_another_thread_logs(stream, line):
        draw(stream, line)
        if "0/10" in line and not threads:
            threads.append(threading.Thread(target=logger.warning, args=("SIGINT",)))
            threads[0].start()
            threads[0].join(timeout=0.3)  # ends in time only if it does not wait for the drawing

    monkeypatch.setattr(progress, "_draw", draw_while_another_thread_logs)
    with output_to(monkeypatch, terminal.stream) as logger:
        with progress.bar(total=10, description="train", unit="step") as bar:
            threads[0].join()
            bar.update(10)
        print("after")
    shown = terminal.shown()
    assert [line.split()[0] for line in shown.lines] == ["SIGINT", "train:", "after"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_bars_line(monkeypatch, error):
    def work():
        with progress.bar(total=10, description="outer", unit="step") as outer:
            outer.update()
            with progress.bar(total=10, description="inner", unit="step") as inner:
                inner.update()
                raise error

    terminal = Terminal(80)
    with output_to(monkeypatch, terminal.stream), pytest.raises(error):
        work()
    terminal.stream.write("error: because\n")
    shown = terminal.shown()
    assert len(shown.lines) == 2
    assert shown.lines[0].startswith("outer: 1/10")
    assert shown.lines[1] == "error: because"
    assert not progress._bars


def test_a_terminal_may_change_its_width(monkeypatch):
    terminal = Terminal(120)
    with output_to(monkeypatch, terminal.stream) as logger:
        widths = iter([120, 60, 100, 30] * 3)
        _work(logger, lambda: terminal.resize(next(widths)))
    shown = terminal.shown()
    assert shown.lines[0] == "first"


def test_a_log_file_holds_plain_lines_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    log = io.StringIO()
    with output_to(monkeypatch, log) as logger:
        _work(logger)
    assert not {"\r", "\x1b", "█"} & set(log.getvalue())
    lines = log.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("train: ")] == list(LINES)
    assert "112/1000 (11 %)" in lines[-1]
    assert lines[-1].endswith(", ".join(FIGURES))


def test_a_short_work_leaves_no_line_in_a_log(monkeypatch):
    log = io.StringIO()
    with (
        output_to(monkeypatch, log),
        progress.bar(total=10, description="work", unit="step") as bar,
    ):
        bar.update(10)
    assert log.getvalue() == ""


def test_one_process_of_several_shows_a_bar(monkeypatch):
    terminal = Terminal(80)
    with (
        output_to(monkeypatch, terminal.stream),
        progress.bar(total=10, description="work", unit="step", shown=False) as bar,
    ):
        progress.show_figures(bar, "loss")
        bar.update()
    assert terminal.shown().raw == b""
