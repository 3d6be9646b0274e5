"""What the user sees while a command runs: lines, tables, routes, progress, the one error line.

Results go to standard output, everything else to standard error. On a terminal progress is a bar;
elsewhere it is a plain line every tenth of the way, without control characters.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from drllm.errors import printable
from drllm.listener import Listener, duration
from drllm.paths import Decision, sketch

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""
BAR_WIDTH = 20
STEPS = 10
"""Lines of plain progress from start to end."""
RESUMED_WITHIN_S = 0.5
"""Work reported this soon was done by an earlier run and says nothing about the rate."""
STYLES = {Decision.SKIP: "red", Decision.EXECUTE: "dim", Decision.REPEAT: "bold green"}
LAYERS_A_ROW = 60
TICK = 10
NBSP = "\u00a0"
PACKAGE = Path(__file__).resolve().parents[1]


class Terminal(Listener):
    """Standard output and standard error of one command."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without █ is no reason to fail
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def say(self, text: str = "") -> None:
        """Print a line of the result; nothing in it is markup, and long lines aren't broken."""
        self.out.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def fact(self, name: str, text: str) -> None:
        """Print a line of the result: a name, and what there is to say of it."""
        self.say(f"{name:14} {text.replace(NBSP, ' ')}")

    def show(self, what: RenderableType) -> None:
        """Print a table or a styled text."""
        self.out.print(what, highlight=False)

    def note(self, text: str) -> None:
        """Print a line that isn't part of the result."""
        self.err.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def fail(self, text: str) -> None:
        """Print the one line by which a command ends that couldn't do its work."""
        self.note(f"drllm: {' '.join(text.split())}")

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show on a terminal what is being done where no progress can be measured."""
        return self.err.status(what) if self.err.is_terminal else nullcontext()

    def progress(self, title: str, unit: str) -> Progress:
        """Return what shows a stage's progress.

        Args:
            title: What is being done.
            unit: What is counted, in the plural.
        """
        return Progress(self.err, title, unit)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Show warnings of ours, logged or raised, inside the block; keep others' to themselves."""
        logger = logging.getLogger("drllm")
        handler: logging.Handler
        if self.err.is_terminal:
            handler = RichHandler(console=self.err, show_time=False, show_path=False)
        else:
            handler = _LineHandler(self)
        handler.setLevel(logging.WARNING)
        propagated, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        shown = warnings.showwarning
        warnings.showwarning = self._show_warning
        try:
            yield
        finally:
            warnings.showwarning = shown
            logger.removeHandler(handler)
            logger.propagate = propagated

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning) and PACKAGE in Path(filename).resolve().parents:
            logging.getLogger("drllm").warning("%s", message)


class _LineHandler(logging.Handler):
    """One plain line a log record."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        self.terminal.note(f"drllm: {record.levelname.lower()}: {record.getMessage()}")


class Progress:
    """Shows how far a stage is, how fast it goes and how long it will still take.

    A context manager, and inside it a callback `(done, total, note="")`. `done` may be a fraction
    of a unit; where it falls, the next task of the stage has begun.

    Args:
        console: Where to.
        title: What is being done.
        unit: What is counted, in the plural.
    """

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self.console = console
        self.title = title
        self.unit = unit
        self.bar: Bar | None = None
        self.task: TaskID | None = None
        self.done = self.done_before = 0.0
        self.started = time.monotonic()
        self.printed = -1

    def __enter__(self) -> Progress:
        """Start the clock, and the bar on a terminal."""
        if self.console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=BAR_WIDTH),
                TextColumn("{task.percentage:3.0f} %"),
                TextColumn("{task.fields[state]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=None, state="")
        self._begin(0.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar's hands off the terminal."""
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: float, total: int, note: str = "") -> None:
        """Report work done.

        Args:
            done: Units done so far.
            total: Units in all.
            note: What is being worked on.
        """
        now = time.monotonic()
        if done < self.done:
            self._begin(done)
        if now - self.started < RESUMED_WITHIN_S:
            self.done_before = done
        self.done = done
        elapsed, fresh = now - self.started, done - self.done_before
        rate = fresh / elapsed if fresh > 0 and elapsed > 0 else None
        state = f"{int(done)} of {total} {self.unit}"
        if rate is not None:
            state += f", {_rate(rate)}"
            if done < total:
                state += f", {duration((total - done) / rate)} left"
        if note and done < total:
            state += f" ({note})"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, state=state)
        else:
            self._print(done, total, f"{self.title}: {state}")

    def _begin(self, done: float) -> None:
        self.started = time.monotonic()
        self.done = self.done_before = done
        self.printed = -1

    def _print(self, done: float, total: int, line: str) -> None:
        step = int(STEPS * done / total) if total else STEPS
        if step > self.printed and (step > 0 or done > 0):
            self.printed = step
            self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def new_table(*columns: str, title: str | None = None, numbers_from: int = 99) -> Table:
    """Return an empty table; its columns from `numbers_from` on are aligned to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        # Narrow terminals break lines; nothing is cut off.
        table.add_column(
            column, justify="right" if place >= numbers_from else "left", overflow="fold"
        )
    return table


def draw_route(decisions: Sequence[int]) -> Text:
    """Draw decisions with numbered layers; the three kinds differ in shape, not only in colour.

    Example:
        >>> print(draw_route([1, 0, 2, 1]).plain)
        layer  0
               █·2█
               █ execute  · skip  2 repeat
    """
    text = Text()
    margin = " " * 7
    for start in range(0, len(decisions), LAYERS_A_ROW):
        row = decisions[start : start + LAYERS_A_ROW]
        ticks = ""
        for layer in range(start, start + len(row)):
            if layer % TICK == 0:
                ticks = ticks.ljust(layer - start) + str(layer)
        text.append(f"layer  {ticks}\n{margin}")
        for value in row:
            text.append(sketch([value]), style=STYLES[Decision(value)])
        text.append("\n")
    kinds = (
        (Decision.EXECUTE, "execute"),
        (Decision.SKIP, "skip"),
        (Decision.REPEAT, "repeat"),
    )
    legend = Text("  ").join(
        Text.assemble((sketch([kind]), STYLES[kind]), f" {name}") for kind, name in kinds
    )
    return text.append(margin).append_text(legend)


def _rate(rate: float) -> str:
    return f"{rate:.1f} a second" if rate >= 1 else f"{60 * rate:.1f} a minute"


class _Console(Console):
    """A console that shows the control characters of a text instead of obeying them."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def _console(*, stderr: bool) -> Console:
    console = _Console(stderr=stderr, soft_wrap=False)
    if not console.is_terminal:
        console = _Console(stderr=stderr, width=PLAIN_WIDTH)
    return console
