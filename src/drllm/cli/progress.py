"""Shows how far a stage is: a bar on a terminal, plain lines elsewhere.

The bar has a spinner and the time so far, which go on while nothing is reported.

Plain lines have no control characters. A line is printed after every tenth of the work and at least
every 5 seconds in the first minute, every 10 seconds later, so that a log shows that the work goes
on. The time left is shown only once its estimate is steady.
"""

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from drllm.work.listener import RESUMED_WITHIN_S, format_duration, format_rough_duration

NUM_STEPS = 10  # a plain line is printed after each tenth of the work
MIN_PAUSE_S = 10.0  # minimum time between two lines after a tenth
FIRST_LINE_S = 1.5  # maximum time until the first plain line
MAX_PAUSE_S = 5.0  # maximum time between two plain lines in the first minute
LATER_MAX_PAUSE_S = 10.0  # the same after the first minute, so that a log of hours isn't too long
FIRST_MINUTE_S = 60.0
BAR_WIDTH = 10  # columns; on a terminal with 60 columns there is room for the time left too
STEADY = 0.2
"""An estimate is steady if recent estimates differ from it by at most this share.

The recent estimates are those in the latter half of the elapsed time.
"""
MIN_ESTIMATES = 3  # minimum recent estimates of a steady estimate
SPACING = 1.1  # minimum ratio of the elapsed times of two successive estimates that are stored


class TimeLeft:
    """Estimates the time that is left from the rate so far, once the estimate is steady.

    Args:
        now: The time when the work begins, in seconds.
        done: Work that an earlier run did, in any unit.
    """

    def __init__(self, now: float, done: float) -> None:
        self._started = now
        self._counted_from = now  # the rate is counted from this time on
        self._done_before = done
        self._estimates: list[tuple[float, float]] = []
        """Pairs of the elapsed seconds and the estimate of the seconds in all."""

    def update(self, now: float, done: float, total: float) -> float | None:
        """Record the work that is done, and return the seconds left.

        Returns None while the estimate is unsteady.
        """
        if now - self._started < RESUMED_WITHIN_S:
            self._done_before = done
            self._counted_from = now
        elapsed = now - self._counted_from
        num_done = done - self._done_before
        if elapsed <= 0 or num_done <= 0:
            return None
        estimate = elapsed * (total - self._done_before) / num_done  # seconds in all
        if not self._estimates or elapsed >= SPACING * self._estimates[-1][0]:
            self._estimates.append((elapsed, estimate))
        if not self._is_steady(elapsed, estimate):
            return None
        return estimate - elapsed

    def _is_steady(self, elapsed: float, estimate: float) -> bool:
        """Tell whether the recent estimates agree with this estimate (see `STEADY`)."""
        recent = [earlier for moment, earlier in self._estimates if moment >= elapsed / 2]
        if len(recent) < MIN_ESTIMATES:
            return False
        return all(abs(earlier - estimate) <= STEADY * estimate for earlier in recent)


class StatusLines:
    """Prints a plain line soon after the start, and then one every few seconds.

    It is a context manager. Inside the block, a thread prints the lines.

    Args:
        console: Where lines are printed.
        describe: Returns the line to print; its argument is the seconds since the start.
    """

    def __init__(self, console: Console, describe: Callable[[float], str]) -> None:
        self._console = console
        self._describe = describe
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_LINE_S
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "StatusLines":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def print(self, text: str) -> None:
        """Print a line now; the next line that shows the time comes a pause later."""
        now = time.monotonic()
        pause = MAX_PAUSE_S if now - self._started < FIRST_MINUTE_S else LATER_MAX_PAUSE_S
        self._next_line = now + pause
        self._console.print(text, soft_wrap=True)

    def print_if_due(self) -> float:
        """Print a line if the pause since the last line is over; return the seconds to wait."""
        now = time.monotonic()
        if now >= self._next_line:
            self.print(self._describe(now - self._started))
        return max(0.0, self._next_line - time.monotonic())

    def _run(self) -> None:
        seconds_to_wait = self.print_if_due()
        while not self._is_over.wait(seconds_to_wait):
            seconds_to_wait = self.print_if_due()


def busy_lines(console: Console, title: str) -> StatusLines:
    """Return plain lines for work whose progress can't be measured."""

    def describe(seconds: float) -> str:
        if seconds < MAX_PAUSE_S:
            return f"{title} …"
        return f"{title}: {format_duration(seconds)} so far"

    return StatusLines(console, describe)


class Progress:
    """Shows what a stage does, how far it is, and how long it will still take.

    It is a context manager. Inside the block it is called as `progress(done, total, note)`, as
    `listener.OnProgress` explains. Text that is too wide for the terminal is cut off at its end.

    Args:
        console: Where the progress is shown.
        title: What is being done.
        unit: What is counted, in the plural ("questions"); empty to show only the percentage.
    """

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self.console = console
        self.title = title
        self.unit = unit
        self.bar: Bar | None = None
        self.task = TaskID(0)
        self.lines = StatusLines(console, self._status_line)
        self._begin(0.0)

    def _begin(self, done: float) -> None:
        """Begin a part of the stage; some of its work may be done already."""
        self.started = time.monotonic()
        self.printed_at = self.started
        self.printed_step = 0
        self.done = done
        self.total = 0.0
        self.note = ""
        self.time_left = TimeLeft(self.started, done)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._start_bar()
        else:
            self.lines.__enter__()
        self._begin(0.0)  # the time counts from here
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is None:
            self.lines.__exit__()
        else:
            self.bar.stop()

    def _start_bar(self) -> None:
        texts = ("{task.description}", "{task.percentage:3.0f} %", "{task.fields[state]}")
        title, share, state = (TextColumn(text, markup=False) for text in texts)
        spinner = SpinnerColumn()
        elapsed = TimeElapsedColumn()
        bar = BarColumn(BAR_WIDTH)
        columns = (spinner, title, bar, share, elapsed, state)
        # A thread of rich draws it anew ten times a second.
        self.bar = Bar(*columns, console=self.console, get_time=time.monotonic)
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=None, state="")

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Show how much of the total is done, and what is being worked on."""
        now = time.monotonic()
        if done < self.done:
            self._begin(done)
            if self.bar is not None:
                self.bar.reset(self.task)  # the time so far is this part's
        seconds_left = self.time_left.update(now, done, total)
        self.done = done
        self.total = total
        self.note = note
        if self.bar is not None:
            self._update_bar(self.bar, ", ".join(self._describe(now, seconds_left)))
        elif self._is_line_due(now):
            self.printed_step = self._step
            self.printed_at = now
            self.lines.print(self._plain_line(now, seconds_left))

    @property
    def _step(self) -> int:
        """How many tenths of the work are done."""
        if not self.total:
            return NUM_STEPS
        return int(NUM_STEPS * self.done / self.total)

    def _is_line_due(self, now: float) -> bool:
        """Tell whether to print a plain line: at the end, or after a tenth of the work.

        Lines after a tenth have at least `MIN_PAUSE_S` between them.
        """
        if self._step <= self.printed_step:
            return False
        return self.done >= self.total or now - self.printed_at >= MIN_PAUSE_S

    def _describe(self, now: float, seconds_left: float | None) -> list[str]:
        """Return the parts of the text after the percentage, the most important first.

        They are the time left, the first phrase of the note, the counts, and the rest of the note.
        At the end they are the counts.
        """
        is_over = self.done >= self.total
        parts: list[str] = []
        if self.note and not is_over:
            parts = self.note.split(", ")
        if self.unit:
            parts.insert(1, f"{int(self.done)}/{int(self.total)} {self.unit}")
        if seconds_left is not None and not is_over:
            parts.insert(0, f"about {format_rough_duration(seconds_left)} left")
        return parts

    def _update_bar(self, bar: Bar, text: str) -> None:
        """Show the bar on a terminal, with as much of the text as there is room for."""
        columns_before = len(f"⠋ {self.title} ") + BAR_WIDTH + len(" 100 % 00:00:00 ")
        room = self.console.width - columns_before
        if len(text) > room:
            text = text[: max(0, room - 1)] + "…"
        bar.update(self.task, completed=self.done, total=self.total, state=text)

    def _plain_line(self, now: float, seconds_left: float | None) -> str:
        percentage = 100.0
        if self.total:
            percentage = 100 * self.done / self.total
        parts = [f"{percentage:.0f} %", *self._describe(now, seconds_left)]
        if self.done >= self.total:
            parts.append(format_duration(now - self.started))
        return f"{self.title}: {', '.join(parts)}"

    def _status_line(self, seconds: float) -> str:
        """Return the line that the thread prints to show that the work goes on."""
        so_far = f"{format_duration(seconds)} so far"
        if not self.total:
            return f"{self.title}: {so_far}"
        now = time.monotonic()
        seconds_left = self.time_left.update(now, self.done, self.total)
        return f"{self._plain_line(now, seconds_left)}, {so_far}"
