"""The part of a report about depths: the curve, several seeds, the certified choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from drllm.cost import share_saved
from drllm.records.results import Evaluation, Point, Spread
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Columns, Figure, Listing, Section, Table, Text, row_of
from drllm.reporting.evaluated import against_baselines, difference, outstanding
from drllm.reporting.numbers import NONE, count, percent, plain, signed
from drllm.statistics.non_inferiority import Choice, Trial
from drllm.statistics.verdicts import Differences, Quantity


def _less(found: Differences | None, quantity: Quantity) -> str:
    return difference(getattr(found, quantity, None))


CURVE_COLUMNS: dict[str, Callable[[Point, int], str]] = {
    "system": lambda p, _: p.system,
    "depth": lambda p, _: p.setting or NONE,
    "executions a forward": lambda p, _: plain(p.executions, 2),
    "saved": lambda p, num_layers: percent(share_saved(p.executions, num_layers)),
    "accuracy": lambda p, _: percent(p.accuracy),
    "accuracy less base's, points": lambda p, _: _less(p.against_base, "accuracy"),
    "gold log-probability less base's, nats": lambda p, _: _less(p.against_base, "gold_logprob"),
    "next-token loss less base's, nats": lambda p, _: _less(p.against_base, "text_loss"),
}


def sections(evaluation: Evaluation) -> list[Section]:
    """Return the sections on the curve, the seeds and the choice, as far as there are any."""
    found = []
    if evaluation.curve:
        found.append(Section("Depth curve", _curve(evaluation)))
    if evaluation.seeds:
        found.append(Section("Routers of several seeds", _seeds(evaluation)))
    if evaluation.choice is not None:
        found.append(Section("Certified choice", _choice(evaluation.choice, evaluation.split)))
    return found


def _curve(evaluation: Evaluation) -> list[Block]:
    measures = figures.known(evaluation)
    in_numbers = Table(
        caption="The depth curve in numbers",
        header=tuple(CURVE_COLUMNS),
        rows=[row_of(CURVE_COLUMNS, point, evaluation.num_layers) for point in evaluation.curve],
        texts=(0, 1),
    )
    blocks: list[Block] = [
        Text(
            "Routed model and baselines at several depths, each baseline at the routed model's "
            "executions where it can be had there. All differences are to base on the same "
            "questions, with paired 95 % intervals; the depth that the routers were trained for "
            "is one of the points in the drawings."
        ),
        *(_drawings(evaluation, measures) if measures else []),
        in_numbers,
    ]
    if compared := [point for point in evaluation.curve if point.routed_against is not None]:
        depths = list(dict.fromkeys(point.setting for point in compared))
        compared.sort(key=lambda point: depths.index(point.setting))
        named = {"depth": lambda p: p.setting, "baseline": lambda p: p.system}
        blocks.append(against_baselines(", depth by depth", evaluation.score, compared, named))
    return blocks


def _drawings(evaluation: Evaluation, measures: Sequence[figures.Measure]) -> list[Block]:
    shown = outstanding(evaluation)
    routed = "; ".join(
        f"{point.setting} {plain(point.executions, 2)} executions, accuracy "
        f"{percent(point.accuracy)}"
        for point in evaluation.curve
        if point.system == "routed"
    )
    named = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    whole = Figure(
        draw=partial(figures.depth_curve, evaluation, shown),
        name=f"{evaluation.task} depth curve",
        alt=f"Differences to base over executions a forward pass. Routed: {routed}.",
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
    return [whole, Columns([[each] for each in single], folded="Every baseline by itself")]


def _seeds(evaluation: Evaluation) -> list[Block]:
    def ends(spread: Spread, scale: float, digits: int) -> str:
        values = (spread.mean, spread.lowest, spread.highest)
        mean, low, high = (plain(scale * value, digits) for value in values)
        return f"{mean} ({low} to {high})"

    return [
        Text(
            "The same training with other seeds, on the same questions. The spread says how much "
            "the training's randomness moves a result; the intervals say how far the mean over "
            "these seeds may move with other questions. Baselines are compared with the first "
            "seed's routers."
        ),
        Table.of(
            "Routers of several seeds, depth by depth; mean, with the lowest and the highest of "
            "the seeds",
            evaluation.seeds,
            {
                "depth": lambda s: s.setting or "as trained",
                "seeds": lambda s: count(s.num_seeds),
                "executions a forward": lambda s: ends(s.executions, 1, 2),
                "accuracy": lambda s: ends(s.accuracy, 100, 1),
                "standard deviation, points": lambda s: (
                    NONE if s.accuracy.deviation is None else plain(100 * s.accuracy.deviation)
                ),
                "mean less base's, points": lambda s: _less(s.against_base, "accuracy"),
                "gold log-probability less base's, nats": lambda s: _less(
                    s.against_base, "gold_logprob"
                ),
                "next-token loss less base's, nats": lambda s: _less(s.against_base, "text_loss"),
                "mean less own routes permuted, points": lambda s: _less(
                    s.against_permuted, "accuracy"
                ),
            },
        ),
    ]


def _choice(choice: Choice, split: str) -> list[Block]:
    columns: dict[str, Callable[[Trial], str]] = {
        "setting": lambda t: t.name,
        "tested on": lambda t: (
            f"{split}, once" if t is choice.confirmation else choice.chosen_on or NONE
        ),
        "passed": lambda t: "yes" if t.passed else "no",
        "why not": lambda t: "; ".join(t.failures) or NONE,
        "executions a forward": lambda t: plain(t.executions, 2),
        "questions": lambda t: count(t.num_questions),
        "won": lambda t: count(t.won),
        "lost": lambda t: count(t.lost),
        "losses excluded from, points": lambda t: plain(max(0.0, t.maximum_loss), 2),
        "texts": lambda t: count(t.texts.num_texts),
        "next-token loss, nats": lambda t: signed(t.texts.increase),
        "at most, nats": lambda t: signed(t.texts.maximum),
    }
    header = tuple(columns)
    if choice.worked_answers:
        header += ("worked answers", "their next-token loss, nats", "at most, nats")
    tested = [*choice.trials, *([choice.confirmation] if choice.confirmation else [])]
    rows = [row_of(columns, trial) for trial in tested]
    for row, found in zip(rows, (trial.worked for trial in tested), strict=True):
        if found is not None:
            row += [count(found.num_texts), signed(found.increase), signed(found.maximum)]
    table = Table(
        caption="Settings tried, from the most executions to the fewest and up to the first that "
        "fails; what is chosen is then tested once on other questions",
        header=header,
        rows=rows,
        texts=(0, 1, 2, 3),
    )
    said: list[Block] = [Text(choice.verdict(), strong=True), Listing(choice.sentences())]
    return [said[0], table, said[1]] if tested else said
