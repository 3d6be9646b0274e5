"""A search as people read it: what it found and spent, and one question's paths as a tree.

Loads no torch. Axes: L layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.text import Text

from drllm.cli.terminal import Terminal, new_table
from drllm.config import SuperviseConfig
from drllm.cost import distinct_executions
from drllm.errors import RecordError
from drllm.listener import duration
from drllm.paths import Decision, Decisions
from drllm.records import FailedQuestion, Retest, SearchRecord, TriedPath, read_manifest
from drllm.reporting.edits import EditEffect, edit_effects
from drllm.reporting.numbers import count, of_total, percent, plain, signed
from drllm.search import num_batches_kept
from drllm.search.actions import MAX_SKIPPED_AT_ONCE, Action
from drllm.supervision.rules import candidates, is_valid, survived
from drllm.supervision.summary import KINDS, summarise

BEST, WORST = 5, 3
"""Layers that a table of edits shows from either end."""
OFTEN = 0.2
"""An edit is ranked if it was tried on this share of the questions of the most tried one."""
_TITLES = {Decision.SKIP: "skipped", Decision.REPEAT: "repeated"}
NEAREST = 3
"""Ids that are offered where one is unknown."""
ANSWER_WIDTH = 14
"""Columns for what a path answered."""


def show_search(records: Sequence[SearchRecord], terminal: Terminal, *, edits: bool = True) -> None:
    """Print what a search found and what it spent.

    With `edits`, layers are ranked by what skipping or repeating them alone did.
    """
    n = len(records)
    counts = summarise(records, [], {})
    paths = [path for record in records for path in record.paths]
    rewards = ", ".join(sorted({record.reward for record in records}))
    copies = f" and {count(counts['copies'])} copies" if counts["copies"] else ""
    terminal.fact(
        "questions",
        f"{count(counts['questions'])}{copies}, {records[0].num_layers} layers, reward {rewards}",
    )
    terminal.fact("paths tried", f"{count(len(paths))}, {plain(len(paths) / n)} a question")
    _show_yields(counts, terminal)
    asked_again = [path for path in paths if path.retest is not None]
    left = sum(survived(path) for path in asked_again)
    terminal.fact(
        "re-test",
        f"{count(len(asked_again))} paths asked again, {of_total(left, len(asked_again))} survived",
    )
    _say_executions(records, terminal)
    seconds = sum(record.seconds for record in records)
    rate = f", {plain(len(paths) / seconds)} paths a second" if seconds > 0 else ""
    terminal.fact("time", f"{duration(seconds)}, {plain(seconds / n)} s a question{rate}")
    for decision, title in _TITLES.items() if edits else ():
        _show_edits(least_harmful_first(records, decision), title, terminal)


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
    terminal.fact(
        "executions",
        f"{count(asked)} asked by paths, {of_total(distinct, asked)} distinct in a question",
    )
    shortest = [
        min(path.executions for path in record.paths if survived(path))
        for record in records
        if any(survived(path) for path in record.paths)
    ]
    if shortest:
        terminal.fact(
            "shortest",
            f"{plain(fmean(shortest), 2)} executions of {records[0].num_layers} for the shortest "
            f"surviving path, mean of {count(len(shortest))}",
        )


# --- single edits ------------------------------------------------------------------------------


def least_harmful_first(records: Sequence[SearchRecord], decision: Decision) -> list[EditEffect]:
    """Return what single edits did, the least harmful first: by KL, else margin, else answers."""
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
        terminal.fact(f"one {title}", "never tried alone")
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
    """Print the questions that a search has set aside, each with its last error."""
    terminal.fact("failed", f"{count(len(questions))} questions were set aside by the search")
    table = new_table("task", "id", "attempts", "last error")
    for question in questions:
        texts = (question.task, question.id, count(question.attempts), question.error)
        table.add_row(*map(Text, texts))
    terminal.show(table)


def show_unfinished(folder: Path, terminal: Terminal) -> None:
    """Print how far an interrupted search is."""
    terminal.fact(
        "search",
        f"not finished: {count(num_batches_kept(folder))} batches of questions are kept; if it "
        f"isn't running, run the same command to resume it",
    )


# --- one question ------------------------------------------------------------------------------


def show_question(
    records: Sequence[SearchRecord], question: str, place: Path, terminal: Terminal
) -> None:
    """Draw the tree of every question that has an id; ids are unique within a task only.

    Raises:
        RecordError: No question of this id; the nearest ids are named.
    """
    found = [record for record in records if record.id == question]
    if not found:
        ids = list(dict.fromkeys(record.id for record in records))
        near = difflib.get_close_matches(question, ids, n=NEAREST, cutoff=0.0)
        raise RecordError(
            f"{place} has no question with id {question!r}; nearest of {len(ids)}: "
            f"{', '.join(near)}"
        )
    for number, record in enumerate(found):
        if number:
            terminal.say()
        _show_head(record, _rule_of(place), terminal)
        _show_tree(record, terminal)


def _rule_of(search_file: Path) -> SuperviseConfig:
    """Return how targets are chosen: as for the supervision.jsonl next to the search, if any."""
    manifest = read_manifest(search_file.with_name("supervision.jsonl"), "supervision") or {}
    known = ("target", "min_saving")
    config = {name: manifest.get("config", {}).get(name) for name in known}
    return SuperviseConfig(**{name: value for name, value in config.items() if value is not None})


def _show_head(record: SearchRecord, config: SuperviseConfig, terminal: Terminal) -> None:
    terminal.say(f"question       {record.id} of {record.task}, {record.num_layers} layers")
    terminal.show(Text(record.question))
    terminal.say(f"answer         {record.answer}")
    terminal.say(f"paths          {len(record.paths)} tried, reward {record.reward}")
    found = candidates(record, config.target, min_saving=config.min_saving)
    if isinstance(found, str):
        terminal.say(f"target         none: {found}")
    else:
        terminal.say(
            f"target         #{found[0].simulation}, {plain(found[0].executions)} executions "
            f"(rule {config.target})"
        )


def _show_tree(record: SearchRecord, terminal: Terminal) -> None:
    names = ["path", "#", "right", "margin", "executions", "kl", "re-test"]
    generated = any(path.answer is not None for path in record.paths)
    table = new_table(*names, numbers_from=1)
    if generated:  # its beginning, so that a path stays one line
        table.add_column("answered", no_wrap=True, max_width=ANSWER_WIDTH)
    by_decisions = {path.decisions: path for path in record.paths}
    for decisions, label in draw_paths(record.paths):
        path = by_decisions[decisions]
        table.add_row(
            Text(label, style="bold" if is_valid(path) else "dim"),
            str(path.simulation),
            _outcome(path),
            plain(path.margin, 2),
            plain(path.executions),
            plain(path.kl, 3),
            _retested(path.retest),
            *[Text(" ".join((path.answer or "").split()))] * generated,
        )
    terminal.show(table)
    terminal.say("re-test: other ways of asking that were answered right; + survived, − did not")


def _outcome(path: TriedPath) -> str:
    names = {0.0: "no", 1.0: "yes"}
    return names.get(path.reward, plain(path.reward, 2))


def _retested(retest: Retest | None) -> str:
    if retest is None:
        return ""
    return f"{'+' if retest.survived else '−'} {retest.passed} of {retest.asked}"


# --- the tree ----------------------------------------------------------------------------------


def draw_paths(paths: Sequence[TriedPath]) -> Iterator[tuple[Decisions, str]]:
    """Draw tried paths as a tree of edits.

    A path stands below the tried path from which one edit leads to it, the one that was tried
    first where there are several; where there is none, below the one from which the fewest edits
    do. A path that is the only one below another follows it at the same depth, after "then", so
    that a long chain of edits stays narrow.

    Args:
        paths: One question's, the full path first.

    Yields:
        The decisions of a path and its line, from the top down.
    """
    parents = {path.decisions: _parent(path, paths) for path in paths[1:]}
    below: dict[Decisions, list[Decisions]] = {path.decisions: [] for path in paths}
    for path in sorted(paths[1:], key=lambda path: path.simulation):
        below[parents[path.decisions]].append(path.decisions)
    full = paths[0].decisions
    yield full, "full path"
    yield from _branches(full, below, "")


def _branches(
    above: Decisions, below: Mapping[Decisions, Sequence[Decisions]], lead: str
) -> Iterator[tuple[Decisions, str]]:
    children = below[above]
    for number, child in enumerate(children, start=1):
        edit = ", ".join(map(str, edits_between(above, child) or ()))
        if len(children) == 1:
            mark, inner = "then ", lead
        elif number < len(children):
            mark, inner = "├ ", lead + "│ "
        else:
            mark, inner = "└ ", lead + "  "
        yield child, lead + mark + edit
        yield from _branches(child, below, inner)


def _parent(path: TriedPath, paths: Sequence[TriedPath]) -> Decisions:
    reached = (
        (len(edits), other.simulation, other.decisions)
        for other in paths
        if (edits := edits_between(other.decisions, path.decisions))
    )
    return min(reached)[2]


def edits_between(before: Decisions, after: Decisions) -> list[Action] | None:
    """Return the fewest edits that lead from one path to another.

    Returns:
        Edits by layer, none where the two are equal; None where no edits lead there, since an edit
        only changes layers that are executed once.

    Example:
        >>> [str(edit) for edit in edits_between((1, 1, 1, 1, 2), (0, 0, 0, 1, 2))]
        ['skip 0-1', 'skip 2']
    """
    edits: list[Action] = []
    layer = 0
    while layer < len(after):
        if before[layer] == after[layer]:
            layer += 1
            continue
        if before[layer] != Decision.EXECUTE:
            return None
        span = 1
        if after[layer] == Decision.SKIP:
            while (
                span < MAX_SKIPPED_AT_ONCE
                and layer + span < len(after)
                and before[layer + span] == Decision.EXECUTE
                and after[layer + span] == Decision.SKIP
            ):
                span += 1
        edits.append(Action(layer, span, Decision(after[layer])))
        layer += span
    return edits
