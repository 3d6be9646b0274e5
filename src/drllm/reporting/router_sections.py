"""The sections of a report on the search and its targets, and on the training of routers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from drllm.agreement import (
    ROUTERS,
    TRAIN,
    VALIDATION,
    compare_by_layer,
    compute_metrics,
    judge_routers,
)
from drllm.paths import Decision, num_executions
from drllm.records.layers import Layers
from drllm.records.search import SearchRecord
from drllm.records.supervision import SupervisionRecord
from drllm.reporting import figures
from drllm.reporting.document import Figure, Section
from drllm.reporting.markdown import Markdown, write_paragraph, write_table
from drllm.reporting.numbers import (
    NONE,
    write_count,
    write_count_with_share,
    write_number,
    write_signed,
)
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts, edit_effects, summarise

MIN_QUESTIONS = 5  # minimum questions on which an edit was tried, to be called best or worst
PATH_KINDS = {
    "valid": "valid (answers right)",
    "saving": "saving (right, and shorter than the full path)",
    "improving": "improving (right where the full path is wrong)",
}
METRICS = {
    "macro_f1": "macro-F1",
    "accuracy": "labels hit",
    "f1_skip": "F1 skip",
    "f1_execute": "F1 execute",
    "f1_repeat": "F1 repeat",
    "avg_layers": "executions",
    "routers_loss": "loss",
}


def search_section(run: Run) -> Section:
    """Build the section on the searched questions and their targets."""
    counts = summarise(run.search, (), {})
    # A user's own supervision file has no summary. The counts of the search have all its numbers,
    # except those of rejected questions.
    summary = run.summary or counts
    blocks: list[Markdown] = []
    if run.search:
        blocks.append(write_paragraph(_describe_search(run.search, counts)))
        blocks += [write_paragraph(sentence) for sentence in _describe_edits(run.search)]
    if summary.get("questions"):
        blocks.append(_path_table(summary))
    for reason, number in (summary.get("rejected") or {}).items():
        if run.summary and number:
            blocks.append(write_paragraph(f"{write_count(number)} have no target: {reason}."))
    if run.supervision:
        targets = _describe_targets(run.supervision, summary, run.num_layers)
        blocks.append(write_paragraph(targets))
    return Section("Search and targets", blocks, folded=True)


def _describe_search(records: Sequence[SearchRecord], counts: Mapping[str, Any]) -> str:
    num_paths = sum(len(record.paths) for record in records)
    seconds = sum(record.seconds for record in records)
    copies = f" and {counts['copies']} copies of them" if counts["copies"] else ""
    right = write_count_with_share(counts["base_correct"], counts["questions"])
    return (
        f"{write_count(counts['questions'])} questions{copies} were searched, "
        f"{write_number(num_paths / len(records))} distinct paths each on average, in "
        f"{write_number(seconds)} seconds. The full path answers {right} of them."
    )


def _describe_edits(records: Sequence[SearchRecord]) -> list[str]:
    """Say which single layer is best and worst to skip, and which to repeat."""
    sentences: list[str] = []
    for name, decision in (("Skipping", Decision.SKIP), ("Repeating", Decision.REPEAT)):
        effects = edit_effects(records, decision, MIN_QUESTIONS)
        if effects:
            best, gain = effects[0]
            worst, loss = effects[-1]
            sentences.append(
                f"{name} one layer alone, by mean change of reward: best layer {best} "
                f"({write_signed(gain, 2)}), worst {worst} ({write_signed(loss, 2)})."
            )
    return sentences


def _path_table(summary: Mapping[str, Any]) -> Markdown:
    total = summary["questions"]
    rows: list[list[str]] = []
    for kind, description in PATH_KINDS.items():
        row = [description]
        for moment in ("before", "after"):
            number = summary.get(f"{kind}_{moment}_retest")
            cell = NONE if number is None else write_count_with_share(number, total)
            row.append(cell)
        rows.append(row)
    caption = f"Of {write_count(total)} questions, how many have such a path."
    return write_table(caption, "path|before the re-test|after", rows)


def _describe_targets(
    targets: Sequence[SupervisionRecord], summary: Mapping[str, Any], num_layers: int | None
) -> str:
    paths = [target.optimal_layer_config for target in targets]
    lengths = sorted(num_executions(path) for path in paths)
    layers = str(lengths[0])
    if lengths[0] < lengths[-1]:
        layers = f"{lengths[0]} to {lengths[-1]}"
    counts = class_counts(paths)
    skips = sum(layer_counts[Decision.SKIP] for layer_counts in counts)
    executes = sum(layer_counts[Decision.EXECUTE] for layer_counts in counts)
    repeats = sum(layer_counts[Decision.REPEAT] for layer_counts in counts)
    labels = skips + executes + repeats
    num_improving = sum(target.improving for target in targets)
    improving = write_count_with_share(num_improving, len(targets))
    num_wrong = summary.get("wrong_targets")
    wrong_targets = f"{write_count(num_wrong)} don't answer right, " if num_wrong else ""
    return (
        f"{write_count(len(targets))} targets, {improving} of them improving, "
        f"{wrong_targets}run {layers} of {num_layers} layers, "
        f"{write_number(sum(lengths) / len(lengths), 2)} on average. Their labels: skip "
        f"{write_count_with_share(skips, labels)}, execute "
        f"{write_count_with_share(executes, labels)}, repeat "
        f"{write_count_with_share(repeats, labels)}."
    )


def router_section(run: Run) -> Section:
    """Build the section that compares the routers with decisions that ignore the question."""
    blocks: list[Markdown] = []
    baselines: dict[str, Mapping[str, float | None]] = {}
    if run.layers:
        systems = run.layers.parts[run.layers.main_part]
        scores = {name: compute_metrics(counts) for name, counts in systems.items()}
        baselines = {name: values for name, values in scores.items() if name != ROUTERS}
        verdict = f"{judge_routers(run.layers.parts)} {compare_by_layer(systems)}"
        blocks.append(write_paragraph(verdict))
        blocks.append(_metric_table(run.layers, scores))
    if all(epoch.split != VALIDATION for epoch in run.epochs):
        sentence = "No targets were held out, so there are no validation metrics."
        blocks.append(write_paragraph(sentence))
    curves = _metric_curves(run, baselines)
    return Section("Router metrics", [curves, *blocks], folded=True)


def _metric_curves(run: Run, baselines: Mapping[str, Mapping[str, float | None]]) -> Figure:
    last_epochs = {epoch.split: epoch for epoch in run.epochs}
    results = [
        f"{split}, last epoch: macro-F1 {write_number(last_epochs[split].macro_f1, 3)}"
        for split in (TRAIN, VALIDATION)
        if split in last_epochs
    ]
    return Figure(
        draw=partial(figures.draw_router_metrics, run.epochs, baselines),
        name="router metrics",
        alt=f"Macro-F1, labels hit and loss by epoch. {'; '.join(results)}.",
        caption="By epoch. Where targets are held out, full lines are validation and dotted lines "
        "training; the dashed line is the best of the decisions that ignore the question.",
    )


def _metric_table(layers: Layers, scores: Mapping[str, Mapping[str, float | None]]) -> Markdown:
    """Build the table of metrics: a row for each metric, a column for routers and each baseline."""
    rows: list[list[str]] = []
    for metric, title in METRICS.items():
        values = [write_number(values.get(metric), 3) for values in scores.values()]
        if any(value != NONE for value in values):
            rows.append([title, *values])
    systems = [name.replace("_", " ") for name in scores]
    caption = (
        f"On {layers.describe_part(layers.main_part)}, after epoch {layers.epoch}: routers, and "
        f"decisions that ignore the question."
    )
    return write_table(caption, "|".join(["metric", *systems]), rows)
