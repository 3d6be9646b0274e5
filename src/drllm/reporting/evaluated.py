"""The part of a report about the test: the result, the systems of each task, and depths.

What is claimed are the evaluation's own findings and the labels of its verdicts; nothing is judged
here. Whatever is picked after looking (the best of several baselines) is never what a claim rests
on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from drllm.cost import share_saved
from drllm.records.results import PERMUTED, Evaluation, Point, Spread, System
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Columns, Figure, Listing, Section, Table, Text, row_of
from drllm.reporting.numbers import NONE, count, interval, p_value, percent, plain, signed
from drllm.reporting.run import Run
from drllm.statistics.non_inferiority import Choice, Trial
from drllm.statistics.verdicts import Differences, Quantity, Verdict

EQUAL = 0.01
"""Share of the layers by which executions may differ and still be called equal."""


# --- what is shown -----------------------------------------------------------------------------


def label(verdict: Verdict | None) -> str:
    """Return what a comparison shows, for the cell of a table."""
    return NONE if verdict is None else verdict.label


def difference(verdict: Verdict | None) -> str:
    """Write a difference with its interval: points of accuracy, or nats."""
    if verdict is None:
        return NONE
    scale, digits = (100, 1) if verdict.quantity == "accuracy" else (1, 3)
    low, high = (signed(scale * end, digits) for end in verdict.interval)
    return f"{signed(scale * verdict.mean, digits)} ({low} to {high})"


def against(system: System | None) -> Verdict | None:
    """Return the verdict on the routed model's accuracy against a baseline."""
    return system.routed_against.accuracy if system and system.routed_against else None


def rivals(evaluation: Evaluation, *, read_question: bool = False) -> list[System]:
    """Return the baselines of equal executions that don't read the question (or do), best first.

    The permuted routes aren't among them: they are a control of their own.
    """
    routed = evaluation.routed
    if routed is None:
        return []
    near = EQUAL * evaluation.num_layers
    found = [
        system
        for system in evaluation.baselines
        if system.reads_question is read_question
        and system.name != PERMUTED
        and abs(system.executions - routed.executions) <= near
    ]
    return sorted(found, key=lambda s: (s.accuracy, s.gold_logprob or 0.0), reverse=True)


def outstanding(evaluation: Evaluation) -> list[str]:
    """Return the systems that a drawing shows in colour: routed, its control, the best rivals."""
    best = [rivals(evaluation, read_question=reads)[:1] for reads in (False, True)]
    names = [system.name for found in best for system in found]
    control = [PERMUTED] if evaluation.system(PERMUTED) is not None else []
    return ["routed", *control, *names]


# --- the result --------------------------------------------------------------------------------


def result(run: Run) -> list[Block]:
    """Return what the evaluation found: one task's findings, or tables over several tasks."""
    notes = map(Text, run.notes)
    if not run.evaluations:
        return [Text(f"{model_words(run)}; nothing was evaluated yet.", strong=True), *notes]
    if len(run.evaluations) == 1:
        first, *rest = of_task(run, run.evaluations[0])
        return [first, *notes, *rest]
    counted = [Text(line, strong=True) for line in over_tasks(run.evaluations)]
    return [*counted, *notes, *_tables(run.evaluations)]


def of_task(run: Run, evaluation: Evaluation) -> list[Block]:
    """Return what the evaluation found on a task, the choice's sentences aside."""
    choice = evaluation.choice
    aside = choice.sentences() if choice else ()
    found = [finding for finding in evaluation.findings if finding not in aside]
    first, *rest = found or [f"On {evaluation.task} nothing was found."]
    rest += [choice.verdict()] if choice else []
    kinds = {"choices": "options are scored", "generated": "answers are generated"}
    shots = count(evaluation.num_fewshot) if evaluation.num_fewshot else "no"
    asked = (
        f"{evaluation.task}, {evaluation.split} split, {count(evaluation.num_questions)} "
        f"questions, {kinds[evaluation.kind]}, metric {evaluation.metric}, {shots} worked examples"
    )
    blocks = [Text(first, strong=True), Text(f"Measured: {model_words(run)} on {asked}.")]
    return [*blocks, Listing(rest)] if rest else [*blocks]


def over_tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Say of how many tasks what is shown of the routed model, one sentence a comparison."""
    compared: dict[str, Callable[[Evaluation], Verdict | None]] = {
        "accuracy against base": lambda e: _less_base(e.routed, "accuracy"),
        "next-token loss against base": lambda e: _less_base(e.routed, "text_loss"),
        "accuracy against its own routes permuted": lambda e: against(e.system(PERMUTED)),
    }
    said = []
    for words, verdict in compared.items():
        found: dict[str, list[str]] = {}
        for evaluation in evaluations:
            if one := verdict(evaluation):
                found.setdefault(one.label, []).append(evaluation.task)
        parts = [f"{name} on {len(tasks)} ({', '.join(tasks)})" for name, tasks in found.items()]
        if parts:
            said.append(f"The routed model, by {words}: {'; '.join(parts)}.")
    return said


def model_words(run: Run) -> str:
    """Name the base model in a few words."""
    name = str(run.model.get("id") or "a base model that no file names")
    return f"{name} ({run.num_layers} layers)" if run.num_layers else name


def _tables(evaluations: Sequence[Evaluation]) -> list[Block]:
    glance = Table.of(
        "The tasks at a glance. Verdicts are on accuracy; those against base are corrected "
        "for several tasks (Holm) where there is an exact test, the others hold each by itself at "
        "the 5 % level. The fixed baseline is the best of equal executions that doesn't read the "
        "question.",
        evaluations,
        {
            "task": lambda e: e.task,
            "questions": lambda e: count(e.num_questions),
            "base above chance": lambda e: (
                f"{'yes' if e.above_chance else 'not shown'} ({percent(e.chance)})"
            ),
            "base": lambda e: percent(e.base.accuracy),
            "routed": lambda e: percent(r.accuracy) if (r := e.routed) else NONE,
            "saved": lambda e: _saved(r, e.num_layers) if (r := e.routed) else NONE,
            "routed against base": lambda e: label(_less_base(e.routed, "accuracy")),
            "against its permuted routes": lambda e: label(against(e.system(PERMUTED))),
            "best fixed baseline": lambda e: (
                f"{best.name}, {percent(best.accuracy)}" if (best := _rival(e)) else NONE
            ),
            "against it": lambda e: label(against(_rival(e))),
        },
        texts=(0, 2, 6, 7, 8, 9),
    )
    cells: dict[str, Callable[[System], str]] = {
        "Accuracy in percent (where answers are graded, the mean grade) with its 95 % interval": (
            lambda s: f"{plain(100 * s.accuracy)} ({interval(s.interval)})"
        ),
        "Gold log-probability, nats a question": lambda s: plain(s.gold_logprob, 3),
        "Next-token loss, nats a token": lambda s: plain(s.text_loss, 3),
        "Executions a forward": lambda s: plain(s.executions, 2),
    }
    names = list(dict.fromkeys(system.name for each in evaluations for system in each.systems))
    by_system: list[Block] = []
    for caption, cell in cells.items():
        rows = [
            [each.task, *(cell(s) if (s := each.system(name)) else NONE for name in names)]
            for each in evaluations
        ]
        header, folded = ("task", *names), len(by_system) > 1
        by_system.append(Table(caption=caption, header=header, rows=rows, folded=folded))
    return [glance, *by_system]


def _rival(evaluation: Evaluation) -> System | None:
    return next(iter(rivals(evaluation)), None)


def _saved(system: System, num_layers: int) -> str:
    return percent(share_saved(system.executions, num_layers))


# --- one task's systems ------------------------------------------------------------------------


def _less_base(system: System | None, quantity: Quantity) -> Any:
    return getattr(system and system.against_base, quantity, None)


def _on_base(system: System, field: str) -> Any:
    """Return a value of the system's verdict on accuracy against base, None where there is none."""
    return getattr(_less_base(system, "accuracy"), field, None)


SYSTEM_COLUMNS: dict[str, Callable[[System, int], str]] = {
    "system": lambda s, _: s.name,
    "accuracy": lambda s, _: percent(s.accuracy),
    "95 % interval": lambda s, _: interval(s.interval),
    "executions a forward": lambda s, _: plain(s.executions, 2),
    "saved": _saved,
    "gold log-probability, nats": lambda s, _: plain(s.gold_logprob, 3),
    "next-token loss, nats": lambda s, _: plain(s.text_loss, 3),
    "won": lambda s, _: count(_on_base(s, "won")),
    "lost": lambda s, _: count(_on_base(s, "lost")),
    "McNemar p": lambda s, _: p_value(_on_base(s, "p")),
    "draws": lambda s, _: count(s.draws),
}


def systems(evaluation: Evaluation) -> Section:
    """Return the section on a task's systems."""
    what_they_are = Table.of(
        "What the systems are",
        evaluation.systems,
        {
            "system": lambda s: s.name,
            "what it does": lambda s: s.description or NONE,
            "source": lambda s: s.source or NONE,
            "fitted on": lambda s: s.fitted_on or NONE,
            "routes unchanged": lambda s: percent(s.unchanged_routes),
        },
        texts=(0, 1, 2, 3),
    )
    blocks = [*_table(evaluation), *_baselines(evaluation), what_they_are]
    names = list(dict.fromkeys(name for each in evaluation.systems for name in each.metrics))
    if len(names) > 1:
        caption = (
            "All that lm-evaluation-harness says of the answers, as means over the questions; "
            f"{evaluation.metric} counts"
        )
        rows = [
            [each.name, *(plain(each.metrics.get(name), 4) for name in names)]
            for each in evaluation.systems
        ]
        blocks.append(Table(caption=caption, header=("system", *names), rows=rows, folded=True))
    if left_out := list(evaluation.not_compared.items()):
        header = ("method", "why not")
        blocks.append(Table(caption="Not compared", header=header, rows=left_out, texts=(0, 1)))
    return Section("Systems compared", blocks)


def _table(evaluation: Evaluation) -> list[Block]:
    caption = (
        f"{evaluation.task}, {count(evaluation.num_questions)} questions, chance "
        f"{percent(evaluation.chance)}"
    )
    header = [evaluation.score if name == "accuracy" else name for name in SYSTEM_COLUMNS]
    rows = [row_of(SYSTEM_COLUMNS, each, evaluation.num_layers) for each in evaluation.systems]
    counted = (
        f"Answers are graded by {evaluation.metric}, so that none is simply won or lost. "
        if evaluation.is_graded
        else "Won and lost count questions against base. Where several draws are averaged there "
        "is no such count. "
    )
    blocks: list[Block] = [
        Table(caption=caption, header=header, rows=rows),
        Text(f"{counted}A dash means: not measured, or not defined."),
    ]
    corrected = ", ".join(
        f"{system.name} p = {p_value(p)}".replace("= <", "<")
        for system in evaluation.systems
        if (p := _on_base(system, "p_corrected")) is not None
    )
    if corrected:
        blocks.append(Text(f"Corrected for the tests on several tasks (Holm): {corrected}."))
    if any(low == high for low, high in (system.interval for system in evaluation.systems)):
        said = (
            "An interval without width comes from resampling questions that all gave the same "
            "mean over draws; it is no sign of certainty."
        )
        blocks.append(Text(said))
    return blocks


def _baselines(evaluation: Evaluation) -> list[Block]:
    """Return what shows at a glance whether routing beats its baselines."""
    score = evaluation.score.capitalize()
    shown = ", ".join(f"{each.name} {percent(each.accuracy)}" for each in evaluation.systems)
    drawn = Figure(
        draw=partial(figures.accuracy_of_systems, evaluation),
        name=f"{evaluation.task} systems",
        alt=f"{score} of the systems: {shown}.",
        caption=f"{score} with its 95 % interval. The line is base, the dotted line is chance.",
    )
    compared = [(s, s.routed_against) for s in evaluation.baselines if s.routed_against]
    if not compared:
        return [drawn]
    verdicts = ", ".join(f"{each.name} {label(found.accuracy)}" for each, found in compared)
    less = Figure(
        draw=partial(figures.routed_against, evaluation),
        name=f"{evaluation.task} baselines",
        alt=f"The routed model less each baseline, with 95 % intervals. On accuracy it is: "
        f"{verdicts}.",
        caption="The routed model less each baseline, on the same questions, with 95 % intervals; "
        "full dots where it is shown to differ. Right of the line the routed model has more; more "
        "next-token loss is worse.",
    )
    reads = {None: NONE, True: "yes", False: "no"}
    named = {"baseline": lambda s: s.name}
    read = {"reads the question": lambda s: reads[s.reads_question]}
    table = against_baselines("", evaluation.score, [s for s, _ in compared], named, **read)
    return [Columns([[drawn], [less]]), table]


def against_baselines(
    where: str,
    score: str,
    baselines: Sequence[System | Point],
    first: dict[str, Callable[[Any], str]],
    **last: Callable[[Any], str],
) -> Table:
    """Return what is shown of the routed model against baselines, between columns of words."""
    columns: dict[str, Callable[[Any], str]] = {
        **first,
        f"routed, by {score}": lambda b: label(b.routed_against.accuracy),
        "points": lambda b: difference(b.routed_against.accuracy),
        "by gold log-probability": lambda b: label(b.routed_against.gold_logprob),
        "nats a question": lambda b: difference(b.routed_against.gold_logprob),
        "by next-token loss": lambda b: label(b.routed_against.text_loss),
        "nats a token": lambda b: difference(b.routed_against.text_loss),
        "baseline's executions": lambda b: plain(b.executions, 2),
        **last,
    }
    caption = (
        f"The routed model less each baseline{where}, with 95 % intervals, and what is shown of "
        "the routed model at the 5 % level, each comparison by itself; no verdict where base isn't "
        "shown to be above chance"
    )
    n = len(first)
    return Table.of(caption, baselines, columns, texts=(*range(n + 1), n + 2, n + 4, n + 7))


# --- depths ------------------------------------------------------------------------------------


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


def depths(evaluation: Evaluation) -> list[Section]:
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
