"""Prints the forecast of a search: the time, memory and disk that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drllm.cli.terminal import Terminal
from drllm.config import SearchConfig
from drllm.work.listener import format_duration

if TYPE_CHECKING:
    from drllm.model.load import BaseModel
    from drllm.search.forecast import TaskForecast


def show_forecasts(
    forecasts: Sequence[TaskForecast], base: BaseModel, config: SearchConfig, terminal: Terminal
) -> None:
    """Print what the search of each task needs, what all of it needs, and one prompt.

    Args:
        forecasts: A forecast for each task.
        base: The model that the forecasts were measured with.
        config: The settings of the search.
        terminal: Where to print.
    """
    rows = []
    for forecast in forecasts:
        num_questions = str(forecast.questions)
        num_paths = str(forecast.paths)
        executions = f"{forecast.executions:.2e}"
        hours = f"{forecast.seconds / 3600:.3g}"
        megabytes = f"{forecast.size_bytes / 1e6:.3g}"
        rows.append([forecast.task, num_questions, num_paths, executions, hours, megabytes])
    terminal.table("task|questions|paths|executions|hours|MB", rows, numbers_from=1)
    _print_totals(forecasts, base, config, terminal)
    for forecast in forecasts:
        terminal.fact(
            "measured on",
            f"{forecast.sample_paths} paths of {forecast.sample_questions} questions of "
            f"{forecast.task}: {base.name}, {base.runtime['dtype']} on {base.runtime['device']}",
        )
    first = forecasts[0]
    terminal.say(f"a prompt of {first.task}, as the model reads it:\n{first.prompt}")


def _print_totals(
    forecasts: Sequence[TaskForecast], base: BaseModel, config: SearchConfig, terminal: Terminal
) -> None:
    """Print the time, memory and disk that the search of all tasks needs."""
    seconds = sum(forecast.seconds for forecast in forecasts)
    time = f"{format_duration(seconds)} on one {base.runtime['device']}"
    num_workers = config.num_workers or 1
    if num_workers > 1:
        time += f", {format_duration(seconds / num_workers)} on {num_workers} like it"
    terminal.fact("time", time)

    weights_gb = base.model.num_parameters() * base.model.dtype.itemsize / 1e9
    cache = "a quarter of what is free"
    if config.state_cache_gb is not None:
        cache = f"up to {config.state_cache_gb:g} GB"
    terminal.fact("memory", f"{weights_gb:.3g} GB weights, {cache} (--state-cache-gb) and passes")

    megabytes = sum(forecast.size_bytes for forecast in forecasts) / 1e6
    terminal.fact("disk", f"{megabytes:.3g} MB, twice that while the files are joined")
