"""The key figures of an evaluation: layers saved, differences from base, and measured time.

Every claim is the label of a verdict; nothing is judged here. Only measured values are called
measured.
"""

from statistics import median

from drllm.cost import share_saved
from drllm.records import results
from drllm.records.latency import Latency
from drllm.reporting.costs import PHASES
from drllm.reporting.markdown import Tile
from drllm.reporting.numbers import (
    write_count,
    write_executions,
    write_label_with_needed,
    write_number,
    write_percent,
)
from drllm.statistics.words import capitalize


def build_tiles(evaluation: results.Evaluation, latency: Latency | None) -> list[Tile]:
    """Build the key figures: of the best path, of the routed model, and the measured time.

    The most accurate system has a tile if it is another system than these.
    """
    tiles: list[Tile] = []
    main_systems = [evaluation.best_path, evaluation.routed]
    for system in main_systems:
        if system is not None and system.against_base is not None:
            tiles += _build_system_tiles(evaluation, system)
    most_accurate = find_most_accurate(evaluation)
    if most_accurate is not None and most_accurate not in main_systems:
        tiles.append(_build_most_accurate_tile(evaluation, most_accurate))
    if latency is not None:
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


def _build_system_tiles(evaluation: results.Evaluation, system: results.System) -> list[Tile]:
    """Build the tiles of a system: its layers, its accuracy, and its next-token loss if known."""
    name = capitalize(evaluation.name_in_sentence(system))
    assert system.against_base is not None
    accuracy = system.against_base.accuracy
    score = evaluation.score if evaluation.is_graded else "accuracy"
    tiles = [
        _build_layers_tile(name, evaluation, system),
        Tile(
            f"{name}: {score} minus base's",
            f"{accuracy.write(accuracy.mean)} points",
            f"{write_percent(system.accuracy)}, base {write_percent(evaluation.base.accuracy)}",
            write_label_with_needed(accuracy),
        ),
    ]
    loss = system.against_base.text_loss
    if loss is not None:
        tiles.append(
            Tile(
                f"{name}: next-token loss minus base's",
                f"{loss.write(loss.mean)} nats",
                "a token; less is better",
                write_label_with_needed(loss),
            )
        )
    return tiles


def _build_layers_tile(name: str, evaluation: results.Evaluation, system: results.System) -> Tile:
    saved = share_saved(system.executions, evaluation.num_layers)
    note = f"{write_percent(saved)} fewer" if saved >= 0 else f"{write_percent(-saved)} more"
    executions = write_executions(system.executions)
    return Tile(f"{name}: layers run", f"{executions} of {evaluation.num_layers}", note)


def _build_most_accurate_tile(evaluation: results.Evaluation, system: results.System) -> Tile:
    title = f"Most accurate that saves layers: {evaluation.name_in_sentence(system)}"
    layers = f"{write_number(system.executions, 2)} of {evaluation.num_layers} run"
    note = f"{layers}; base {write_percent(evaluation.base.accuracy)}"
    return Tile(title, write_percent(system.accuracy), note)


def build_time_tile(latency: Latency) -> Tile:
    """Build the tile with the verdict on the measured times."""
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
    least = write_number(min(ratios), 2)
    most = write_number(max(ratios), 2)
    note = f"{least} to {most} times base's, by phase and batch"
    return Tile("Measured time", value, note)


def describe_times(latency: Latency) -> str:
    """Describe the verdicts on the measured times in one line."""
    timings = latency.measured
    by_verdict: dict[str, list[str]] = {}
    for (phase, size), verdict in timings.judge().items():
        ratio = median(timings.compute_ratios(results.ROUTED, results.BASE, phase, size))
        place = f"{PHASES[phase]} {write_count(size)} ({write_number(ratio, 2)})"
        by_verdict.setdefault(verdict, []).append(place)
    verdicts = "; ".join(f"{name}: {', '.join(places)}" for name, places in by_verdict.items())
    return (
        f"Measured time, routed / base by rows of a batch, {timings.num_rounds} rounds of "
        f"{timings.prompt_tokens} tokens: {verdicts}."
    )
