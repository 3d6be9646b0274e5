"""Draws the paths of one searched question as a tree (`drllm show --question ID`).

This module doesn't import torch.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from drllm.cli.terminal import Terminal
from drllm.config import SuperviseConfig
from drllm.errors import RecordError
from drllm.paths import Decision, Decisions
from drllm.records.manifest import read_manifest
from drllm.records.search import SearchRecord, TriedPath
from drllm.records.supervision import SUPERVISION_FILE
from drllm.reporting.numbers import write_number
from drllm.search.actions import MAX_SKIPPED_AT_ONCE, Action
from drllm.supervision.rules import find_candidates, is_valid

ANSWER_WIDTH = 14  # columns for a path's answer; a longer answer is cut off


def show_question(
    records: Sequence[SearchRecord], question_id: str, file: Path, terminal: Terminal
) -> None:
    """Print every question with this id, and draw its paths.

    Questions of several tasks may have the same id.

    Args:
        records: The records of the search.
        question_id: The id.
        file: The file of the records. If there is a supervision.jsonl beside it, its rule chooses
            the target that is printed.
        terminal: Where the questions are printed.

    Raises:
        RecordError: No question has the id.
    """
    matches = [record for record in records if record.id == question_id]
    if not matches:
        ids = list(dict.fromkeys(record.id for record in records))
        nearest_ids = difflib.get_close_matches(question_id, ids, n=3, cutoff=0.0)
        raise RecordError(
            f"{file} has no question with id {question_id!r}; nearest of {len(ids)}: "
            f"{', '.join(nearest_ids)}"
        )
    manifest = read_manifest(file.with_name(SUPERVISION_FILE), "supervision") or {}
    settings = SuperviseConfig().to_dict()
    settings.update(manifest.get("config", {}))
    for number, record in enumerate(matches):
        if number > 0:
            terminal.say()
        _print_question(record, settings, terminal)


def _print_question(record: SearchRecord, settings: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a question, its target under these settings, and the tree of its paths."""
    terminal.fact("question", f"{record.id} of {record.task}, {record.num_layers} layers")
    terminal.say(record.question)
    terminal.fact("answer", record.answer)
    terminal.fact("paths", f"{len(record.paths)} tried, reward {record.reward}")
    terminal.fact("target", _describe_target(record, settings))
    _print_tree(record, terminal)


def _describe_target(record: SearchRecord, settings: Mapping[str, Any]) -> str:
    """Return the number and the executions of the target, or the reason why there is none."""
    rule = settings["target"]
    candidates = find_candidates(record, rule, min_saving=settings["min_saving"])
    if isinstance(candidates, str):
        reason = candidates
        return f"none: {reason}"
    target = candidates[0]
    return f"#{target.simulation}, {write_number(target.executions)} executions (rule {rule})"


def _print_tree(record: SearchRecord, terminal: Terminal) -> None:
    """Print a question's paths as a tree of edits, with one line per path."""
    paths_by_decisions = {path.decisions: path for path in record.paths}
    has_answers = any(path.answer is not None for path in record.paths)
    columns = "path|#|right|margin|executions|kl|re-test"
    if has_answers:
        columns += "|answered"
    rows: list[list[str | Text]] = []
    for decisions, label in draw_paths(record.paths):
        path = paths_by_decisions[decisions]
        style = "bold" if is_valid(path) else "dim"
        cells: list[str | Text] = [
            Text(label, style=style),
            str(path.simulation),
            _describe_reward(path.reward),
            write_number(path.margin, 2),
            write_number(path.executions),
            write_number(path.kl, 3),
            _describe_retest(path),
        ]
        if has_answers:
            answer = path.answer or ""
            cells.append(" ".join(answer.split()))  # on one line
        rows.append(cells)
    terminal.table(columns, rows, numbers_from=1, cut_off=("answered", ANSWER_WIDTH))
    terminal.say("re-test: variants of the prompt that were answered right; + survived, − did not")


def _describe_reward(reward: float) -> str:
    """Tell whether a path answered right; a reward between 0 and 1 is written as a number."""
    if reward == 0:
        return "no"
    if reward == 1:
        return "yes"
    return write_number(reward, 2)


def _describe_retest(path: TriedPath) -> str:
    """Describe the re-test of a path, for example `+ 3 of 4`; empty without a re-test."""
    retest = path.retest
    if retest is None:
        return ""
    sign = "+" if retest.survived else "−"
    return f"{sign} {retest.passed} of {retest.asked}"


def draw_paths(paths: Sequence[TriedPath]) -> Iterator[tuple[Decisions, str]]:
    """Draw one question's paths as a tree of edits: yield the decisions and the line of each path.

    The full path is the root and comes first. The parent of a path is the path from which the
    fewest edits lead to it. If several paths are equally near, the path that was tried first is the
    parent.

    An only child isn't indented. The word "then" stands before it, so that a long chain of edits
    stays narrow:

        full path
        ├ skip 1
        │ then skip 3
        └ repeat 2
    """
    children: dict[Decisions, list[Decisions]] = {path.decisions: [] for path in paths}
    for path in sorted(paths[1:], key=lambda path: path.simulation):
        children[_find_parent(path, paths)].append(path.decisions)
    root = paths[0].decisions
    yield root, "full path"
    yield from _draw_branches(root, children, "")


def _find_parent(path: TriedPath, paths: Sequence[TriedPath]) -> Decisions:
    """Return the decisions of a path's parent, from which the fewest edits lead to the path."""
    options = []
    for candidate in paths:
        edits = edits_between(candidate.decisions, path.decisions)
        if edits:  # there are none from the path itself
            options.append((len(edits), candidate.simulation, candidate.decisions))
    _, _, parent = min(options)
    return parent


def _draw_branches(
    parent: Decisions, children: Mapping[Decisions, Sequence[Decisions]], lead: str
) -> Iterator[tuple[Decisions, str]]:
    """Yield the decisions and the line of every path below a path.

    Args:
        parent: The decisions of the path.
        children: The children of every path.
        lead: What every line begins with: the lines that join the path's ancestors.
    """
    siblings = children[parent]
    for number, child in enumerate(siblings, start=1):
        if len(siblings) == 1:
            mark = "then "
            indent = ""
        elif number < len(siblings):
            mark = "├ "
            indent = "│ "
        else:
            mark = "└ "
            indent = "  "
        edits = edits_between(parent, child) or []
        yield child, lead + mark + ", ".join(map(str, edits))
        yield from _draw_branches(child, children, lead + indent)


def edits_between(before: Decisions, after: Decisions) -> list[Action] | None:
    """Return the fewest edits that turn one path into another, or None if no edits do.

    Only layers that the first path executes exactly once can be edited.
    """
    edits: list[Action] = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        if old != Decision.EXECUTE:
            return None
        if new == Decision.SKIP and edits and _can_extend(edits[-1], layer):
            last = edits.pop()
            edits.append(Action(last.layer, last.span + 1, Decision.SKIP))
        else:
            edits.append(Action(layer, 1, Decision(new)))
    return edits


def _can_extend(edit: Action, layer: int) -> bool:
    """Tell whether an edit can also skip this layer: it skips the layers just before it."""
    is_skip = edit.decision == Decision.SKIP
    is_next = edit.layer + edit.span == layer
    return is_skip and is_next and edit.span < MAX_SKIPPED_AT_ONCE
