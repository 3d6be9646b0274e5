"""The part of a report about the way to the routers: search, targets, training. Axes: L layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from drllm import metrics
from drllm.cost import share_saved
from drllm.metrics import LAYER_MAJORITY, NAMES, ROUTERS, TRAIN, VALIDATION, Counts, ratios
from drllm.paths import Decision, num_executions
from drllm.records.layers import Calibration, Layers
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Columns, Figure, Section, Table, Text
from drllm.reporting.figures import Scores
from drllm.reporting.numbers import NONE, count, of_total, percent, plain, signed
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts, edit_effects, summarise

MIN_QUESTIONS = 5
"""Single edits tried on fewer questions are left out of the table of best and worst."""
METRICS = (
    ("macro_f1", "macro-F1", 3),
    ("accuracy", "labels hit", 3),
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
    counts = dict(run.summary) or {**counts, "rejected": None}
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


def _routers(run: Run) -> list[Block]:
    last: dict[str, Scores] = {epoch.split: epoch.values for epoch in run.epochs}
    known = run.layers.parts[run.layers.judged] if run.layers else {}
    found = _judged(run.layers, known) if run.layers else []
    scores = {name: ratios(counts) for name, counts in known.items() if name != ROUTERS}
    if VALIDATION not in last:
        found.append(Text("No targets were held out, so there are no validation metrics."))
    found.append(_curves(run, last, scores))
    if run.layers:
        found.append(_by_layer(run.layers, known))
    if run.calibration:
        settings = run.router_config["training"].get("settings") or {}
        found += _reliability(run.calibration, is_folded=settings.get("calibrate") is True)
    return found


def _judged(layers: Layers, systems: Mapping[str, Counts]) -> list[Block]:
    """Say how the saved routers stand on each part, and whether they beat the best baseline."""
    execute, frequent = (ratios(systems[name]) for name in (metrics.ALWAYS_EXECUTE, LAYER_MAJORITY))
    guessed = (
        f"Executing every layer agrees with {percent(execute['accuracy'])} of the labels, and each "
        f"layer's most frequent label with {percent(frequent['accuracy'])}: what routers are worth "
        f"shows in the F1 of skip and repeat, not in accuracy."
    )
    tables = []
    for part in sorted(layers.parts, key=lambda part: part != layers.judged):
        columns = {
            metrics.shown(name): ratios(counts) for name, counts in layers.parts[part].items()
        }
        caption = (
            f"On {layers.title(part)}: routers after epoch {layers.epoch}, and decisions that "
            f"ignore the question"
        )
        rows = [
            [name, *(plain(scores.get(key), digits) for scores in columns.values())]
            for key, name, digits in METRICS
        ]
        tables.append([Table(caption=caption, header=("metric", *columns), rows=rows)])
    said = [Text(metrics.verdict(layers.parts)), Text(f"{guessed} {metrics.by_layer(systems)}")]
    return [*said, Columns(tables)]


def _curves(run: Run, last: Mapping[str, Scores], scores: Mapping[str, Scores]) -> Figure:
    told = [
        f"{split}, last epoch: macro-F1 {plain(last[split].get('macro_f1'), 3)}"
        for split in (TRAIN, VALIDATION)
        if split in last
    ]
    told += [
        f"{metrics.shown(name)}: {plain(each['macro_f1'], 3)}" for name, each in scores.items()
    ]
    return Figure(
        draw=partial(figures.router_metrics, run.epochs, scores),
        name="router metrics",
        alt=f"Macro-F1, labels hit, F1 by decision and loss by epoch. {'; '.join(told)}.",
        caption="Router metrics by epoch. Where targets are held out, full lines are "
        "validation and dotted lines training; the dashed line is the best of the decisions that "
        "ignore the question.",
    )


def _by_layer(layers: Layers, systems: Mapping[str, Counts]) -> Figure:
    """Draw each layer's labels, and how routers and the layer's majority hit them."""
    labels = systems[ROUTERS].labels
    shares = [[n / sum(layer) for n in layer] for layer in labels]
    ours, theirs = (
        [metrics.hit_ratios(layer) for layer in systems[name].confusion]
        for name in (ROUTERS, LAYER_MAJORITY)
    )
    title = layers.title(layers.judged)
    most = max(range(len(shares)), key=lambda layer: shares[layer][0])
    return Figure(
        draw=partial(figures.router_layers, shares, ours, theirs),
        name="router layers",
        alt=f"Labels, share of labels hit and F1 of skip by layer, on {title}. "
        f"{metrics.by_layer(systems)} Most often to be skipped: layer {most}, "
        f"{percent(shares[most][0])} of its labels; the routers' F1 of skip there is "
        f"{plain(ours[most]['f1_skip'], 3)}.",
        caption=f"By layer, on {title}: how often its label is skip or repeat, what share of "
        f"its labels the routers hit (dots) and its commonest label in training hits "
        f"(line), and the F1 of skip of both. No dot: skip is neither label nor decision.",
    )


def _reliability(found: Calibration, *, is_folded: bool) -> list[Block]:
    """Say and draw how probabilities and held-out targets agree."""
    sure = "too sure" if found.temperature > 1 else "not sure enough"
    if found.temperature == 1:
        sure = "as sure as they may be"
    temperature = plain(found.temperature, 2)
    said = Text(
        f"Of what they decide the routers are {sure}: on {found.num_decisions} held-out "
        f"decisions their probabilities are off by {percent(found.ece_before)} on average "
        f"(expected calibration error), and fit best at a temperature of {temperature}, where it "
        f"is {percent(found.ece_after)}. That temperature was fitted on the same decisions and "
        f"is {'in' if is_folded else 'not in'} the weights."
    )
    if not found.reliability_before:
        return [said]
    bins = {
        "temperature 1": found.reliability_before,
        f"temperature {temperature}": found.reliability_after,
    }
    series = {name: [(each.confidence, each.hits) for each in part] for name, part in bins.items()}
    ends = " ".join(
        f"At {name} the least sure decisions are given {percent(points[0][0])} and hit "
        f"{percent(points[0][1])}, the surest {percent(points[-1][0])} and "
        f"{percent(points[-1][1])}."
        for name, points in series.items()
    )
    drawn = Figure(
        draw=partial(figures.router_reliability, series),
        name="router reliability",
        alt="Share of decisions that held-out targets agree with, by the probability that the "
        f"routers gave them. {ends}",
        caption=f"How far the routers' probabilities can be believed: {found.num_decisions} "
        f"held-out decisions in bins of as many each, by the probability of what was decided. "
        f"On the dashed line as many hit as the probability says; below it the routers are too "
        f"sure.",
    )
    return [said, drawn]
