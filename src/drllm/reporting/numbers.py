"""Writes numbers and verdicts for reports and tables, with digits, units and signs."""

from drllm.records.markdown import NBSP
from drllm.records.results import System
from drllm.statistics import words
from drllm.statistics.differences import Verdict
from drllm.statistics.power import round_up

NONE = "–"  # for a missing value


def write_percent(share: float | None, digits: int = 1) -> str:
    """Write a share in percent: 0.25 becomes 25.0 %."""
    return NONE if share is None else f"{write_number(100 * share, digits)}{NBSP}%"


def write_number(value: float | None, digits: int = 1) -> str:
    """Write a number with a fixed number of decimals and a true minus sign; zero has no sign."""
    return NONE if value is None else write_signed(value, digits).removeprefix("+")


def write_signed(value: float | None, digits: int = 3) -> str:
    """Write a change with its sign; a change that rounds to zero has no sign."""
    return NONE if value is None else words.signed(value, digits)


def write_count(number: int | None) -> str:
    """Write a count with commas between thousands."""
    return NONE if number is None else f"{number:,}"


def write_count_of(number: int, one: str, several: str) -> str:
    """Write a number with its noun, such as "1 batch" or "2 batches"."""
    return f"{write_count(number)} {one if number == 1 else several}"


def write_executions(executions: float) -> str:
    """Write a number of executions: 28, or 27.25."""
    return write_number(executions, 2).removesuffix(".00")


def write_milliseconds(seconds: float) -> str:
    """Write a time in milliseconds with about three significant digits."""
    value = 1e3 * seconds
    if value >= 100:
        return write_count(round(value))
    digits = 1 if abs(value) >= 10 else 2
    return write_number(value, digits)


def write_count_with_share(number: int, total: int) -> str:
    """Write a count and its share of a total: 3,000 (75.0 %)."""
    share = number / total if total else None
    return f"{write_count(number)} ({write_percent(share)})"


def write_label(verdict: Verdict | None) -> str:
    """Return the label of a verdict, such as "better"."""
    return NONE if verdict is None else verdict.label


def write_label_with_needed(verdict: Verdict | None) -> str:
    """Return the label of a verdict, and how many questions or texts would do."""
    if verdict is None or verdict.needed is None:
        return write_label(verdict)
    return f"{verdict.label}: about {write_count(round_up(verdict.needed))} would do"


def write_difference(verdict: Verdict | None) -> str:
    """Write a difference with its interval, in points of accuracy or in nats."""
    if verdict is None:
        return NONE
    low, high = (verdict.write(end) for end in verdict.interval)
    return f"{verdict.write(verdict.mean)} ({low}{NBSP}to{NBSP}{high})"


def write_excluded(verdict: Verdict | None) -> str:
    """Write the smallest loss above which every loss is excluded, in points of accuracy or nats."""
    return NONE if verdict is None else verdict.write_excluded()


def get_routed_verdict(system: System | None) -> Verdict | None:
    """Return the verdict on the routed model's accuracy against a baseline."""
    if system is None or system.routed_against is None:
        return None
    return system.routed_against.accuracy
