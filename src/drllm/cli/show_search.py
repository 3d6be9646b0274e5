"""The story of a search: what it found by task, what it spent, which single edits were best.

Owns the arithmetic and the printing of `drllm show search.jsonl`, and what is said of questions
that failed and of a search that isn't finished. Leaves one question's paths to `show_question`,
reading and checking to `records`, and which paths count to `supervision`. Loads no torch. Axes: L
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.text import Text

from drllm.cli.tables import new_table
from drllm.cli.terminal import Terminal, duration
from drllm.cost import distinct_executions
from drllm.paths import Decision
from drllm.records import SearchRecord
from drllm.reporting.numbers import NBSP, count, of_total, percent, plain, signed
from drllm.reporting.summary import EditEffect, edit_effects
from drllm.search.commits import PLAN_FILE, read_plan
from drllm.search.counts import FailedQuestion
from drllm.supervision import summarise, survived
from drllm.supervision.summary import KINDS

BEST, WORST = 5, 3
"""Layers that a table of edits shows from either end."""
OFTEN = 0.2
"""An edit is ranked if it was tried on this share of the questions of the most tried one."""


def show_search(records: Sequence[SearchRecord], terminal: Terminal) -> None:
    """Print what a search found and what it spent.

    Args:
        records: Its questions; at least one.
        terminal: Where to.
    """
    n = len(records)
    counts = summarise(records, [], {})
    paths = [path for record in records for path in record.paths]
    rewards = ", ".join(sorted({record.reward for record in records}))
    copies = f" and {count(counts['copies'])} copies" if counts["copies"] else ""
    _say(
        terminal,
        "questions",
        f"{count(counts['questions'])}{copies}, {records[0].num_layers} layers, reward {rewards}",
    )
    _say(terminal, "paths tried", f"{count(len(paths))}, {plain(len(paths) / n)} a question")
    _show_yields(counts, terminal)
    asked_again = [path for path in paths if path.retest is not None]
    left = sum(survived(path) for path in asked_again)
    _say(
        terminal,
        "re-test",
        f"{count(len(asked_again))} paths asked again, {of_total(left, len(asked_again))} survived",
    )
    _say_executions(records, terminal)
    seconds = sum(record.seconds for record in records)
    rate = f", {plain(len(paths) / seconds)} paths a second" if seconds > 0 else ""
    _say(terminal, "time", f"{duration(seconds)}, {plain(seconds / n)} s a question{rate}")
    for decision, title in ((Decision.SKIP, "skipped"), (Decision.REPEAT, "repeated")):
        _show_edits(least_harmful_first(records, decision), title, terminal)


def _say(terminal: Terminal, name: str, text: str) -> None:
    terminal.say(f"{name:14} {text.replace(NBSP, ' ')}")


def _show_yields(counts: Mapping[str, Any], terminal: Terminal) -> None:
    rows = [*counts["tasks"].items()]
    if len(rows) > 1:
        rows.append(("all", counts))
    table = new_table(
        "task",
        "questions",
        "base right",
        *KINDS,
        title="Questions with such a path, as the search found it → after the re-test",
        numbers_from=1,
    )
    for name, row in rows:
        table.add_row(
            Text(name),
            count(row["questions"]),
            of_total(row["base_correct"], row["questions"]),
            *(
                f"{count(row[f'{kind}_before_retest'])} → {count(row[f'{kind}_after_retest'])}"
                for kind in KINDS
            ),
        )
    terminal.show(table)


def _say_executions(records: Sequence[SearchRecord], terminal: Terminal) -> None:
    asked = round(sum(path.executions for record in records for path in record.paths))
    distinct = sum(
        distinct_executions([path.decisions for path in record.paths]) for record in records
    )
    _say(
        terminal,
        "executions",
        f"{count(asked)} asked by paths, {of_total(distinct, asked)} distinct in a question",
    )
    shortest = [
        min(path.executions for path in record.paths if survived(path))
        for record in records
        if any(survived(path) for path in record.paths)
    ]
    if shortest:
        _say(
            terminal,
            "shortest",
            f"{plain(fmean(shortest), 2)} executions of {records[0].num_layers} for the shortest "
            f"surviving path, mean of {count(len(shortest))}",
        )


# --- single edits ------------------------------------------------------------------------------


def least_harmful_first(records: Sequence[SearchRecord], decision: Decision) -> list[EditEffect]:
    """Return what single edits did, the least harmful first: by KL, else margin, else answers.

    Args:
        records: Search records of one model.
        decision: `SKIP` or `REPEAT`.
    """
    return sorted(edit_effects(records, decision), key=_harm)


def _harm(edit: EditEffect) -> tuple[bool, float, bool, float, float, int]:
    """Order edits by what tells most about them; what isn't known comes last."""
    return (
        edit.kl is None,
        edit.kl or 0.0,
        edit.margin is None,
        -(edit.margin or 0.0),
        edit.base_right - edit.right,
        edit.layer,
    )


def _show_edits(edits: Sequence[EditEffect], title: str, terminal: Terminal) -> None:
    if not edits:
        _say(terminal, f"one {title}", "never tried alone")
        return
    least = OFTEN * max(edit.questions for edit in edits)
    ranked = [edit for edit in edits if edit.questions >= least]
    shown = ranked if len(ranked) <= BEST + WORST else [*ranked[:BEST], *ranked[-WORST:]]
    table = new_table(
        "layer",
        "tried",
        "right",
        "base right",
        "kl",
        "margin change",
        title=f"One layer {title}, the others executed once; the least harmful of "
        f"{len(ranked)} layers first",
        numbers_from=0,
    )
    for edit in shown:
        if len(shown) < len(ranked) and edit is ranked[-WORST]:
            table.add_row("…")
        table.add_row(
            str(edit.layer),
            count(edit.questions),
            percent(edit.right),
            percent(edit.base_right),
            plain(edit.kl, 3),
            signed(edit.margin, 2),
        )
    terminal.show(table)


# --- what isn't in search.jsonl ----------------------------------------------------------------


def show_failed(questions: Sequence[FailedQuestion], terminal: Terminal) -> None:
    """Print the questions that a search has set aside, each with its last error.

    Args:
        questions: Those of a file; at least one.
        terminal: Where to.
    """
    _say(terminal, "failed", f"{count(len(questions))} questions were set aside by the search")
    table = new_table("task", "id", "attempts", "last error")
    for question in questions:
        texts = (question.task, question.id, count(question.attempts), question.error)
        table.add_row(*map(Text, texts))
    terminal.show(table)


def show_unfinished(folder: Path, terminal: Terminal) -> None:
    """Print how far a search is that has committed blocks and is still to be joined.

    Args:
        folder: Where its blocks lie.
        terminal: Where to.

    Raises:
        RecordError: A plan that can't be read.
    """
    committed = sum(file.stem.isdecimal() for file in folder.glob("*.jsonl"))
    total = (
        read_plan(folder / PLAN_FILE).get("num_blocks") if (folder / PLAN_FILE).is_file() else None
    )
    of_all = f" of {count(total)}" if isinstance(total, int) else ""
    _say(
        terminal,
        "search",
        f"not finished: {count(committed)}{of_all} blocks of questions are committed; if it isn't "
        f"running, the same command goes on behind them",
    )
