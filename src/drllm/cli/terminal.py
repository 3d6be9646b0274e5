"""What the user sees while a command runs: lines, tables, routes, progress, the one error line.

Results go to standard output, everything else to standard error. On a terminal lines and cells
break at words and progress is a bar; elsewhere lines are as long as they are and progress is a
plain line every tenth of the way, without control characters.
"""

import logging
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from drllm.errors import printable
from drllm.listener import Listener, duration
from drllm.paths import Decision, sketch
from drllm.reporting.numbers import NBSP

NAME_WIDTH = 14  # columns for the name of a fact
UNBROKEN = sys.maxsize  # columns of what is no terminal: lines there are as long as they are
STEPS, PLAIN_EVERY_S = 10, 10.0
"""Maximum lines of plain progress from start to end, and the least time between two of them."""
BAR = 14  # columns of a bar: on a terminal of 60 there is room for the time left beside it
RESUMED_WITHIN_S = 2.0
"""Work reported this soon was done by an earlier run and says nothing about the rate."""
STYLES = {Decision.EXECUTE: "dim", Decision.SKIP: "red", Decision.REPEAT: "bold green"}
LAYERS_A_ROW, TICK = 60, 10
PACKAGE = Path(__file__).resolve().parents[1]


class Terminal(Listener):
    """Standard output and standard error of one command."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without █ is no reason to fail
        self.out, self.err = _Console(stderr=False), _Console(stderr=True)

    def say(self, text: str = "", indent: int = 0) -> None:
        """Print lines of the result; what doesn't fit goes on in the next line, indented."""
        self.out.say(text, indent)

    def beside(self, name: str, text: str, width: int) -> None:
        """Print a text in a column of its own, right of a name in a column of some width."""
        if len(name) > width:
            self.say(name)
            name = ""
        self.say(f"{name:{width}} {text}", width + 1)

    def fact(self, name: str, text: object) -> None:
        """Print a line of the result: a name and its value."""
        self.beside(name, str(text).replace(NBSP, " "), NAME_WIDTH)

    def table(
        self,
        columns: str,
        rows: Iterable[Sequence[str | Text]],
        title: str | None = None,
        numbers_from: int = 99,
        cut_off: tuple[str, int] = ("", 0),
    ) -> None:
        """Print a table, row by row where its longest words don't fit side by side.

        The names of columns have `|` in between, and those from `numbers_from` on are aligned to
        the right; a row without cells is a line between sections. `cut_off` is a column and the
        width at which its cells are cut off, so that each stays one line; in all others narrow
        terminals break lines, and nothing is lost.
        """
        names = columns.split("|")
        cells = [[Text(one) if isinstance(one, str) else one for one in row] for row in rows]
        ranges = []
        for place, name in enumerate(names):
            texts = [name, *(row[place].plain for row in cells if place < len(row))]
            most = max(cell_len(line) for text in texts for line in text.split("\n"))
            least = max(cell_len(word) for text in texts for word in text.split() or [""])
            kept = cut_off[1] if name == cut_off[0] else most
            ranges.append((min(least, kept), min(most, kept)))
        widths = _shared_out(self.out.width - 2 * len(names) - 1, ranges)
        if title:
            self.say(title)
        if widths is None:
            for row in filter(None, cells):
                self.say()
                for name, one in zip(names, row, strict=False):
                    self.fact(" ".join(name.split()), one.plain)
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, (name, width) in enumerate(zip(names, widths, strict=True)):
            right, whole = place >= numbers_from, name == cut_off[0]
            table.add_column(name, justify="right" if right else "left", width=width, no_wrap=whole)
        for row in cells:
            table.add_row(*row) if row else table.add_section()
        self.out.print(table)

    def note(self, text: str) -> None:
        """Print a line that isn't part of the result."""
        self.err.say(text)

    def fail(self, text: str) -> None:
        """Print the one line with which a failed command ends."""
        self.note(f"drllm: {' '.join(text.split())}")

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show on a terminal what is being done where no progress can be measured."""
        return self.err.status(what) if self.err.is_terminal else nullcontext()

    def progress(self, title: str, unit: str) -> "Progress":
        """Return a display of the progress of what `title` says, counted in `unit` (a plural)."""
        return Progress(self.err, title, unit)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Show warnings of ours, logged or raised, inside the block; keep others' to themselves."""
        logger, handler = logging.getLogger("drllm"), logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.note(  # type: ignore[method-assign]
            f"drllm: {record.levelname.lower()}: {record.getMessage()}"
        )
        propagated, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        shown, warnings.showwarning = warnings.showwarning, _log_ours
        try:
            yield
        finally:
            warnings.showwarning = shown
            logger.removeHandler(handler)
            logger.propagate = propagated


def _log_ours(message: Any, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) and PACKAGE in Path(filename).resolve().parents:
        logging.getLogger("drllm").warning("%s", message)


class Progress:
    """Shows what a stage is at, how far it is and how long it will still take.

    A context manager, and inside it a callback `(done, total, note="")`. `done` may be a fraction
    of a unit; where it falls, the next task of the stage has begun. What doesn't fit into the
    terminal's width is cut off, the end of the note first.
    """

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self.console, self.title, self.unit = console, title, unit
        self.bar: Bar | None = None
        self.task = TaskID(0)
        self._begin(0.0)

    def _begin(self, done: float) -> None:
        self.started = self.counted_from = self.printed_at = time.monotonic()
        self.done = self.done_before = done
        self.printed = 0

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            texts = "{task.description}", "{task.percentage:3.0f} %", "{task.fields[state]}"
            title, share, state = (TextColumn(text, markup=False) for text in texts)
            self.bar = Bar(title, BarColumn(BAR), share, state, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=None, state="")
        self._begin(0.0)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report work done, of a total, and what is being worked on."""
        now = time.monotonic()
        if done < self.done:
            self._begin(done)
        if now - self.started < RESUMED_WITHIN_S:
            self.done_before = done
            self.counted_from = now
        self.done = done
        parts = self._describe(done, total, note, now)
        if self.bar is None:
            self._print_line(done, total, parts, now)
        else:
            self._update_bar(self.bar, done, total, ", ".join(parts))

    def _describe(self, done: float, total: float, note: str, now: float) -> list[str]:
        """Return the parts of the text beside the share that is done, the time first."""
        is_over = done >= total
        parts = note.split(", ") if note and not is_over else []
        if self.unit:
            parts.insert(1, f"{int(done)}/{int(total)} {self.unit}")
        elapsed = now - self.started
        num_new = done - self.done_before
        if is_over:
            parts.append(duration(elapsed))
        elif num_new > 0 and elapsed > 0:
            seconds_left = (total - done) * (now - self.counted_from) / num_new
            parts.insert(0, f"{duration(seconds_left)} left")
        return parts

    def _update_bar(self, bar: Bar, done: float, total: float, text: str) -> None:
        """Show the bar on a terminal, with as much of the text as there is room for."""
        room = self.console.width - len(f"{self.title} 100 %  ") - BAR - 1
        if len(text) > room:
            text = text[: room - 1] + "…"
        bar.update(self.task, completed=done, total=total, state=text)

    def _print_line(self, done: float, total: float, parts: Sequence[str], now: float) -> None:
        """Print a plain line where there is no terminal, every tenth of the way at most."""
        step = int(STEPS * done / total) if total else STEPS
        is_due = done >= total or now - self.printed_at >= PLAIN_EVERY_S
        if step <= self.printed or not is_due:
            return
        self.printed = step
        self.printed_at = now
        share = f"{100 * done / total:.0f} %" if total else "100 %"
        self.console.print(f"{self.title}: {', '.join([share, *parts])}", soft_wrap=True)


def draw_route(decisions: Sequence[int]) -> Text:
    """Draw decisions with numbered layers; the three kinds differ in shape, not only in colour."""
    text, margin = Text(), " " * 7
    for start in range(0, len(decisions), LAYERS_A_ROW):
        row = decisions[start : start + LAYERS_A_ROW]
        ticks = "".join(f"{layer:<{TICK}}" for layer in range(start, start + len(row), TICK))
        text.append(f"layer  {ticks.rstrip()}\n{margin}")
        for value in row:
            text.append(sketch([value]), style=STYLES[Decision(value)])
        text.append("\n")
    kinds = ((sketch([kind]), style, kind.name.lower()) for kind, style in STYLES.items())
    legend = (Text.assemble((mark, style), f" {name}") for mark, style, name in kinds)
    return text.append(margin).append_text(Text("  ").join(legend))


def _shared_out(room: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return widths of columns within their least and most that fit; None where none do."""
    if sum(least for least, _ in ranges) > room:
        return None
    widths = [most for _, most in ranges]
    while sum(widths) > room:
        free = [place for place, (least, _) in enumerate(ranges) if widths[place] > least]
        widths[max(free, key=lambda place: widths[place])] -= 1
    return widths


class _Console(Console):
    """A console that shows the control characters of a text instead of obeying them."""

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)
        if not self.is_terminal:
            self.width = UNBROKEN

    def say(self, text: str, indent: int = 0) -> None:
        """Print lines that aren't markup; the parts of one that is too long are indented."""
        text = printable(text)
        if self.width < UNBROKEN:
            indent = max(0, min(indent, self.width - max(map(len, text.split() or [""]))))
            style: Any = {"break_long_words": False, "break_on_hyphens": False}
            style |= {"subsequent_indent": " " * indent, "replace_whitespace": False}
            lines = (textwrap.wrap(line, self.width, **style) for line in text.split("\n"))
            text = "\n".join("\n".join(line) for line in lines)
        self.print(text, soft_wrap=True)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
