"""The part of a report that is about depths: the curve, and the certified choice with its trials.

Owns the tables and sentences. Leaves the numbers to `depths`, and the drawing to `curves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from drllm.cost import share_saved
from drllm.reporting import curves
from drllm.reporting.blocks import Block, Columns, Figure, Folded, Listing, Section, Table, Text
from drllm.reporting.depths import Choice, Point, Rise, Seeds, Spread, Trial
from drllm.reporting.evaluated import against_cells, against_columns, difference
from drllm.reporting.numbers import NONE, count, percent, plain, signed
from drllm.reporting.results import Evaluation
from drllm.reporting.verdicts import outstanding

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
    """Return the sections on the curve and the choice, as far as they were asked for."""
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
    measures = curves.known(evaluation)
    blocks: list[Block] = [
        Text(
            "Routed model and baselines at several depths, each baseline at the routed model's "
            "executions where it can be had there. All differences are to base on the same "
            "questions, with paired 95 % intervals; the depth that the routers were trained for "
            "is one of the points in the drawings."
        )
    ]
    if measures:
        blocks += _drawings(evaluation, measures)
    blocks.append(
        Table(
            caption="The depth curve in numbers",
            header=CURVE_COLUMNS,
            rows=[point_row(point, evaluation.num_layers) for point in evaluation.curve],
            texts=(0, 1),
        )
    )
    return [*blocks, *_against(evaluation)]


def _against(evaluation: Evaluation) -> list[Block]:
    """List the routed model against every baseline, depth by depth."""
    rows = [
        [point.setting, point.system, *against_cells(evaluation, found), plain(point.executions, 2)]
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


def _drawings(evaluation: Evaluation, measures: Sequence[curves.Measure]) -> list[Block]:
    shown = outstanding(evaluation)
    routed = [
        f"{point.setting} {plain(point.executions, 2)} executions, accuracy "
        f"{percent(point.accuracy)}"
        for point in evaluation.curve
        if point.system == "routed"
    ]
    named = f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]
    whole = Figure(
        draw=partial(curves.depth_curve, evaluation, shown),
        name=f"{evaluation.task} depth curve",
        alt=f"Differences to base over executions a forward pass. Routed: {'; '.join(routed)}.",
        caption=f"Less than base's or more, over executions a forward pass, for {named}, with "
        f"95 % intervals. The dot is base. Systems of equal executions are drawn side by side; "
        f"lines of other baselines that leave the panel go on below, one by one.",
    )
    single = [
        Figure(
            draw=partial(curves.one_by_one, evaluation, measure),
            name=f"{evaluation.task} {measure.key} one by one",
            alt=f"The routed model against every baseline over executions a forward pass: "
            f"{measure.label}, less base's. The table holds the numbers.",
            caption=f"{measure.label.capitalize()}, less base's: routed (dots) against each "
            f"baseline (squares), with 95 % intervals.",
        )
        for measure in measures
    ]
    if len(curves.by_system(evaluation)) < 2:
        return [whole]
    return [whole, Folded("Every baseline by itself", [Columns([[each] for each in single])])]


def point_row(point: Point, num_layers: int) -> list[str]:
    """Return a point's cells in the order of `CURVE_COLUMNS`."""
    against = point.against_base
    return [
        point.system,
        point.setting or NONE,
        plain(point.executions, 2),
        percent(share_saved(point.executions, num_layers)),
        percent(point.accuracy),
        difference(against.accuracy if against else None, 100, 1),
        difference(against.gold_logprob if against else None),
        difference(against.text_loss if against else None),
    ]


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
    base, permuted = row.against_base, row.against_permuted
    return [
        row.setting or "as trained",
        count(row.num_seeds),
        _ends(row.executions, 1, 2),
        _ends(row.accuracy, 100, 1),
        NONE if deviation is None else plain(100 * deviation, 1),
        difference(base.accuracy if base else None, 100, 1),
        difference(base.gold_logprob if base else None),
        difference(base.text_loss if base else None),
        difference(permuted.accuracy if permuted else None, 100, 1),
    ]


def _ends(spread: Spread, scale: float, digits: int) -> str:
    mean, low, high = (
        plain(scale * value, digits) for value in (spread.mean, spread.lowest, spread.highest)
    )
    return f"{mean} ({low} to {high})"


# --- the choice --------------------------------------------------------------------------------


def verdict(choice: Choice) -> str:
    """Say in one sentence what is certified; "none" is an answer."""
    kept = choice.certified
    if kept is None:
        return "None is certified."
    return f"Certified: {kept.name} ({plain(kept.executions, 2)} executions a forward pass)."


def _choice(choice: Choice, split: str) -> list[Block]:
    asked = (
        f"Asked for with {percent(choice.confidence, 0)} confidence: less than "
        f"{choice.epsilon:g} points of accuracy lost, and a next-token loss less than "
        f"{choice.max_loss_increase:g} nats a token higher on the questions' own texts"
        f"{_beside(choice)}."
    )
    blocks: list[Block] = [Text(f"{verdict(choice)} {_why(choice)}".rstrip(), strong=True)]
    blocks.append(Text(asked))
    chosen_on = choice.chosen_on or ("fit" if split == "select" else "select")
    tested = [(chosen_on, trial) for trial in choice.trials]
    if choice.confirmation is not None:
        tested.append((f"{split}, once", choice.confirmation))
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
    if choice.sentences:
        blocks.append(Text("As the evaluation words it:"))
        blocks.append(Listing(choice.sentences))
    return blocks


def _beside(choice: Choice) -> str:
    """Say whether worked answers were looked at."""
    if choice.worked_answers is None:
        return "; worked answers weren't looked at"
    return f" and on worked answers of {choice.worked_answers}"


def _why(choice: Choice) -> str:
    """Say why nothing is certified."""
    if choice.certified is not None:
        return ""
    if choice.obstacle is not None:
        return f"{choice.obstacle}."
    if choice.confirmation is not None:
        name = choice.confirmation.name
        return f"What was chosen, {name}, fails on the questions that it was tested on once."
    if choice.chosen is not None:
        return f"What was chosen, {choice.chosen.name}, wasn't tested on other questions."
    return "The first setting tried fails already." if choice.trials else ""


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
        plain(max(0.0, trial.greatest_loss), 2),
        *_rise_cells(trial.texts),
        *([] if trial.worked is None else _rise_cells(trial.worked)),
    ]


def _rise_cells(rise: Rise) -> list[str]:
    return [
        count(rise.num_texts),
        signed(rise.loss_increase, 3),
        signed(rise.greatest_increase, 3),
    ]
