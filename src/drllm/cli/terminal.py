"""What the user sees while a command runs: lines, tables, routes, progress, and the error line.

Results go to standard output, everything else to standard error. On a terminal, long lines and
cells are broken at words, and progress is a bar. In a file or a pipe, lines are never broken, and
progress is plain lines.
"""

import logging
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from drllm.cli.progress import Progress, busy_lines
from drllm.errors import printable
from drllm.paths import Decision, sketch
from drllm.records.markdown import NBSP
from drllm.work.listener import Listener

NAME_WIDTH = 14  # columns for the name of a fact
UNBROKEN = sys.maxsize  # the width in columns of a file or a pipe, so that lines aren't broken
STYLES = {Decision.EXECUTE: "dim", Decision.SKIP: "red", Decision.REPEAT: "bold green"}
"""How a route shows each decision, as styles of rich."""
LAYERS_PER_ROW = 60  # in the drawing of a route
TICK = 10  # layers between two numbers above a route
LOADING = "loading torch"  # what `busy` shows while a stage is imported, which takes seconds
LOADING_HARNESS = "loading lm-evaluation-harness"
PACKAGE = Path(__file__).resolve().parents[1]  # the folder of drllm's code


class Terminal(Listener):
    """Prints the output of one command.

    Attributes:
        out: Standard output, for results.
        err: Standard error, for everything else.
    """

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that can't show █ must not fail
        self.out = _Console(stderr=False)
        self.err = _Console(stderr=True)

    def say(self, text: str = "", indent: int = 0) -> None:
        """Print lines of the result.

        On a terminal, a long line is broken; its continuation is indented by `indent` columns.
        """
        self.out.say(text, indent)

    def beside(self, name: str, text: str, width: int) -> None:
        """Print a name in a column of this width, and a text to the right of the column.

        The text of a longer name begins on the next line.
        """
        if len(name) > width:
            self.say(name)
            name = ""
        self.say(f"{name:{width}} {text}", width + 1)

    def fact(self, name: str, text: object) -> None:
        """Print a line of the result: a name and its value."""
        self.beside(name, str(text).replace(NBSP, " "), NAME_WIDTH)

    def command(self, text: str) -> None:
        """Print a command on a line of its own that is never wrapped, so that it can be pasted."""
        self.out.print(f"  {printable(text)}", soft_wrap=True)

    def table(
        self,
        columns: str,
        rows: Iterable[Sequence[str | Text]],
        title: str | None = None,
        numbers_from: int = 99,
        cut_off: tuple[str, int] = ("", 0),
    ) -> None:
        """Print a table, or a block of lines for each row if the table is too wide.

        Args:
            columns: The names of the columns, with `|` in between.
            rows: The cells of each row; a row without cells is a line between sections.
            title: A line above the table.
            numbers_from: The index of the first column that is aligned to the right.
            cut_off: The name of a column, and its maximum width. Its cells are cut off there, so
                that each cell is on one line. In all other columns a narrow terminal breaks lines.
        """
        names = columns.split("|")
        cut_off_name, cut_off_width = cut_off
        cells = [[_to_text(cell) for cell in row] for row in rows]
        ranges = []
        for place, name in enumerate(names):
            max_width = cut_off_width if name == cut_off_name else None
            texts = _read_column(name, place, cells)
            ranges.append(_measure_widths(texts, max_width))
        widths = _fit_widths(self.out.width - 2 * len(names) - 1, ranges)
        if title:
            self.say(title)
        if widths is None:
            self._print_row_by_row(names, cells)
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, (name, width) in enumerate(zip(names, widths, strict=True)):
            side: Any = "right" if place >= numbers_from else "left"
            is_cut_off = name == cut_off_name
            table.add_column(name, justify=side, width=width, no_wrap=is_cut_off)
        for row in cells:
            if row:
                table.add_row(*row)
            else:
                table.add_section()
        self.out.print(table)

    def _print_row_by_row(self, names: Sequence[str], cells: Sequence[Sequence[Text]]) -> None:
        """Print a table as a block of names and values for each row."""
        for row in cells:
            if not row:
                continue
            self.say()
            for name, cell in zip(names, row, strict=False):
                self.fact(" ".join(name.split()), cell.plain)

    def note(self, text: str) -> None:
        """Print a line that isn't part of the result."""
        self.err.say(text)

    def fail(self, text: str) -> None:
        """Print the single line that ends a failed command."""
        self.note(f"drllm: {' '.join(text.split())}")

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show what is being done inside a block whose progress can't be measured."""
        if self.err.is_terminal:
            return self.err.status(Text(what))  # rich reads markup in a str, such as "[old]"
        return busy_lines(self.err, what)

    def progress(self, title: str, unit: str) -> Progress:
        """Return a display of how far the work `title` is, counted in `unit` (see `Progress`)."""
        return Progress(self.err, title, unit)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Show drllm's own warnings inside the block, and hide all other warnings.

        A warning is a log record or comes from Python's `warnings`.
        """
        logger = logging.getLogger("drllm")
        handler = _NoteHandler(self)
        propagate_before = logger.propagate
        show_before = warnings.showwarning
        logger.propagate = False
        logger.addHandler(handler)
        warnings.showwarning = _log_own_warning
        try:
            yield
        finally:
            warnings.showwarning = show_before
            logger.removeHandler(handler)
            logger.propagate = propagate_before


class _NoteHandler(logging.Handler):
    """Prints log records of drllm as notes of a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.note(f"drllm: {record.levelname.lower()}: {record.getMessage()}")


def _log_own_warning(
    message: Any, category: type[Warning], filename: str, *_: Any, **__: Any
) -> None:
    """Log a warning that drllm's own code raised, and ignore all other warnings.

    It replaces `warnings.showwarning`, whose other parameters it doesn't use.
    """
    if issubclass(category, UserWarning) and PACKAGE in Path(filename).resolve().parents:
        logging.getLogger("drllm").warning("%s", message)


def draw_route(decisions: Sequence[int]) -> Text:
    """Draw decisions as one character per layer, with numbers above and a legend below.

    The three decisions differ in their characters and not only in colour.
    """
    drawing = Text()
    margin = " " * len("layer  ")
    for start in range(0, len(decisions), LAYERS_PER_ROW):
        row = decisions[start : start + LAYERS_PER_ROW]
        ticks = ""
        for layer in range(start, start + len(row), TICK):
            ticks += f"{layer:<{TICK}}"
        drawing.append(f"layer  {ticks.rstrip()}\n{margin}")
        for value in row:
            drawing.append(sketch([value]), style=STYLES[Decision(value)])
        drawing.append("\n")
    legend = []
    for decision, style in STYLES.items():
        mark = (sketch([decision]), style)
        legend.append(Text.assemble(mark, f" {decision.name.lower()}"))
    return drawing.append(margin).append_text(Text("  ").join(legend))


def _to_text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell


def _read_column(name: str, place: int, cells: Sequence[Sequence[Text]]) -> list[str]:
    """Return the name of a column and the texts of its cells; a row may have fewer cells."""
    return [name, *(row[place].plain for row in cells if place < len(row))]


def _measure_widths(texts: Sequence[str], max_width: int | None) -> tuple[int, int]:
    """Return the widths of a column's longest word and longest line, both at most `max_width`."""
    longest_word = 0
    longest_line = 0
    for text in texts:
        for word in text.split():
            longest_word = max(longest_word, cell_len(word))
        for line in text.split("\n"):
            longest_line = max(longest_line, cell_len(line))
    if max_width is None:
        return longest_word, longest_line
    return min(longest_word, max_width), min(longest_line, max_width)


def _fit_widths(room: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Choose the widths of columns so that all columns fit; return None if they can't fit.

    Args:
        room: The width of all columns together.
        ranges: The minimum and the maximum width of each column.
    """
    if sum(minimum for minimum, _ in ranges) > room:
        return None
    widths = [maximum for _, maximum in ranges]
    while sum(widths) > room:
        places = [place for place, (minimum, _) in enumerate(ranges) if widths[place] > minimum]
        widest = max(places, key=lambda place: widths[place])
        widths[widest] -= 1
    return widths


class _Console(Console):
    """A console of rich that shows control characters in a text instead of obeying them."""

    def __init__(self, *, stderr: bool) -> None:
        # `sys.stderr` is looked up now, so notes appear even while other code redirects it.
        file = sys.stderr if stderr else None
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)
        if not self.is_terminal:
            self.width = UNBROKEN

    def say(self, text: str, indent: int = 0) -> None:
        """Print lines; on a terminal, break long lines at words and indent the continuations."""
        text = printable(text)
        if self.width < UNBROKEN:
            lines = [self._wrap(line, indent) for line in text.split("\n")]
            text = "\n".join(lines)
        self.print(text, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Let `main` find out which pipe is closed; rich would end the command with status 1."""
        raise  # the BrokenPipeError that rich is handling

    def _wrap(self, line: str, indent: int) -> str:
        """Break a line at words; indent the continuation less if a long word needs the room."""
        longest_word = max((len(word) for word in line.split()), default=0)
        indent = max(0, min(indent, self.width - longest_word))
        wrapped = textwrap.wrap(
            line,
            self.width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
        return "\n".join(wrapped)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, but write control characters in texts as escapes."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))
