"""The stage `bypass`: fit linear maps that run in place of skipped layers, and write them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from drllm.config import BypassConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError
from drllm.models.base.load import BaseModel
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.models.routing.bypass import TENSORS, Bypass, LayerMap
from drllm.models.routing.bypass_file import (
    BYPASS_FILE,
    BypassRecord,
    load_bypass,
    load_bypass_with_record,
    save_bypass,
)
from drllm.records.places import only_writer
from drllm.tasks.base import Task
from drllm.tuning.bypass_solver import BypassSolver, LayerSolution, join_solutions
from drllm.tuning.heal_texts import (
    TextArgument,
    TextSource,
    Tokens,
    choose_calibration_texts,
    cut_texts,
    digest_sources,
    read_bypass_sources,
    warn_of_texts,
)
from drllm.tuning.heal_tokens import TextTokenizer
from drllm.work.listener import Listener
from drllm.work.store import ResultStore, refuse_other_run

PARTIAL_FOLDER = "bypass.partial"


class SolvedLayers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The maps of some layers, as they are kept for a resumed run.

    Attributes:
        unexplained: As in `LayerSolution`, by layer.
        weights: The tensors, as a file of safetensors.
    """

    unexplained: tuple[float, ...]
    weights: bytes


def fit_bypass(
    model: Any,
    texts: TextArgument = None,
    tasks: Task | str | Sequence[Task | str] | None = None,
    config: BypassConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Bypass:
    """Fit a bypass: for each layer a linear map that runs in its place where it is skipped.

    The maps are solved in closed form, from the states of the full path on texts. After an
    interruption the same call resumes.

    Args:
        model: As for `tune`, without Ray.
        texts: As for `heal`.
        tasks: As for `heal`; tasks need right answers.
        config: The settings; None takes the defaults.
        output_dir: The folder for `bypass.safetensors`; None writes nothing.
        tokenizer: As for `tune`.
        listener: Receives progress and notes.
        settings: Settings of `BypassConfig` by name, which replace the config's settings.

    Returns:
        The bypass; give it to `attach`.

    Raises:
        ConfigError: The folder belongs to another run, or there is nothing to fit on.
        TaskError: A task is unknown, there are too few texts, or a file can't be read.

    Source: ours.

    Example:
        >>> bypass = drllm.fit_bypass(model, texts)  # doctest: +SKIP
        >>> routed = drllm.attach(model, bypass=bypass)  # doctest: +SKIP
    """
    config = replace_settings(BypassConfig, config, settings)
    listener = listener or Listener()
    sources = read_bypass_sources(config, tasks, texts)
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        if base.bypass is not None:
            raise ConfigError("the model has a bypass already; fit another one without --bypass")
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        stack.enter_context(only_writer(folder, "fitting the bypass", "--output-dir"))
        return _fit(base, routed, sources, config, folder, listener)


def _fit(
    base: BaseModel,
    routed: RoutedModel,
    sources: Sequence[TextSource],
    config: BypassConfig,
    folder: Path,
    listener: Listener,
) -> Bypass:
    """Fit a bypass and write it, or return the one that an earlier run has written."""
    identity = {
        "settings": config.decisive(),
        "model": base.identity,
        "runtime": base.runtime,
        "texts_sha256": digest_sources(sources),
    }
    file = folder / BYPASS_FILE
    if file.exists():
        bypass, record = load_bypass_with_record(file)
        remedy = "choose another --output-dir, or delete the old one"
        refuse_other_run(f"the bypass in {file}", record.made_from, identity, remedy)
        return bypass
    store = ResultStore(folder / PARTIAL_FOLDER, identity, stage="bypass")
    store.open()
    tokenizer = TextTokenizer(routed, config.max_tokens, store, listener)
    by_source = tokenizer.tokenize_sources(sources)
    chosen = choose_calibration_texts(
        {name: cut_texts(texts, config.max_tokens) for name, texts in by_source.items()},
        config.tokens,
        config.seed,
    )
    texts = [text for source_texts in chosen.values() for text in source_texts]
    num_tokens = sum(map(len, texts))
    for warning in warn_of_texts(list(chosen), num_tokens, "bypass"):
        listener.note(warning)
    solutions = _solve(routed, texts, config.rank, store, listener)
    bypass = join_solutions(solutions, base.identity)
    record = BypassRecord(
        model=dict(base.identity),
        texts=tuple(chosen),
        num_tokens=num_tokens,
        unexplained=tuple(solution.unexplained for solution in solutions),
        made_from=identity,
        drllm_version=version("drllm"),
    )
    save_bypass(file, bypass, record)
    store.remove()
    return load_bypass(file)


def _solve(
    routed: RoutedModel,
    texts: Sequence[Tokens],
    rank: int,
    store: ResultStore,
    listener: Listener,
) -> list[LayerSolution]:
    """Solve the maps of all layers; those that are kept aren't solved again."""
    solutions: list[LayerSolution] = []
    with listener.progress("fitting the bypass", "") as on_progress:
        solver = BypassSolver(routed, texts, rank, on_progress)
        for group in solver.groups:
            key = f"layers {group.start} to {group.stop}"
            if store.has(key):
                solver.skip()
            kept = store.get_or_make(key, SolvedLayers, partial(_solve_group, solver, group))
            solutions += _decode(kept)
    return solutions


def _solve_group(solver: BypassSolver, group: range) -> SolvedLayers:
    """Solve the maps of some layers, as they are kept."""
    solutions = solver.solve(group)
    tensors = {}
    for number, solution in enumerate(solutions):
        for name, tensor in zip(TENSORS, solution.layer_map, strict=True):
            tensors[f"{number} {name}"] = tensor.contiguous()
    return SolvedLayers(
        unexplained=tuple(solution.unexplained for solution in solutions),
        weights=to_safetensors(tensors),
    )


def _decode(kept: SolvedLayers) -> list[LayerSolution]:
    """Return maps that are kept."""
    tensors = from_safetensors(kept.weights)
    solutions = []
    for number, unexplained in enumerate(kept.unexplained):
        layer_map = LayerMap(*(tensors[f"{number} {name}"] for name in TENSORS))
        solutions.append(LayerSolution(layer_map, unexplained))
    return solutions
