"""The part of a report about the way to the routers: search, targets, training. Axes: L layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from drllm.cost import share_saved
from drllm.paths import Decision, num_executions
from drllm.reporting import figures, trained
from drllm.reporting.blocks import Block, Columns, Figure, Section, Table, Text
from drllm.reporting.edits import edit_effects
from drllm.reporting.numbers import NONE, count, of_total, percent, plain, signed
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts, summarise

MIN_QUESTIONS = 5
"""Single edits tried on fewer questions are left out of the table of best and worst."""


def sections(run: Run) -> list[Section]:
    """Return the sections on search, targets and routers, as far as there are files for them."""
    found = []
    if run.search or run.summary:
        found.append(Section("What the search found", _search(run)))
    if run.supervision:
        found.append(Section("Targets", _targets(run)))
    if run.epochs:
        found.append(Section("Router metrics", trained.blocks(run)))
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
    skips = edit_effects(run.search, Decision.SKIP)
    repeats = edit_effects(run.search, Decision.REPEAT)
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
    lengths = [num_executions(target) for target in targets]
    mean = fmean(lengths)
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
