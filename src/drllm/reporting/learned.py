"""The part of a report about the way to the routers: search, targets, training. Axes: L layers."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

from drllm.cost import share_saved
from drllm.metrics import NAMES
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


def _search(run: Run) -> list[Block]:
    counts = summarise(run.search, run.supervision, {})
    said = []
    if run.search:
        tried = sum(len(record.paths) for record in run.search)
        seconds = sum(record.seconds for record in run.search)
        copies = f" and {count(counts['copies'])} copies of them" if counts["copies"] else ""
        said = [
            Text(
                f"{count(counts['questions'])} questions{copies} were searched, "
                f"{plain(tried / len(run.search))} distinct paths each on average, in "
                f"{plain(seconds)} seconds. The full path answers "
                f"{of_total(counts['base_correct'], counts['questions'])} of them."
            )
        ]
    # A supervision file of somebody else's has no summary; the search says all but the rejects.
    counts = {**(run.summary or {**counts, "rejected": None})}
    questions = int(counts.get("questions", 0))

    def share(number: Any) -> str:
        return of_total(number, questions) if isinstance(number, int) else NONE

    found = Table.of(
        f"Of {count(questions)} questions, how many have such a path, before and after the re-test",
        (
            ("valid", "valid (answers right)"),
            ("saving", "saving (right, and shorter than the full path)"),
            ("improving", "improving (right where the full path is wrong)"),
        ),
        {
            "path": lambda kind: kind[1],
            "before": lambda kind: share(counts.get(f"{kind[0]}_before_retest")),
            "after": lambda kind: share(counts.get(f"{kind[0]}_after_retest")),
        },
    )
    blocks: list[Block] = [*said, found]
    if rejected := counts.get("rejected"):
        caption = f"Questions without a target, by reason ({count(counts.get('targets'))} have one)"
        rows = [[str(reason), share(number)] for reason, number in rejected.items()]
        without = Table(caption=caption, header=("reason", "questions"), rows=rows)
        blocks[-1] = Columns([[found], [without]])
    return [*blocks, *(_single_edits(run) if run.search else [])]


def _single_edits(run: Run) -> list[Block]:
    skips, repeats = (edit_effects(run.search, edit) for edit in (Decision.SKIP, Decision.REPEAT))
    if not skips and not repeats:
        return [Text("No path with a single edit was tried.")]
    enough = sorted(
        (effect for effect in skips if effect.questions >= MIN_QUESTIONS),
        key=lambda effect: (-effect.reward, effect.layer),
    )
    picked = enough if len(enough) <= 6 else [*enough[:3], *enough[-3:]]
    table: Block = Text(f"No single skip was tried on {MIN_QUESTIONS} questions or more.")
    worst = ""
    if picked:
        worst = f" Worst skip: layer {picked[-1].layer}, {signed(picked[-1].reward)}."
        table = Table.of(
            "Skipping one layer and nothing else: the best and the worst layers by mean change of "
            f"reward, among those tried on {MIN_QUESTIONS} questions or more",
            picked,
            {
                "layer": lambda effect: str(effect.layer),
                "questions": lambda effect: count(effect.questions),
                "reward": lambda effect: signed(effect.reward),
                "margin, nats": lambda effect: signed(effect.margin),
            },
            texts=(),
        )
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


def _targets(run: Run) -> list[Block]:
    targets = [record.optimal_layer_config for record in run.supervision]
    num_layers = len(targets[0])
    totals = [sum(of_one) for of_one in zip(*class_counts(targets), strict=True)]
    improving = sum(record.improving for record in run.supervision)
    lengths = [num_executions(target) for target in targets]
    saved = share_saved(fmean(lengths), num_layers)
    labels = Table(
        caption="Labels, over all targets and layers",
        header=("decision", "labels"),
        rows=[[name, of_total(n, sum(totals))] for name, n in zip(NAMES, totals, strict=True)],
    )
    drawn = Figure(
        draw=partial(figures.target_executions, lengths, num_layers),
        name="target executions",
        alt=f"Executions of the target paths: from {min(lengths)} to {max(lengths)}, "
        f"{plain(fmean(lengths), 2)} on average.",
        caption="How many targets have how many executions.",
    )
    said = Text(
        f"{count(len(targets))} targets, {of_total(improving, len(targets))} of them improving; "
        f"{plain(fmean(lengths), 2)} executions on average, {percent(abs(saved))} "
        f"{'fewer' if saved >= 0 else 'more'} than the full path's {num_layers}."
    )
    return [said, Columns([[drawn], [labels]])]
