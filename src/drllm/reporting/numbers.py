"""How numbers are written in a report: digits, units, and what stands where there is none."""

from __future__ import annotations

NONE = "–"
"""Stands for a value that wasn't measured or doesn't exist."""
NBSP = "\u00a0"


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share of 1 in percent.

    Example:
        >>> percent(0.5432).replace(NBSP, " ")
        '54.3 %'
    """
    return NONE if share is None else f"{plain(100 * share, digits)}{NBSP}%"


def plain(value: float | None, digits: int = 1) -> str:
    """Write a number with a fixed number of decimals and a true minus sign.

    Example:
        >>> plain(-0.04, 1), plain(-1.25, 2)
        ('0.0', '−1.25')
    """
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Write a change: always with its sign, except for what rounds to zero.

    Example:
        >>> signed(0.5, 1), signed(-0.5, 1), signed(0.0, 1)
        ('+0.5', '−0.5', '0.0')
    """
    text = plain(value, digits)
    return "+" + text if value is not None and value > 0 and text.strip("0.") else text


def interval(ends: tuple[float, float]) -> str:
    """Write an interval of shares in percent."""
    return f"{plain(100 * ends[0])} to {plain(100 * ends[1])}{NBSP}%"


def p_value(p: float | None) -> str:
    r"""Write a p value; below 0.001 only that it is.

    Example:
        >>> p_value(0.0312), p_value(0.0000001)
        ('0.031', '<\xa00.001')
    """
    if p is None:
        return NONE
    return "<" + NBSP + "0.001" if p < 0.001 else f"{p:.3f}"


def count(number: int | None) -> str:
    """Write a count with thousands kept apart."""
    return NONE if number is None else f"{number:,}".replace(",", NBSP)


def of_total(number: int, total: int) -> str:
    """Write a count and its share of a total.

    Example:
        >>> of_total(3000, 4000).replace(NBSP, " ")
        '3 000 (75.0 %)'
    """
    return f"{count(number)} ({percent(number / total if total else None)})"
