"""The part of a report about results: tiles, plot, table of systems, routes, questions, cost.

What is claimed are the evaluation's own findings and the labels of its verdicts; nothing is judged
here, and nothing derived is called measured. `drllm show` prints `measured_line`. Axes: L layers.
"""

from collections.abc import Sequence
from functools import partial
from statistics import median

from drllm.cost import share_saved
from drllm.paths import Decision, Decisions, num_executions
from drllm.records import results
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Figure, Listing, Section, Table, Tile, Tiles
from drllm.reporting.numbers import NONE, count, percent, plain
from drllm.reporting.run import Run
from drllm.statistics.verdicts import Verdict
from drllm.supervision.summary import class_counts

PHASES = {results.PREFILL: "reading", results.DECODE: "decoding"}
LONGEST = 120  # characters of a question or an answer; the samples hold the whole
ROWS = 5
"""Questions that are shown of each kind, the first ones, so that nobody picks the pretty ones."""


def tiles(evaluation: results.Evaluation, measured: results.Latency | None) -> Tiles:
    """Return the four numbers that count: layers saved, both differences, measured time."""
    ours = evaluation.compared
    if ours is None or (found := ours.against_base) is None:
        return Tiles([time_tile(measured)])
    saved = share_saved(ours.executions, evaluation.num_layers)
    run = f"{plain(ours.executions, 2)} of {evaluation.num_layers} run a forward pass"
    title = "Layers saved" if saved >= 0 else "More layers run"
    score = evaluation.score if evaluation.is_graded else "Accuracy"
    called = evaluation.called(ours)
    before = f"base {percent(evaluation.base.accuracy)}, {called} {percent(ours.accuracy)}"
    whose = f"{called} minus base"
    each = [
        Tile(title, percent(abs(saved)), run),
        _tile(f"{score}, {whose}", found.accuracy, "points", before),
    ]
    if found.text_loss is not None:
        less_is_better = "nats a token; less is better"
        each.append(_tile(f"Next-token loss, {whose}", found.text_loss, "nats", less_is_better))
    return Tiles([*each, time_tile(measured)])


def _tile(title: str, verdict: Verdict, unit: str, note: str) -> Tile:
    low, high = map(verdict.write, verdict.interval)
    size, said = verdict.write(verdict.mean), f"95 % interval {low} to {high}; {note}"
    return Tile(title, f"{size} {unit}", said, verdict.label)


def sections(run: Run, evaluation: results.Result) -> list[Section]:
    """Return the plot, the table of systems, the certified choice, routes and changed answers."""
    found = [
        Section("Accuracy over layers run", [_plot(evaluation)]),
        Section("Systems", template="table.j2", values={"evaluation": evaluation}),
    ]
    if choice := evaluation.choice:
        *sentences, verdict = choice.sentences()
        found.append(
            Section("Certified choice", [verdict, Listing(sentences)] if sentences else [verdict])
        )
    if routes := evaluation.routes():
        found.append(Section("Routes by layer", [_routes(run, routes)]))
    both = {results.BASE, results.ROUTED}
    able = [each for each in evaluation.samples if both <= each.systems.keys()]
    if able:
        found.append(Section("Questions won and lost", _changed(evaluation, able)))
    return found


def _plot(evaluation: results.Evaluation) -> Figure:
    shown = ", ".join(
        f"{each.name} {percent(each.accuracy)} at {plain(each.executions, 2)}"
        for each in evaluation.systems
    )
    depths = "; lines join a system's depths" if any(e.setting for e in evaluation.curve) else ""
    static = f"; a line from base joins static paths: {', '.join(evaluation.paths)}"
    depths += static if evaluation.paths else ""
    barred = figures.STATIC if evaluation.paths and not evaluation.routed else results.ROUTED
    return Figure(
        draw=partial(figures.accuracy_by_executions, evaluation),
        name=f"{evaluation.task} systems",
        alt=f"{evaluation.score.capitalize()} over layers run a forward pass: {shown}.",
        caption=f"Higher is better, further left is cheaper. Bars are 95 % intervals of base and "
        f"{barred}; the horizontal line is base's accuracy{depths}.",
        is_large=True,
    )


def details(evaluation: results.Evaluation) -> list[Section]:
    """Return what is shown on request: what the systems are, and all depths in numbers."""
    values = {"evaluation": evaluation}
    found = [Section("What the systems are", (), 2, True, "systems.j2", values)]
    if evaluation.curve:
        found.append(Section("All depths in numbers", (), 2, True, "depths.j2", values))
    return found


def side_by_side(
    what: str, named: Sequence[tuple[str, results.Evaluation]], caption: str
) -> Section:
    """Return base, routed model at all depths, and paths, of runs or tasks (`what` says which)."""
    placed: list[tuple[str, results.Evaluation, results.System | results.Point]] = []
    for name, each in named:
        shown = {results.BASE, results.ROUTED, *each.paths}
        placed += [(name, each, one) for one in each.systems if one.name in shown]
        placed += [(name, each, one) for one in each.curve if one.system == results.ROUTED]
    values = {"what": what, "named": placed, "caption": caption}
    return Section(f"{what.capitalize()}s compared", template="compared.j2", values=values)


def _shares(rows: Sequence[Decisions]) -> list[list[float]]:
    """Return how often each layer is skipped, executed and repeated: `[L][3]`."""
    return [[number / len(rows) for number in layer] for layer in class_counts(rows)]


def _routes(run: Run, routes: Sequence[Decisions]) -> Figure:
    distinct, shares = len(set(routes)), _shares(routes)
    targets = [record.optimal_layer_config for record in run.supervision]
    mean = plain(sum(map(num_executions, routes)) / len(routes), 2)
    skipped = sorted(range(len(shares)), key=lambda layer: -shares[layer][Decision.SKIP])[:3]
    told = ", ".join(f"{layer} ({percent(shares[layer][Decision.SKIP], 0)})" for layer in skipped)
    strokes = " Strokes are what the routers were trained for." if targets else ""
    return Figure(
        draw=partial(figures.routes_by_layer, shares, _shares(targets) if targets else None),
        name="routes by layer",
        alt=f"How often each layer is skipped, executed and repeated. Skipped most: {told}.",
        caption=f"{count(distinct)} distinct {'route' if distinct == 1 else 'routes'} on "
        f"{count(len(routes))} questions, {mean} layers run on average.{strokes}",
        is_large=True,
    )


def _change(sample: results.Sample) -> float:
    """Return what routing makes of a question: above 0 it is won, below 0 lost."""
    return sample.systems[results.ROUTED].correct - sample.systems[results.BASE].correct


def _changed(evaluation: results.Result, able: Sequence[results.Sample]) -> list[Block]:
    won = [sample for sample in able if _change(sample) > 0]
    lost = [sample for sample in able if _change(sample) < 0]
    same = [sample for sample in able if _change(sample) == 0]
    if evaluation.is_graded:
        kept = f"{count(len(same))} keep their grade"
    else:
        right = sum(sample.systems[results.BASE].correct >= 1 for sample in same)
        kept = f"{count(right)} stay right, {count(len(same) - right)} stay wrong"
    said = (
        f"Of {count(len(able))} questions {count(len(won))} are won (better with routing) and "
        f"{count(len(lost))} lost; {kept}."
    )
    shown = [*won[:ROWS], *lost[:ROWS]]
    if not shown:
        return [said]
    left = len(won) + len(lost) - len(shown)
    more = f" The others ({count(left)}) are in eval/samples.jsonl." if left else ""
    rows = [
        [
            _short(sample.question),
            "won" if _change(sample) > 0 else "lost",
            NONE if sample.gold is None else _short(sample.choices[sample.gold]),
            *(_answer(sample, system) for system in (results.BASE, results.ROUTED)),
        ]
        for sample in shown
    ]
    header, caption = "|right answer|base|routed", f"The first {ROWS} of each at most.{more}"
    table = Table.made(caption, f"question|with routing{header}", rows, f"with routing{header}")
    return [said, table]


def _answer(sample: results.Sample, system: str) -> str:
    """Return what a system answered, and its grade where it is neither right nor wrong."""
    found = sample.systems[system]
    grade = f" (graded {plain(found.correct, 2)})" if 0 < found.correct < 1 else ""
    if found.answer is None:
        return grade.strip(" ()") or ("right" if found.correct >= 1 else "wrong")
    text = found.answer if isinstance(found.answer, str) else sample.choices[found.answer]
    return (_short(text) or "nothing") + grade


def _short(text: str) -> str:
    """Write a text on one line, cut between words where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rsplit(" ", 1)[0] + " …"


def costs(evaluations: Sequence[results.Evaluation], measured: results.Latency | None) -> Section:
    """Return the section on cost, of every task and of the machine."""
    values = {"evaluations": evaluations, "measured": measured, "phases": PHASES, "median": median}
    return Section("Cost", folded=True, template="cost.j2", values=values)


def time_tile(measured: results.Latency | None) -> Tile:
    """Return what the measured times show, in a tile."""
    if measured is None:
        return Tile("Measured time", "not measured", "evaluate --latency measures it")
    found = measured.measured
    places = found.labels()
    labels = list(places.values())
    most = max(labels, key=labels.count)
    value = most if len({*labels}) == 1 else f"{most} in {labels.count(most)} of {len(labels)}"
    ratios = [median(found.ratio(results.ROUTED, results.BASE, *place)) for place in places]
    note = f"{plain(min(ratios), 2)} to {plain(max(ratios), 2)} times base's, by phase and batch"
    return Tile("Measured time", value, note)


def measured_line(measured: results.Latency) -> str:
    """Say in one line what the measured times show."""
    found = measured.measured
    shown: dict[str, list[str]] = {}
    for (phase, size), label in found.labels().items():
        ratio = plain(median(found.ratio(results.ROUTED, results.BASE, phase, size)), 2)
        shown.setdefault(label, []).append(f"{PHASES[phase]} {count(size)} ({ratio})")
    said = "; ".join(f"{label}: {', '.join(where)}" for label, where in shown.items())
    return (
        f"Measured time, routed / base by rows of a batch, {found.num_rounds} rounds of "
        f"{found.prompt_tokens} tokens: {said}."
    )
