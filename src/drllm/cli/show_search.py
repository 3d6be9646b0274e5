"""A search and its targets as people read them; one question's paths as a tree. Loads no torch."""

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
from drllm.search import num_batches_kept
from drllm.search.actions import MAX_SKIPPED_AT_ONCE, Action
from drllm.supervision.rules import candidates, is_valid, survived
from drllm.supervision.summary import KINDS, summarise

ANSWER_WIDTH = 14  # columns for what a path answered: its beginning, so that a path stays one line


def show_search(records: Sequence[SearchRecord], terminal: Terminal) -> None:
    """Print what a search found and what it spent."""
    n, num_layers = len(records), records[0].num_layers
    counts = summarise(records, [], {})
    paths = [path for record in records for path in record.paths]
    rewards = ", ".join(sorted({record.reward for record in records}))
    copies = f" and {count(counts['copies'])} copies" if counts["copies"] else ""
    asked = f"{count(counts['questions'])}{copies}"
    terminal.fact("questions", f"{asked}, {num_layers} layers, reward {rewards}")
    terminal.fact("paths tried", f"{count(len(paths))}, {plain(len(paths) / n)} a question")
    _show_counts(counts, terminal)
    again = [path for path in paths if path.retest is not None]
    left = of_total(sum(map(survived, again)), len(again))
    terminal.fact("re-test", f"{count(len(again))} paths asked again, {left} survived")
    executions = round(sum(path.executions for path in paths))
    distinct = sum(distinct_executions([path.decisions for path in r.paths]) for r in records)
    shared = of_total(distinct, executions)
    terminal.fact(
        "executions", f"{count(executions)} asked by paths, {shared} distinct in a question"
    )
    surviving = [[path.executions for path in r.paths if survived(path)] for r in records]
    if shortest := [min(each) for each in surviving if each]:
        terminal.fact(
            "shortest",
            f"{plain(fmean(shortest), 2)} executions of {num_layers} for the shortest surviving "
            f"path, mean of {count(len(shortest))}",
        )
    seconds = sum(record.seconds for record in records)
    rate = f", {plain(len(paths) / seconds)} paths a second" if seconds > 0 else ""
    terminal.fact("time", f"{duration(seconds)}, {plain(seconds / n)} s a question{rate}")


def _show_counts(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print how many questions of each task have which paths, and targets if there are any."""
    rows = dict(summary.get("tasks", {}))
    if len(rows) != 1:
        improving = [row["improving_targets"] for row in rows.values()]
        rows["all"] = {**summary, "improving_targets": sum(improving) if improving else None}
    names = ["targets", "improving_targets"] if summary["targets"] else []
    terminal.table(
        "|".join(["task", "questions", "base right", *KINDS, *names]).replace("_", "\n"),
        (
            [
                task,
                count(row["questions"]),
                of_total(row["base_correct"], row["questions"]),
                *(
                    f"{count(row[f'{kind}_before_retest'])} → {count(row[f'{kind}_after_retest'])}"
                    for kind in KINDS
                ),
                *(count(row[name]) for name in names),
            ]
            for task, row in rows.items()
        ),
        title="Questions with such a path, as the search found it → after the re-test",
        numbers_from=1,
    )


def show_failed(path: Path, terminal: Terminal) -> None:
    """Print the questions that a search has set aside, each with its last error."""
    questions = [one for _, one in read_json_lines(path, FailedQuestion)]
    terminal.fact("failed", f"{count(len(questions))} questions were set aside by the search")
    rows = [(one.task, one.id, count(one.attempts), one.error) for one in questions]
    terminal.table("task|id|attempts|last error", rows)


def show_unfinished(folder: Path, terminal: Terminal) -> None:
    """Print how far an interrupted search is."""
    terminal.fact(
        "search",
        f"not finished: {count(num_batches_kept(folder))} batches of questions are kept; if it "
        f"isn't running, run the same command to resume it",
    )


def show_question(
    records: Sequence[SearchRecord], question: str, place: Path, terminal: Terminal
) -> None:
    """Draw the tree of every question that has an id; ids are unique within a task only."""
    found = [record for record in records if record.id == question]
    if not found:
        ids = list(dict.fromkeys(record.id for record in records))
        near = difflib.get_close_matches(question, ids, n=3, cutoff=0.0)
        raise RecordError(
            f"{place} has no question with id {question!r}; nearest of {len(ids)}: "
            f"{', '.join(near)}"
        )
    # The rule is that of the targets next to the search, if there are any.
    manifest = read_manifest(place.with_name("supervision.jsonl"), "supervision") or {}
    config = SuperviseConfig().to_dict() | manifest.get("config", {})
    for number, record in enumerate(found):
        if number:
            terminal.say()
        rule = config["target"]
        target = candidates(record, rule, min_saving=config["min_saving"])
        terminal.fact("question", f"{record.id} of {record.task}, {record.num_layers} layers")
        terminal.say(record.question)
        terminal.fact("answer", record.answer)
        terminal.fact("paths", f"{len(record.paths)} tried, reward {record.reward}")
        terminal.fact(
            "target",
            f"none: {target}"
            if isinstance(target, str)
            else f"#{target[0].simulation}, {plain(target[0].executions)} executions (rule {rule})",
        )
        _show_tree(record, terminal)


def _show_tree(record: SearchRecord, terminal: Terminal) -> None:
    by_decisions = {path.decisions: path for path in record.paths}
    rows: list[list[str | Text]] = []
    for decisions, label in draw_paths(record.paths):
        path = by_decisions[decisions]
        again = path.retest
        cells: list[str | Text] = [
            Text(label, style="bold" if is_valid(path) else "dim"),
            str(path.simulation),
            {0.0: "no", 1.0: "yes"}.get(path.reward) or plain(path.reward, 2),
            plain(path.margin, 2),
            plain(path.executions),
            plain(path.kl, 3),
            f"{'+' if again.survived else '−'} {again.passed} of {again.asked}" if again else "",
        ]
        rows.append([*cells, " ".join((path.answer or "").split())])
    generated = any(path.answer is not None for path in record.paths)
    terminal.table(
        "path|#|right|margin|executions|kl|re-test" + "|answered" * generated,
        rows if generated else [row[:-1] for row in rows],
        numbers_from=1,
        cut_off=("answered", ANSWER_WIDTH),
    )
    terminal.say("re-test: other ways of asking that were answered right; + survived, − did not")


def draw_paths(paths: Sequence[TriedPath]) -> Iterator[tuple[Decisions, str]]:
    """Draw one question's paths, the full path first, as a tree of edits: decisions and line.

    A path stands below the one from which the fewest edits lead to it, of several the one tried
    first. The only path below another follows at the same depth, after "then", so that a long
    chain of edits stays narrow.
    """
    below: dict[Decisions, list[Decisions]] = {path.decisions: [] for path in paths}
    for path in sorted(paths[1:], key=lambda path: path.simulation):
        _, _, parent = min(
            (len(edits), other.simulation, other.decisions)
            for other in paths
            if (edits := edits_between(other.decisions, path.decisions))
        )
        below[parent].append(path.decisions)
    yield paths[0].decisions, "full path"
    yield from _branches(paths[0].decisions, below, "")


def _branches(
    above: Decisions, below: Mapping[Decisions, Sequence[Decisions]], lead: str
) -> Iterator[tuple[Decisions, str]]:
    for number, child in enumerate(below[above], start=1):
        mark, inner = ("├ ", "│ ") if number < len(below[above]) else ("└ ", "  ")
        if len(below[above]) == 1:
            mark, inner = "then ", ""
        edits = edits_between(above, child) or ()
        yield child, lead + mark + ", ".join(map(str, edits))
        yield from _branches(child, below, lead + inner)


def edits_between(before: Decisions, after: Decisions) -> list[Action] | None:
    """Return the fewest edits from one path to another; None where one isn't executed once."""
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


def say_written(output: Path, summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print what a supervision has written and found."""
    terminal.fact("supervision", output)
    say_supervision(summary, terminal)
    if (rejected := rejected_path(output)).is_file():
        terminal.fact("reasons", rejected)


def say_supervision(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a summary of `summarise`, or what an older version left of one in a manifest."""
    _show_counts(summary, terminal)
    mean = summary.get("executions")
    more = f", {plain(mean, 2)} executions on average" if mean is not None else ""
    if wrong := summary.get("wrong_targets"):
        more += f"; {wrong} of them answer wrong"
    terminal.fact("targets", of_total(summary["targets"], summary["questions"]) + more)
    rejects = [f"{n} {reason}" for reason, n in summary["rejected"].items() if n]
    terminal.fact("without", ", ".join(rejects) or "none")
    if copies := summary.get("copies"):
        terminal.fact("copies", f"{copies} records, left out: each question counts once")
    say_classes(summary["class_counts"], terminal)


def say_classes(counts: Sequence[int], terminal: Terminal) -> None:
    """Print how many decisions skip, execute and repeat."""
    total = sum(counts) or 1
    shown = (f"{d.name.lower()} {counts[d]} ({percent(counts[d] / total)})" for d in Decision)
    terminal.fact("decisions", ", ".join(shown))


def show_supervision(path: Path, terminal: Terminal) -> None:
    """Print what a file of targets holds, by the counts of its manifest where it has one."""
    records = read_supervision(path)
    manifest = read_manifest(path, "supervision") or {}
    if "summary" in manifest:
        say_supervision(manifest["summary"], terminal)
    else:
        terminal.fact("targets", f"{len(records)}, no manifest (a file of your own)")
        say_classes(summarise([], records, {})["class_counts"], terminal)
    mean = sum(record.executions for record in records) / len(records)
    layers = len(records[0].optimal_layer_config)
    terminal.fact("executions", f"{plain(mean, 2)} of {layers} on average")


def show_rejected(path: Path, terminal: Terminal) -> None:
    """Print how many questions of each task got no target, by reason."""
    questions = [one for _, one in read_json_lines(path, RejectedQuestion)]
    terminal.fact("without", f"{count(len(questions))} records have no target")
    reasons = Counter((question.task, question.reason) for question in questions)
    rows = [(task, reason, count(n)) for (task, reason), n in reasons.items()]
    terminal.table("task|reason|records", rows, numbers_from=2)


LINES: dict[str, tuple[str, Callable[[Path, Terminal], None]]] = {
    "paths": ("search", lambda path, terminal: show_search(read_search(path), terminal)),
    "optimal_layer_config": ("supervision", show_supervision),
    "reason": ("questions without a target", show_rejected),
    "error": ("questions that failed", show_failed),
}
"""By a field of the first line, what a file of records holds and what prints it."""
