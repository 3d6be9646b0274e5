import io
import itertools
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import drllm
from drllm.cli import main
from drllm.cli import progress as progress_module
from drllm.cli.progress import Progress
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import VERBS, Verb


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is set by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock.now)
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
    assert len(lines) == 10
    assert lines[4] == "searching: 50 %, about 2 min left, 100/200 questions"
    assert lines[-1] == "searching: 100 %, 200/200 questions, 3 min 20 s"
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("total", "steps", "number", "last"),
    [
        (50, [(0.1 * n, n) for n in range(1, 51)], 1, "100 %, 50/50 questions, 5.0 s"),
        (
            100,
            [(0.01, 40), (0.02, 50), *((0.02 + 2 * n, 50 + n) for n in range(1, 11))],
            2,
            "60 %, about 2 min left, 60/100 questions",
        ),
        (
            10,
            [(10, 5), (20, 10), (30, 0), *((30 + n, 0.1 * n) for n in range(1, 11))],
            3,
            "10 %, about 2 min left, 1/10 questions",
        ),
        (100, [(10, 1), (20, 20), (30, 23), (40, 30)], 2, "30 %, 30/100 questions"),
    ],
    ids=[
        "something short",
        "what an earlier run did",
        "the next task begins anew",
        "no estimate while it changes",
    ],
)
def test_plain_progress_is_right_about_the_time(total, steps, number, last, clock):
    lines = plain(total, steps, clock)
    assert (len(lines), lines[-1]) == (number, f"searching: {last}")


def bar_on_a_terminal(width: int, clock: SimpleNamespace, note: str) -> str:
    """Return what a terminal of so many columns shows of a progress that is half done."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    with Progress(console, "searching", "questions") as progress:
        for done in range(0, 321, 32):
            progress(done, 640, note)
            clock.now += 100
    return max(re.split(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\n|\r", file.getvalue()), key=len)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_name_bar_share_and_times_are_one_line_that_fits(width, clock):
    shown = bar_on_a_terminal(width, clock, f"re-tests, builtin_facts, {'7 % valid, ' * 20}")
    assert re.match(r"\S searching ━+\S* +50 % 0:1\d:\d\d about 17 min left, re", shown)
    assert len(shown.rstrip()) <= width
    assert shown.rstrip().endswith("…")


def test_a_bar_says_what_is_done_before_it_counts(clock: SimpleNamespace):
    shown = bar_on_a_terminal(100, clock, "re-tests")
    assert "about 17 min left, re-tests, 320/640 questions" in shown


def test_a_bar_turns_and_counts_seconds_while_nothing_is_reported():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with Progress(console, "searching", "questions") as progress:
        progress(1, 10)
        for _ in range(1000):
            if "0:00:01" in file.getvalue():
                break
            time.sleep(0.01)
    assert "10 % 0:00:01 1/10 questions" in file.getvalue()
    spinners = set(re.findall(r"(\S) searching", file.getvalue()))
    assert len(spinners) > 1


def test_the_time_of_a_bar_is_that_of_its_part(clock: SimpleNamespace):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with Progress(console, "tuning", "") as progress:
        progress(5, 10)
        clock.now += 3600
        progress(0, 10)
        clock.now += 2
        progress(10, 10)
    assert "100 % 0:00:02" in file.getvalue()


def test_a_log_shows_that_the_work_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_module, "FIRST_LINE_S", 0.02)
    monkeypatch.setattr(progress_module, "MAX_PAUSE_S", 0.02)
    file = io.StringIO()
    console = Console(file=file, width=120)
    with progress_module.busy_lines(console, "loading the model"):
        wait_for_lines(file, 2)
    with Progress(console, "searching", "questions") as progress:
        progress(1, 100, "re-tests")
        wait_for_lines(file, 4)
    *busy, status = file.getvalue().splitlines()
    assert re.fullmatch(r"loading the model: \d+\.\d s so far", busy[0])
    assert re.fullmatch(r"searching: 1 %, re-tests, 1/100 questions, \d+\.\d s so far", status)


def test_a_log_has_a_line_every_5_seconds_in_the_first_minute_and_every_10_later(clock):
    file = io.StringIO()
    lines = progress_module.busy_lines(Console(file=file, width=120), "loading the model")
    times = []
    start = clock.now
    while clock.now < start + 120:
        clock.now += lines.print_if_due()
        times.append(clock.now - start)
    assert times[:3] == [1.5, 6.5, 11.5]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(pauses[:12]) <= 5
    assert max(pauses) == 10
    shown = file.getvalue().splitlines()
    assert shown[:2] == ["loading the model …", "loading the model: 6.5 s so far"]
    assert len(shown) == len(times) - 1  # the last one is to come


def wait_for_lines(file: io.StringIO, number: int) -> None:
    """Wait until so many lines were printed, ten seconds at most."""
    for _ in range(1000):
        if file.getvalue().count("\n") >= number:
            return
        time.sleep(0.01)
    raise AssertionError(file.getvalue())


def test_a_command_is_one_line_on_a_narrow_terminal(monkeypatch):
    terminal = on_a_terminal(30, monkeypatch)
    terminal.command("drllm evaluate --tasks builtin_facts --output-dir eval/")
    shown = sys.stdout.getvalue()
    assert "  drllm evaluate --tasks builtin_facts --output-dir eval/\n" in shown


def test_no_bar_is_left_behind_by_an_error():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with pytest.raises(ZeroDivisionError), Progress(console, "searching", "questions") as progress:
        progress(1 / 0, 1)
    assert progress.bar is not None
    assert progress.bar.finished or not progress.bar.live.is_started


def test_a_failure_is_one_line_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]):
    Terminal().fail("first [bold]\n  second " + "x" * 300)
    assert capsys.readouterr().err == f"drllm: first [bold] second {'x' * 300}\n"


def test_our_warnings_are_shown_as_one_line_and_afterwards_logging_is_as_before(capsys):
    logger = logging.getLogger("drllm")
    before = (list(logger.handlers), logger.propagate, warnings.showwarning)
    with Terminal().warnings():
        logging.getLogger("drllm.somewhere").warning("shorter than %d", 3)
        logging.getLogger("drllm.somewhere").info("nobody asked")
    assert capsys.readouterr().err == "drllm: warning: shorter than 3\n"
    assert (list(logger.handlers), logger.propagate, warnings.showwarning) == before


def test_warnings_that_code_of_ours_raises_are_shown_and_others_are_not(capsys):
    ours = str(Path(drllm.__file__).parent / "models" / "routed.py")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with Terminal().warnings():
            warnings.warn_explicit("another name", UserWarning, ours, 1)
            warnings.warn_explicit("old name", DeprecationWarning, ours, 2)
            warnings.warn_explicit("theirs", UserWarning, "/elsewhere/torch.py", 3)
    assert capsys.readouterr().err == "drllm: warning: another name\n"


HOSTILE = "a\x1b[31mb\x07\x9b2J\u202ec\td"


def test_no_control_character_of_a_text_reaches_the_terminal(capsys):
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


def test_brackets_in_a_name_are_shown_while_work_goes_on(monkeypatch):
    terminal = on_a_terminal(80, monkeypatch)
    with terminal.busy("loading runs[/old]/[a]"):
        pass
    assert "loading runs[/old]/[a]" in sys.stderr.getvalue()


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


def set_verb(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int | None]) -> None:
    """Let `drllm toy` run a function."""
    monkeypatch.setitem(VERBS.data, "toy", Verb("toy", "Do a thing.", "drllm toy", run))


def run_unread(monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `drllm toy` with a pipe that nobody reads as standard output; return its status."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        return main(["toy"])


def test_a_command_whose_output_nobody_reads_ends_silently_without_success():
    words = [sys.executable, "-m", "drllm", "ls", "tasks"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(("own_status", "status"), [(1, 1), (None, 141)])
def test_a_verb_s_own_status_outlives_a_closed_output(own_status, status, monkeypatch):
    def run(*_: object) -> int | None:
        sys.stdout.write("NOT SHOWN")  # it stays in the buffer
        return own_status

    set_verb(monkeypatch, run)
    assert run_unread(monkeypatch) == status


def test_a_long_text_that_leaves_nothing_to_flush_is_a_closed_output_too(monkeypatch):
    set_verb(monkeypatch, lambda command, terminal: terminal.say("x" * 100_000))
    assert run_unread(monkeypatch) == 141


def test_a_broken_pipe_to_something_else_is_an_error(monkeypatch):
    def run(*_: object) -> None:
        raise BrokenPipeError

    set_verb(monkeypatch, run)
    with pytest.raises(BrokenPipeError):
        main(["toy"])
