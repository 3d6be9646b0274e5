"""The part of a report about depths: the curve, several seeds, the certified choice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from drllm.cost import share_saved
from drllm.records.results import Evaluation, Point, Seeds, Spread
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Columns, Figure, Folded, Listing, Section, Table, Text
from drllm.reporting.evaluated import against_cells, against_columns, difference, outstanding
from drllm.reporting.numbers import NONE, count, percent, plain, signed
from drllm.statistics.non_inferiority import Choice, LossBound, Trial
from drllm.statistics.verdicts import Differences

CURVE_COLUMNS = (
    "system",
    "depth",
    "executions a forward",
    "saved",
    "accuracy",
    "accuracy less base's, points",
    "gold log-probability less base's, nats",
    "next-token loss less base's, nats",
)
TRIAL_COLUMNS = (
    "setting",
    "tested on",
    "passed",
    "why not",
    "executions a forward",
    "questions",
    "won",
    "lost",
    "losses excluded from, points",
    "texts",
    "next-token loss, nats",
    "at most, nats",
)
WORKED_COLUMNS = ("worked answers", "their next-token loss, nats", "at most, nats")


def sections(evaluation: Evaluation) -> list[Section]:
    """Return the sections on the curve, the seeds and the choice, as far as there are any."""
    found = []
    if evaluation.curve:
        found.append(Section("Depth curve", _curve(evaluation)))
    if evaluation.seeds:
        found.append(Section("Routers of several seeds", _seeds(evaluation.seeds)))
    if evaluation.choice is not None:
        found.append(Section("Certified choice", _choice(evaluation.choice, evaluation.split)))
    return found


# --- the curve ---------------------------------------------------------------------------------


def _curve(evaluation: Evaluation) -> list[Block]:
    measures = figures.known(evaluation)
    return [
        Text(
            "Routed model and baselines at several depths, each baseline at the routed model's "
            "executions where it can be had there. All differences are to base on the same "
            "questions, with paired 95 % intervals; the depth that the routers were trained for "
            "is one of the points in the drawings."
        ),
        *(_drawings(evaluation, measures) if measures else []),
        Table(
            caption="The depth curve in numbers",
            header=CURVE_COLUMNS,
            rows=[point_row(point, evaluation.num_layers) for point in evaluation.curve],
            texts=(0, 1),
        ),
        *_against(evaluation),
    ]


def _against(evaluation: Evaluation) -> list[Block]:
    """List the routed model against every baseline, depth by depth."""
    rows = [
        [point.setting, point.system, *against_cells(found), plain(point.executions, 2)]
        for point in evaluation.curve
        if (found := point.routed_against) is not None
    ]
    if not rows:
        return []
    depths = list(dict.fromkeys(setting for setting, *_ in rows))
    return [
        Table(
            caption="The routed model less each baseline, depth by depth, with 95 % intervals, and "
            "what is shown of the routed model at the 5 % level, each comparison by itself; no "
            "verdict where base isn't shown to be above chance",
            header=("depth", "baseline", *against_columns(evaluation), "baseline's executions"),
            rows=sorted(rows, key=lambda row: depths.index(row[0])),
            texts=(0, 1, 2, 4, 6),
        )
    ]


def _drawings(evaluation: Evaluation, measures: Sequence[figures.Measure]) -> list[Block]:
    shown = outstanding(evaluation)
    routed = [
        f"{point.setting} {plain(point.executions, 2)} executions, accuracy "
        f"{percent(point.accuracy)}"
        for point in evaluation.curve
        if point.system == "routed"
    ]
    named = f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]
    whole = Figure(
        draw=partial(figures.depth_curve, evaluation, shown),
        name=f"{evaluation.task} depth curve",
        alt=f"Differences to base over executions a forward pass. Routed: {'; '.join(routed)}.",
        caption=f"Less than base's or more, over executions a forward pass, for {named}, with "
        f"95 % intervals. The dot is base. Systems of equal executions are drawn side by side; "
        f"lines of other baselines that leave the panel go on below, one by one.",
    )
    if len(figures.by_system(evaluation)) < 2:
        return [whole]
    single = [
        Figure(
            draw=partial(figures.one_by_one, evaluation, measure),
            name=f"{evaluation.task} {measure.key} one by one",
            alt=f"The routed model against every baseline over executions a forward pass: "
            f"{measure.label}, less base's. The table holds the numbers.",
            caption=f"{measure.label.capitalize()}, less base's: routed (dots) against each "
            f"baseline (squares), with 95 % intervals.",
        )
        for measure in measures
    ]
    return [whole, Folded("Every baseline by itself", [Columns([[each] for each in single])])]


def point_row(point: Point, num_layers: int) -> list[str]:
    """Return a point's cells in the order of `CURVE_COLUMNS`."""
    return [
        point.system,
        point.setting or NONE,
        plain(point.executions, 2),
        percent(share_saved(point.executions, num_layers)),
        percent(point.accuracy),
        *_less(point.against_base),
    ]


def _less(found: Differences | None) -> list[str]:
    """Write differences to base: of accuracy, gold log-probability and next-token loss."""
    if found is None:
        return [NONE] * 3
    return [difference(each) for each in (found.accuracy, found.gold_logprob, found.text_loss)]


# --- several seeds -----------------------------------------------------------------------------


def _seeds(rows: Sequence[Seeds]) -> list[Block]:
    return [
        Text(
            "The same training with other seeds, on the same questions. The spread says how much "
            "the training's randomness moves a result; the intervals say how far the mean over "
            "these seeds may move with other questions. Baselines are compared with the first "
            "seed's routers."
        ),
        Table(
            caption="Routers of several seeds, depth by depth; mean, with the lowest and the "
            "highest of the seeds",
            header=(
                "depth",
                "seeds",
                "executions a forward",
                "accuracy",
                "standard deviation, points",
                "mean less base's, points",
                "gold log-probability less base's, nats",
                "next-token loss less base's, nats",
                "mean less own routes permuted, points",
            ),
            rows=[_seeds_row(row) for row in rows],
        ),
    ]


def _seeds_row(row: Seeds) -> list[str]:
    deviation = row.accuracy.deviation
    permuted = row.against_permuted
    return [
        row.setting or "as trained",
        count(row.num_seeds),
        _ends(row.executions, 1, 2),
        _ends(row.accuracy, 100, 1),
        NONE if deviation is None else plain(100 * deviation, 1),
        *_less(row.against_base),
        difference(permuted.accuracy if permuted else None),
    ]


def _ends(spread: Spread, scale: float, digits: int) -> str:
    mean, low, high = (
        plain(scale * value, digits) for value in (spread.mean, spread.lowest, spread.highest)
    )
    return f"{mean} ({low} to {high})"


# --- the choice --------------------------------------------------------------------------------


def _choice(choice: Choice, split: str) -> list[Block]:
    tested = [(choice.chosen_on or NONE, trial) for trial in choice.trials]
    if choice.confirmation is not None:
        tested.append((f"{split}, once", choice.confirmation))
    blocks: list[Block] = [Text(choice.verdict(), strong=True)]
    if tested:
        blocks.append(
            Table(
                caption="Settings tried, from the most executions to the fewest and up to the "
                "first that fails; what is chosen is then tested once on other questions",
                header=(*TRIAL_COLUMNS, *(WORKED_COLUMNS if choice.worked_answers else ())),
                rows=[_trial_row(where, trial) for where, trial in tested],
                texts=(0, 1, 2, 3),
            )
        )
    return [*blocks, Listing(choice.sentences())]


def _trial_row(where: str, trial: Trial) -> list[str]:
    return [
        trial.name,
        where,
        "yes" if trial.passed else "no",
        "; ".join(trial.failures) or NONE,
        plain(trial.executions, 2),
        count(trial.num_questions),
        count(trial.won),
        count(trial.lost),
        plain(max(0.0, trial.maximum_loss), 2),
        *_bound_cells(trial.texts),
        *([] if trial.worked is None else _bound_cells(trial.worked)),
    ]


def _bound_cells(bound: LossBound) -> list[str]:
    return [count(bound.num_texts), signed(bound.increase, 3), signed(bound.maximum, 3)]
