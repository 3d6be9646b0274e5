"""One question's paths as a tree of edits: `drllm show search.jsonl --question ID`.

Owns which path stands below which, and the drawing. Leaves the other questions to `show_search`,
edits and their names to `search.actions`. Loads no torch. Axes: L layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from drllm.cli.tables import new_table
from drllm.cli.terminal import Terminal
from drllm.errors import RecordError
from drllm.paths import Decision, Decisions
from drllm.records import Retest, SearchRecord, TriedPath
from drllm.reporting.numbers import plain
from drllm.search.actions import MAX_SKIPPED_AT_ONCE, Action
from drllm.supervision import choose, is_valid

NEAREST = 3
"""Ids that are offered where one is unknown."""
ANSWER_WIDTH = 14
"""Columns for what a path answered."""


def show_question(
    records: Sequence[SearchRecord], question: str, place: Path, terminal: Terminal
) -> None:
    """Draw the tree of every question that has an id; ids are unique within a task only.

    Args:
        records: Questions of a search.
        question: The id.
        place: The file that they are from, for the message.
        terminal: Where to.

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
        _show_head(record, terminal)
        _show_tree(record, terminal)


def _show_head(record: SearchRecord, terminal: Terminal) -> None:
    terminal.say(f"question       {record.id} of {record.task}, {record.num_layers} layers")
    terminal.show(Text(record.question))
    terminal.say(f"answer         {record.answer}")
    terminal.say(f"paths          {len(record.paths)} tried, reward {record.reward}")
    target = choose(record, "shortest")
    if isinstance(target, str):
        terminal.say(f"target         none: {target}")
    else:
        terminal.say(
            f"target         #{target.simulation}, {plain(target.executions)} executions "
            f"(rule shortest)"
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

    Args:
        before: `[L]`.
        after: `[L]`.

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
