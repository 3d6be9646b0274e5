"""Prints searches and targets, and draws the paths of one question as a tree.

This module doesn't import torch.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.text import Text

from drllm.cli.terminal import Terminal
from drllm.config import SuperviseConfig
from drllm.cost import distinct_executions
from drllm.errors import RecordError
from drllm.listener import duration
from drllm.paths import Decision, Decisions
from drllm.records.codec import read_json_lines
from drllm.records.manifest import read_manifest
from drllm.records.search import FailedQuestion, SearchRecord, TriedPath, read_search
from drllm.records.supervision import RejectedQuestion, read_supervision, rejected_path
from drllm.reporting.numbers import count, of_total, percent, plain
from drllm.search import count_kept_batches
from drllm.search.actions import MAX_SKIPPED_AT_ONCE, Action
from drllm.supervision.rules import find_candidates, is_valid, survived
from drllm.supervision.summary import KINDS, summarise

ANSWER_WIDTH = 14  # columns for a path's answer; the rest of the answer is cut off


def show_search(records: Sequence[SearchRecord], terminal: Terminal) -> None:
    """Print the results of a search, its executions and its time."""
    num_layers = records[0].num_layers
    counts = summarise(records, [], {})
    paths = [path for record in records for path in record.paths]
    rewards = ", ".join(sorted({record.reward for record in records}))
    questions = count(counts["questions"])
    if counts["copies"]:
        questions += f" and {count(counts['copies'])} copies"
    terminal.fact("questions", f"{questions}, {num_layers} layers, reward {rewards}")
    per_question = plain(len(paths) / len(records))
    terminal.fact("paths tried", f"{count(len(paths))}, {per_question} a question")
    _print_counts(counts, terminal)
    _print_retest(paths, terminal)
    _print_executions(records, paths, terminal)
    _print_shortest(records, num_layers, terminal)
    _print_search_time(records, len(paths), terminal)


def _print_retest(paths: Sequence[TriedPath], terminal: Terminal) -> None:
    retested = [path for path in paths if path.retest is not None]
    num_survived = sum(1 for path in retested if survived(path))
    share = of_total(num_survived, len(retested))
    terminal.fact("re-test", f"{count(len(retested))} paths tested again, {share} survived")


def _print_executions(
    records: Sequence[SearchRecord], paths: Sequence[TriedPath], terminal: Terminal
) -> None:
    """Print the executions of all paths, and how many are distinct within a question."""
    total = round(sum(path.executions for path in paths))
    num_distinct = 0
    for record in records:
        num_distinct += distinct_executions([path.decisions for path in record.paths])
    distinct = of_total(num_distinct, total)
    terminal.fact("executions", f"{count(total)} in all paths, {distinct} distinct in a question")


def _print_shortest(records: Sequence[SearchRecord], num_layers: int, terminal: Terminal) -> None:
    shortest = []
    for record in records:
        executions = [path.executions for path in record.paths if survived(path)]
        if executions:
            shortest.append(min(executions))
    if shortest:
        terminal.fact(
            "shortest",
            f"{plain(fmean(shortest), 2)} executions of {num_layers} for the shortest surviving "
            f"path, mean of {count(len(shortest))}",
        )


def _print_search_time(records: Sequence[SearchRecord], num_paths: int, terminal: Terminal) -> None:
    seconds = sum(record.seconds for record in records)
    text = f"{duration(seconds)}, {plain(seconds / len(records))} s a question"
    if seconds > 0:
        text += f", {plain(num_paths / seconds)} paths a second"
    terminal.fact("time", text)


def _print_counts(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print for each task how many questions have a path of each kind, or a target."""
    rows = dict(summary.get("tasks", {}))
    if len(rows) != 1:
        improving = [row["improving_targets"] for row in rows.values()]
        rows["all"] = {**summary, "improving_targets": sum(improving) if improving else None}
    target_columns = ["targets", "improving_targets"] if summary["targets"] else []
    columns = ["task", "questions", "base right", *KINDS, *target_columns]
    cells = []
    for task, row in rows.items():
        base_right = of_total(row["base_correct"], row["questions"])
        line = [task, count(row["questions"]), base_right]
        for kind in KINDS:
            before = count(row[f"{kind}_before_retest"])
            after = count(row[f"{kind}_after_retest"])
            line.append(f"{before} → {after}")
        line += [count(row[name]) for name in target_columns]
        cells.append(line)
    terminal.table(
        "|".join(columns).replace("_", "\n"),
        cells,
        title="Questions with such a path: found by the search → confirmed by the re-test",
        numbers_from=1,
    )


def show_failed(path: Path, terminal: Terminal) -> None:
    """Print the questions that failed in a search, and the last error of each question."""
    questions = [question for _, question in read_json_lines(path, FailedQuestion)]
    terminal.fact("failed", f"{count(len(questions))} questions failed and were set aside")
    rows = [(one.task, one.id, count(one.attempts), one.error) for one in questions]
    terminal.table("task|id|attempts|last error", rows)


def show_unfinished(folder: Path, terminal: Terminal) -> None:
    """Print how many batches of an unfinished search are done."""
    terminal.fact(
        "search",
        f"not finished: {count(count_kept_batches(folder))} batches of questions are kept; if it "
        f"isn't running, run the same command to resume it",
    )


def show_question(
    records: Sequence[SearchRecord], question: str, place: Path, terminal: Terminal
) -> None:
    """Draw the paths of every question with this id; questions of several tasks may share it."""
    chosen = [record for record in records if record.id == question]
    if not chosen:
        ids = list(dict.fromkeys(record.id for record in records))
        nearest = difflib.get_close_matches(question, ids, n=3, cutoff=0.0)
        raise RecordError(
            f"{place} has no question with id {question!r}; nearest of {len(ids)}: "
            f"{', '.join(nearest)}"
        )
    # If there is a supervision.jsonl beside the search, the rule of that file is used.
    manifest = read_manifest(place.with_name("supervision.jsonl"), "supervision") or {}
    settings = SuperviseConfig().to_dict()
    settings.update(manifest.get("config", {}))
    for number, record in enumerate(chosen):
        if number:
            terminal.say()
        _print_question(record, settings, terminal)


def _print_question(record: SearchRecord, settings: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a question, its target under these settings, and the tree of its paths."""
    rule = settings["target"]
    targets = find_candidates(record, rule, min_saving=settings["min_saving"])
    if isinstance(targets, str):  # the reason why there is no target
        target = f"none: {targets}"
    else:
        best = targets[0]
        target = f"#{best.simulation}, {plain(best.executions)} executions (rule {rule})"
    terminal.fact("question", f"{record.id} of {record.task}, {record.num_layers} layers")
    terminal.say(record.question)
    terminal.fact("answer", record.answer)
    terminal.fact("paths", f"{len(record.paths)} tried, reward {record.reward}")
    terminal.fact("target", target)
    _print_tree(record, terminal)


def _print_tree(record: SearchRecord, terminal: Terminal) -> None:
    """Print a question's paths as a tree of edits, one line per path."""
    by_decisions = {path.decisions: path for path in record.paths}
    has_answers = any(path.answer is not None for path in record.paths)
    columns = "path|#|right|margin|executions|kl|re-test"
    if has_answers:
        columns += "|answered"
    rows: list[list[str | Text]] = []
    for decisions, label in draw_paths(record.paths):
        path = by_decisions[decisions]
        cells: list[str | Text] = [
            Text(label, style="bold" if is_valid(path) else "dim"),
            str(path.simulation),
            _describe_reward(path.reward),
            plain(path.margin, 2),
            plain(path.executions),
            plain(path.kl, 3),
            _describe_retest(path),
        ]
        if has_answers:
            cells.append(" ".join((path.answer or "").split()))
        rows.append(cells)
    terminal.table(columns, rows, numbers_from=1, cut_off=("answered", ANSWER_WIDTH))
    terminal.say("re-test: variants of the prompt that were answered right; + survived, − did not")


def _describe_reward(reward: float) -> str:
    if reward == 0:
        return "no"
    if reward == 1:
        return "yes"
    return plain(reward, 2)


def _describe_retest(path: TriedPath) -> str:
    retest = path.retest
    if retest is None:
        return ""
    sign = "+" if retest.survived else "−"
    return f"{sign} {retest.passed} of {retest.asked}"


def draw_paths(paths: Sequence[TriedPath]) -> Iterator[tuple[Decisions, str]]:
    """Draw one question's paths as a tree of edits: yield the decisions and the line of each path.

    The full path comes first. The parent of a path is the path from which the fewest edits lead to
    it. If several paths are equally near, the path that was tried first is the parent. An only
    child is drawn at its parent's depth after the word "then", so that a long chain of edits stays
    narrow.
    """
    children: dict[Decisions, list[Decisions]] = {path.decisions: [] for path in paths}
    for path in sorted(paths[1:], key=lambda path: path.simulation):
        children[_find_parent(path, paths)].append(path.decisions)
    root = paths[0].decisions
    yield root, "full path"
    yield from _branches(root, children, "")


def _find_parent(path: TriedPath, paths: Sequence[TriedPath]) -> Decisions:
    """Return the decisions of a path's parent, from which the fewest edits lead to the path."""
    options = []
    for other in paths:
        edits = edits_between(other.decisions, path.decisions)
        if edits:
            options.append((len(edits), other.simulation, other.decisions))
    _, _, parent = min(options)
    return parent


def _branches(
    parent: Decisions, children: Mapping[Decisions, Sequence[Decisions]], lead: str
) -> Iterator[tuple[Decisions, str]]:
    """Yield the decisions and the line of all paths below a path; `lead` begins each line."""
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
        yield from _branches(child, children, lead + indent)


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
        last = edits[-1] if edits else Action(0, 0, Decision.EXECUTE)
        is_next = last.decision == new == Decision.SKIP and last.layer + last.span == layer
        if is_next and last.span < MAX_SKIPPED_AT_ONCE:
            edits[-1] = Action(last.layer, last.span + 1, Decision.SKIP)
        else:
            edits.append(Action(layer, 1, Decision(new)))
    return edits


def print_targets_file(output: Path, summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print the file of targets that was written, and the summary of the targets."""
    terminal.fact("supervision", output)
    print_supervision(summary, terminal)
    rejected = rejected_path(output)
    if rejected.is_file():
        terminal.fact("reasons", rejected)


def print_supervision(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print the summary of a supervision; in older manifests some values are missing."""
    _print_counts(summary, terminal)
    targets = of_total(summary["targets"], summary["questions"])
    executions = summary.get("executions")
    if executions is not None:
        targets += f", {plain(executions, 2)} executions on average"
    num_wrong = summary.get("wrong_targets")
    if num_wrong:
        targets += f"; {num_wrong} of them answer wrong"
    terminal.fact("targets", targets)
    reasons = [f"{num} {reason}" for reason, num in summary["rejected"].items() if num]
    terminal.fact("without", ", ".join(reasons) or "none")
    num_copies = summary.get("copies")
    if num_copies:
        terminal.fact("copies", f"{num_copies} records, left out: each question counts once")
    print_classes(summary["class_counts"], terminal)


def print_classes(counts: Sequence[int], terminal: Terminal) -> None:
    """Print how many decisions skip, execute and repeat."""
    total = sum(counts) or 1
    parts = []
    for decision in Decision:
        share = percent(counts[decision] / total)
        parts.append(f"{decision.name.lower()} {counts[decision]} ({share})")
    terminal.fact("decisions", ", ".join(parts))


def show_supervision(path: Path, terminal: Terminal) -> None:
    """Print a file of targets: the summary in its manifest, or counts if it has no manifest."""
    records = read_supervision(path)
    manifest = read_manifest(path, "supervision") or {}
    if "summary" in manifest:
        print_supervision(manifest["summary"], terminal)
    else:
        terminal.fact("targets", f"{len(records)}, no manifest (a file of your own)")
        print_classes(summarise([], records, {})["class_counts"], terminal)
    mean = sum(record.executions for record in records) / len(records)
    num_layers = len(records[0].optimal_layer_config)
    terminal.fact("executions", f"{plain(mean, 2)} of {num_layers} on average")


def show_rejected(path: Path, terminal: Terminal) -> None:
    """Print how many questions of each task have no target, by reason."""
    questions = [question for _, question in read_json_lines(path, RejectedQuestion)]
    terminal.fact("without", f"{count(len(questions))} records have no target")
    reasons = Counter((question.task, question.reason) for question in questions)
    rows = [(task, reason, count(num)) for (task, reason), num in reasons.items()]
    terminal.table("task|reason|records", rows, numbers_from=2)


def _show_search_file(path: Path, terminal: Terminal) -> None:
    show_search(read_search(path), terminal)


SEARCH_RENDERERS: dict[str, tuple[str, Callable[[Path, Terminal], None]]] = {
    "paths": ("search", _show_search_file),
    "optimal_layer_config": ("supervision", show_supervision),
    "reason": ("questions without a target", show_rejected),
    "error": ("questions that failed", show_failed),
}
"""By a field in the first line of a file: what the file holds, and the function that prints it."""
