from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import drllm
from drllm.cli import terminal as terminal_module
from drllm.cli.terminal import Progress, Terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is set by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: clock.now)
    return clock


def plain(total: int, steps: list[tuple[float, float]], clock: SimpleNamespace) -> list[str]:
    """Return the lines of a progress that isn't shown on a terminal, for (time, done) steps."""
    file = io.StringIO()
    start = clock.now
    with Progress(Console(file=file, width=120), "searching", "questions") as progress:
        for seconds, done in steps:
            clock.now = start + seconds
            progress(done, total)
    return file.getvalue().splitlines()


def test_plain_progress_is_a_line_every_tenth_without_control_characters(clock: SimpleNamespace):
    lines = plain(200, [(float(done), done) for done in range(1, 201)], clock)
    assert len(lines) == 11
    assert lines[5] == "searching: 100 of 200 questions, 1.0 a second, 1 min 40 s left"
    assert lines[-1] == "searching: 200 of 200 questions, 1.0 a second"
    assert all(line.isprintable() for line in lines)


def test_what_an_earlier_run_did_says_nothing_about_the_rate(clock: SimpleNamespace):
    lines = plain(100, [(0.01, 40.0), (0.02, 50.0), (10.02, 60.0)], clock)
    assert "a second" not in lines[0] + lines[1]
    assert lines[2] == "searching: 60 of 100 questions, 59.9 a minute, 40.1 s left"


def test_the_next_task_of_a_stage_begins_anew(clock: SimpleNamespace):
    lines = plain(10, [(1.0, 5.0), (2.0, 10.0), (3.0, 0.0), (4.0, 1.0)], clock)
    assert lines[-1] == "searching: 1 of 10 questions, 1.0 a second, 9.0 s left"


def test_progress_on_a_terminal_is_a_bar_with_rate_and_time_left(clock: SimpleNamespace):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with Progress(console, "searching", "questions") as progress:
        progress(0, 100)
        clock.now += 10
        progress(50, 100)
    text = file.getvalue()
    assert "50 of 100 questions, 5.0 a second, 10.0 s left" in text
    assert "━" in text


def test_no_bar_is_left_behind_by_an_error():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with pytest.raises(ZeroDivisionError), Progress(console, "searching", "questions") as progress:
        progress(1 / 0, 1)
    assert progress.bar is not None
    assert progress.bar.finished or not progress.bar.live.is_started


def test_a_failure_is_one_line_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]):
    Terminal().fail("first [bold]\n  second " + "x" * 300)
    assert capsys.readouterr().err == f"drllm: first [bold] second {'x' * 300}\n"


def test_our_warnings_are_shown_as_one_line_and_afterwards_logging_is_as_before(
    capsys: pytest.CaptureFixture[str],
):
    logger = logging.getLogger("drllm")
    before = (list(logger.handlers), logger.propagate, warnings.showwarning)
    with Terminal().warnings():
        logging.getLogger("drllm.somewhere").warning("shorter than %d", 3)
        logging.getLogger("drllm.somewhere").info("nobody asked")
    assert capsys.readouterr().err == "drllm: warning: shorter than 3\n"
    assert (list(logger.handlers), logger.propagate, warnings.showwarning) == before


def test_warnings_that_code_of_ours_raises_are_shown_and_others_are_not(
    capsys: pytest.CaptureFixture[str],
):
    ours = str(Path(drllm.__file__).parent / "models" / "routed.py")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with Terminal().warnings():
            warnings.warn_explicit("another name", UserWarning, ours, 1)
            warnings.warn_explicit("old name", DeprecationWarning, ours, 2)
            warnings.warn_explicit("theirs", UserWarning, "/elsewhere/torch.py", 3)
    assert capsys.readouterr().err == "drllm: warning: another name\n"


HOSTILE = "a\x1b[31mb\x07\x9b2J\u202ec\td"


def test_no_control_character_of_a_text_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal()
    terminal.say(HOSTILE)
    terminal.table(HOSTILE, [[HOSTILE]], title=HOSTILE)
    terminal.fail(HOSTILE)
    terminal.note(HOSTILE)
    out, err = capsys.readouterr()
    for printed in (out, err):
        assert r"\x1b[31m" in printed
        assert r"\x9b2J" in printed
        assert not set(printed) & set("\x1b\x07\x9b\u202e")


WORDS = "permuted-routes what-the-routed-model-does 12345.678 checkpoints/first/routers a bc def"


def on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("stdout", "stderr"):
        screen = io.StringIO()
        screen.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, name, screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_on_a_terminal_lines_and_tables_break_at_words(width: int, monkeypatch):
    terminal = on_a_terminal(width, monkeypatch)
    terminal.say(f"{WORDS} {WORDS}")
    terminal.fact("routers", f"{WORDS} {WORDS}")
    terminal.note(f"{WORDS} {WORDS}")
    terminal.table("name|what\nit|is", [WORDS.split()[:3], [WORDS, WORDS, "1"]], "name " * 50)
    shown = sys.stdout.getvalue() + sys.stderr.getvalue()
    shown = re.sub(r"\x1b\[[\d;]*m", "", shown)
    words = {word for word in shown.split() if set(word) != {"─"}}
    assert words == {*WORDS.split(), *["routers", "name", "what", "it", "is", "1"]}
    assert max(map(len, shown.splitlines())) <= width


def test_a_table_whose_words_do_not_fit_is_printed_row_by_row(monkeypatch):
    for width, is_table in ((60, True), (30, False)):
        terminal = on_a_terminal(width, monkeypatch)
        terminal.table("a|b\nc|d", [["x" * 15, "y" * 15, "z" * 15], []])
        assert (f"b c            {'y' * 15}\n" not in sys.stdout.getvalue()) == is_table


def test_what_goes_to_a_file_is_not_broken(capsys: pytest.CaptureFixture[str]):
    terminal = Terminal()
    terminal.fact("routers", WORDS * 5)
    terminal.table("name|what", [["a", WORDS * 5]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split(maxsplit=1)[1] for line in (lines[0], lines[4])] == [WORDS * 5] * 2
