"""The part of a report that is about the way to the routers: search, targets, training.

Owns which of its counts are shown. Leaves the counting to the stages and to `summary`.
Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from drllm.cost import share_saved
from drllm.paths import Decision
from drllm.reporting import figures, summary
from drllm.reporting.blocks import Block, Columns, Figure, Section, Table, Text
from drllm.reporting.numbers import (
    NONE,
    count,
    of_total,
    percent,
    plain,
    signed,
)
from drllm.reporting.run import Run
from drllm.supervision import summarise
from drllm.supervision.summary import class_counts

MIN_QUESTIONS = 5
"""Single edits tried on fewer questions are left out of the table of best and worst."""

METRICS = (
    ("macro_f1", "macro-F1", 3),
    ("f1_skip", "F1 skip", 3),
    ("f1_execute", "F1 execute", 3),
    ("f1_repeat", "F1 repeat", 3),
    ("acc_skip", "skip labels hit", 3),
    ("acc_repeat", "repeat labels hit", 3),
    ("avg_layers", "executions", 2),
    ("routers_loss", "loss", 4),
)


def sections(run: Run) -> list[Section]:
    """Return the sections on search, targets and routers, as far as there are files for them."""
    found = []
    if run.search or run.summary:
        found.append(Section("What the search found", _search(run)))
    if run.supervision:
        found.append(Section("Targets", _targets(run)))
    if run.epochs:
        found.append(Section("Router metrics", _routers(run)))
    return found


# --- search ------------------------------------------------------------------------------------


def _search(run: Run) -> list[Block]:
    blocks: list[Block] = []
    found = summarise(run.search, run.supervision, {})
    if run.search:
        tried = sum(len(record.paths) for record in run.search)
        seconds = sum(record.seconds for record in run.search)
        copies = f" and {count(found['copies'])} copies of them" if found["copies"] else ""
        blocks.append(
            Text(
                f"{count(found['questions'])} questions{copies} were searched, "
                f"{plain(tried / len(run.search))} distinct paths each on average, in "
                f"{plain(seconds)} seconds. The full path answers "
                f"{of_total(found['base_correct'], found['questions'])} of them."
            )
        )
    # A supervision file of somebody else's has no summary; the search says all but the rejects.
    counts = run.summary or {**found, "rejected": None}
    blocks += _yield(counts)
    if run.search:
        blocks += _single_edits(run)
    return blocks


def _yield(counts: Mapping[str, Any]) -> list[Block]:
    questions = int(counts.get("questions", 0))
    rows = []
    for key, name in (
        ("valid", "valid (answers right)"),
        ("saving", "saving (right, and shorter than the full path)"),
        ("improving", "improving (right where the full path is wrong)"),
    ):
        cells = [
            _share_of(counts.get(f"{key}_{when}_retest"), questions) for when in ("before", "after")
        ]
        rows.append([name, *cells])
    found = Table(
        caption=f"Of {count(questions)} questions, how many have such a path, before and after the "
        f"re-test",
        header=("path", "before", "after"),
        rows=rows,
    )
    rejected = counts.get("rejected") or {}
    if not rejected:
        return [found]
    without = Table(
        caption=f"Questions without a target, by reason ({count(counts.get('targets'))} have one)",
        header=("reason", "questions"),
        rows=[[str(reason), _share_of(n, questions)] for reason, n in rejected.items()],
    )
    return [Columns([[found], [without]])]


def _share_of(number: Any, total: int) -> str:
    return of_total(number, total) if isinstance(number, int) else NONE


def _single_edits(run: Run) -> list[Block]:
    skips = summary.edit_effects(run.search, Decision.SKIP)
    repeats = summary.edit_effects(run.search, Decision.REPEAT)
    if not skips and not repeats:
        return [Text("No path with a single edit was tried.")]
    enough = sorted(
        (effect for effect in skips if effect.questions >= MIN_QUESTIONS),
        key=lambda effect: (-effect.reward, effect.layer),
    )
    picked = enough if len(enough) <= 6 else [*enough[:3], *enough[-3:]]
    table: Block = Text(f"No single skip was tried on {MIN_QUESTIONS} questions or more.")
    if picked:
        table = Table(
            caption="Skipping one layer and nothing else: the best and the worst layers by mean "
            f"change of reward, among those tried on {MIN_QUESTIONS} questions or more",
            header=("layer", "questions", "reward", "margin, nats"),
            rows=[
                [
                    str(effect.layer),
                    count(effect.questions),
                    signed(effect.reward),
                    signed(effect.margin),
                ]
                for effect in picked
            ],
            texts=(),
        )
    worst = f" Worst skip: layer {picked[-1].layer}, {signed(picked[-1].reward)}." if picked else ""
    drawn = Figure(
        draw=partial(figures.single_edits, skips, repeats, run.search[0].num_layers),
        name="single edits",
        alt="Mean change of reward when one layer is skipped, and when one is repeated, by layer."
        + worst,
        caption="Mean change of reward by layer when that layer alone is skipped or repeated, "
        "over the questions on which the search tried it. No dot: not tried. The "
        "search picks what it tries, so layers are seen on different questions.",
    )
    return [Columns([[drawn], [table]])]


# --- targets -----------------------------------------------------------------------------------


def _targets(run: Run) -> list[Block]:
    targets = [record.optimal_layer_config for record in run.supervision]
    num_layers = len(targets[0])
    counts = class_counts(targets)
    totals = [sum(layer[value] for layer in counts) for value in range(3)]
    improving = sum(record.improving for record in run.supervision)
    mean = summary.mean_length(targets) or 0.0
    lengths = [int(sum(target)) for target in targets]
    saved = share_saved(mean, num_layers)
    compared = f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'}"
    labels = Table(
        caption="Labels, over all targets and layers",
        header=("decision", "labels"),
        rows=[
            [name, of_total(total, sum(totals))]
            for name, total in zip(("skip", "execute", "repeat"), totals, strict=True)
        ],
    )
    drawn = Figure(
        draw=partial(figures.target_executions, lengths, num_layers),
        name="target executions",
        alt=f"Executions of the target paths: from {min(lengths)} to {max(lengths)}, "
        f"{plain(mean, 2)} on average.",
        caption="How many targets have how many executions.",
    )
    return [
        Text(
            f"{count(len(targets))} targets, {of_total(improving, len(targets))} of them "
            f"improving; {plain(mean, 2)} executions on average, {compared} than the full path's "
            f"{num_layers}."
        ),
        Columns([[drawn], [labels]]),
    ]


# --- routers -----------------------------------------------------------------------------------


def _routers(run: Run) -> list[Block]:
    counts = _label_counts(run)
    execute = summary.always_execute(counts) if counts else {}
    frequent = summary.most_frequent(counts) if counts else {}
    by_split = {
        split: {epoch.epoch: epoch.values for epoch in run.epochs if epoch.split == split}
        for split in ("train", "validation")
    }
    columns = {
        "routers, train": summary.last_values(by_split["train"]),
        "routers, validation": summary.last_values(by_split["validation"]),
        "always execute": execute,
        "most frequent label a layer": frequent,
    }
    shown = {name: values for name, values in columns.items() if values}
    last = max(epoch.epoch for epoch in run.epochs)
    blocks: list[Block] = []
    if execute:
        blocks.append(
            Text(
                f"Executing every layer agrees with {percent(execute['accuracy'])} of the labels, "
                f"and each layer's most frequent label with {percent(frequent['accuracy'])}: what "
                f"routers are worth shows in the F1 of skip and repeat, not in accuracy."
            )
        )
    else:
        blocks.append(
            Text("No label counts are there, so the routers stand without a baseline beside them.")
        )
    if not by_split["validation"]:
        blocks.append(Text("No targets were held out, so there are no validation metrics."))
    blocks += [
        Table(
            caption=f"Routers after epoch {last}, beside decisions that ignore the question "
            f"(these against all labels)",
            header=("metric", *shown),
            rows=[
                [name, *(plain(values.get(key), digits) for values in shown.values())]
                for key, name, digits in METRICS
            ],
        ),
        Figure(
            draw=partial(figures.router_metrics, run.epochs, execute),
            name="router metrics",
            alt="Macro-F1, F1 by decision and loss by epoch. "
            + "; ".join(
                f"{split}, last epoch: macro-F1 {plain(values[max(values)].get('macro_f1'), 3)}"
                for split, values in by_split.items()
                if values
            )
            + f"; always execute: {plain(execute.get('macro_f1'), 3)}.",
            caption="Router metrics by epoch. Where targets are held out, full lines are "
            "validation and dotted lines training; the dashed line is what executing every layer "
            "scores.",
        ),
        _by_epoch(by_split),
    ]
    return blocks


def _label_counts(run: Run) -> Sequence[Sequence[int]]:
    """Return `[L][3]` counts of the targets, or those that the routers were saved with."""
    if run.supervision:
        return class_counts([record.optimal_layer_config for record in run.supervision])
    return list(run.router_config.get("label_counts") or [])


def _by_epoch(by_split: Mapping[str, Mapping[int, Mapping[str, float | None]]]) -> Table:
    keys = ("macro_f1", "f1_skip", "f1_execute", "f1_repeat", "routers_loss")
    names = {key: name for key, name, _ in METRICS}
    splits = [split for split, values in by_split.items() if values]
    epochs = sorted({number for values in by_split.values() for number in values})
    return Table(
        caption="Router metrics of every epoch",
        header=("epoch", *(f"{names[key]}, {split}" for split in splits for key in keys)),
        rows=[
            [
                str(number),
                *(
                    plain(by_split[split].get(number, {}).get(key), 4 if "loss" in key else 3)
                    for split in splits
                    for key in keys
                ),
            ]
            for number in epochs
        ],
        texts=(),
        folded=True,
    )
