"""The key figures of an evaluation: layers saved, differences from base, and measured time.

Every claim is the label of a verdict; nothing is judged here. Only measured values are called
measured.
"""

from statistics import median

from drllm.cost import share_saved
from drllm.records import results
from drllm.reporting.costs import PHASES
from drllm.reporting.markdown import Tile
from drllm.reporting.numbers import count, percent, plain
from drllm.statistics.differences import Verdict


def build_tiles(evaluation: results.Evaluation, latency: results.Latency | None) -> list[Tile]:
    """Build the key figures: layers saved, differences from base, most accurate system, time."""
    compared = evaluation.compared_system
    if compared is None or compared.against_base is None:
        return [build_time_tile(latency)]
    name = evaluation.name_in_sentence(compared)
    score = evaluation.score if evaluation.is_graded else "Accuracy"
    title = f"{score}, {name} minus base"
    note = f"base {percent(evaluation.base.accuracy)}, {name} {percent(compared.accuracy)}"
    tiles = [
        _build_saved_tile(evaluation, compared),
        _build_difference_tile(title, compared.against_base.accuracy, "points", note),
    ]
    loss = compared.against_base.text_loss
    if loss is not None:
        title = f"Next-token loss, {name} minus base"
        note = "nats a token; less is better"
        tiles.append(_build_difference_tile(title, loss, "nats", note))
    best = find_most_accurate(evaluation)
    if best is not None and best is not compared:
        tiles.append(_build_most_accurate_tile(evaluation, best))
    tiles.append(build_time_tile(latency))
    return tiles


def find_most_accurate(evaluation: results.Evaluation) -> results.System | None:
    """Return the most accurate system that runs fewer layers than base; the cheapest wins a tie.

    Baselines that are means over draws are left out, since nobody can run a mean.
    """
    cheaper = [
        system
        for system in evaluation.systems
        if system.draws == 1 and system.executions < evaluation.num_layers
    ]
    return max(cheaper, key=lambda system: (system.accuracy, -system.executions), default=None)


def _build_saved_tile(evaluation: results.Evaluation, system: results.System) -> Tile:
    saved = share_saved(system.executions, evaluation.num_layers)
    title = "Layers saved" if saved >= 0 else "More layers run"
    note = f"{plain(system.executions, 2)} of {evaluation.num_layers} run a forward pass"
    return Tile(title, percent(abs(saved)), note)


def _build_most_accurate_tile(evaluation: results.Evaluation, system: results.System) -> Tile:
    title = f"Most accurate that saves layers: {evaluation.name_in_sentence(system)}"
    layers = f"{plain(system.executions, 2)} of {evaluation.num_layers} run"
    note = f"{layers}; base {percent(evaluation.base.accuracy)}"
    return Tile(title, percent(system.accuracy), note)


def _build_difference_tile(title: str, verdict: Verdict, unit: str, note: str) -> Tile:
    """Build the tile of a difference, with its verdict and interval; the note comes last."""
    low, high = (verdict.write(end) for end in verdict.interval)
    value = f"{verdict.write(verdict.mean)} {unit}"
    return Tile(title, value, f"95 % interval {low} to {high}; {note}", verdict.label)


def build_time_tile(latency: results.Latency | None) -> Tile:
    """Build the tile with the verdict on the measured times."""
    if latency is None:
        return Tile("Measured time", "not measured", "evaluate --latency measures it")
    timings = latency.measured
    verdicts = timings.judge()
    labels = list(verdicts.values())
    value = max(labels, key=labels.count)  # the most frequent verdict
    if labels.count(value) < len(labels):
        value = f"{value} in {labels.count(value)} of {len(labels)}"
    ratios: list[float] = []
    for phase, size in verdicts:
        round_ratios = timings.compute_ratios(results.ROUTED, results.BASE, phase, size)
        ratios.append(median(round_ratios))
    note = f"{plain(min(ratios), 2)} to {plain(max(ratios), 2)} times base's, by phase and batch"
    return Tile("Measured time", value, note)


def describe_times(latency: results.Latency) -> str:
    """Describe the verdicts on the measured times in one line."""
    timings = latency.measured
    by_verdict: dict[str, list[str]] = {}
    for (phase, size), verdict in timings.judge().items():
        ratio = median(timings.compute_ratios(results.ROUTED, results.BASE, phase, size))
        place = f"{PHASES[phase]} {count(size)} ({plain(ratio, 2)})"
        by_verdict.setdefault(verdict, []).append(place)
    verdicts = "; ".join(f"{name}: {', '.join(places)}" for name, places in by_verdict.items())
    return (
        f"Measured time, routed / base by rows of a batch, {timings.num_rounds} rounds of "
        f"{timings.prompt_tokens} tokens: {verdicts}."
    )
