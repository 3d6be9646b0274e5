"""The stage `bypass`: fit linear maps that run in place of skipped layers, and write them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from drllm.config import BypassConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError
from drllm.model.identity import describe_adapters
from drllm.model.load import BaseModel
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
    list_text_warnings,
    read_bypass_sources,
)
from drllm.tuning.heal_tokens import (
    PROMPTS,
    TextTokenizer,
    check_max_tokens,
    digest_prompts,
)
from drllm.tuning.kept_tensors import KeptTensors
from drllm.work.listener import Listener
from drllm.work.store import ResultStore, refuse_other_run

PARTIAL_FOLDER = "bypass.partial"


class SolvedLayer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The map of a layer, as it is kept for a resumed run.

    Attributes:
        unexplained: As in `LayerSolution`.
        weights: The tensors by name.
    """

    unexplained: float
    weights: KeptTensors


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
        tasks: As for `heal`.
        config: The settings; None takes the defaults.
        output_dir: The folder for `bypass.safetensors`; None writes nothing.
        tokenizer: As for `tune`.
        listener: Receives progress and notes.
        settings: Settings of `BypassConfig` by name, which replace the config's settings.

    Returns:
        The bypass; give it to `attach`.

    Raises:
        ConfigError: The folder belongs to another run, there is nothing to fit on, or `max_tokens`
            is more than the model reads.
        ModelError: The states of the texts aren't finite.
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
        check_max_tokens(base.model, config.max_tokens)
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
    identity = _make_identity(base, sources, config)
    prompts = {PROMPTS: digest_prompts(base, sources)}
    made_from = {**identity, **prompts}
    file = folder / BYPASS_FILE
    if file.exists():
        return _read_finished(file, made_from)
    store = ResultStore(folder / PARTIAL_FOLDER, identity, stage="bypass")
    store.open()
    store.expect("bypass", prompts)
    tokenizer = TextTokenizer(routed, config.max_tokens, store, listener)
    by_source = _choose_texts(tokenizer.tokenize_sources(sources), config)
    texts = [text for source_texts in by_source.values() for text in source_texts]
    num_tokens = sum(map(len, texts))
    for warning in list_text_warnings(list(by_source), num_tokens, "bypass"):
        listener.note(warning)
    solutions = _solve(routed, texts, config.rank, store, listener)
    bypass = join_solutions(solutions, base.identity)
    record = BypassRecord(
        model=dict(base.identity),
        texts=tuple(by_source),
        num_tokens=num_tokens,
        unexplained=tuple(solution.unexplained for solution in solutions),
        made_from=made_from,
        drllm_version=version("drllm"),
    )
    save_bypass(file, bypass, record)
    store.remove()
    return load_bypass(file)


def _make_identity(
    base: BaseModel, sources: Sequence[TextSource], config: BypassConfig
) -> dict[str, Any]:
    """Return the values by which a run recognises its own files."""
    return {
        "settings": config.decisive(),
        "model": base.identity,
        "runtime": {**base.runtime, **describe_adapters(base.model)},
        "texts_sha256": digest_sources(sources),
    }


def _read_finished(file: Path, made_from: Mapping[str, Any]) -> Bypass:
    """Return the bypass that an earlier run has written; refuse that of another run."""
    bypass, record = load_bypass_with_record(file)
    # Older files have no digest of the prompts, so it isn't compared.
    stored = {PROMPTS: made_from[PROMPTS], **record.made_from}
    remedy = "choose another --output-dir, or delete the old one"
    refuse_other_run(f"the bypass in {file}", stored, made_from, remedy)
    return bypass


def _choose_texts(
    by_source: Mapping[str, Sequence[Tokens]], config: BypassConfig
) -> dict[str, list[Tokens]]:
    """Cut the texts of each source, and choose those to fit on."""
    sequences = {}
    for name, texts in by_source.items():
        sequences[name] = cut_texts(texts, config.max_tokens)
    return choose_calibration_texts(sequences, config.tokens, config.seed)


def _solve(
    routed: RoutedModel,
    texts: Sequence[Tokens],
    rank: int,
    store: ResultStore,
    listener: Listener,
) -> list[LayerSolution]:
    """Solve the maps of all layers; those that are kept aren't solved again."""
    solutions: dict[int, LayerSolution] = {}
    for layer in range(routed.num_layers):
        kept = store.get(_name_layer(layer), SolvedLayer)
        if kept is not None:
            solutions[layer] = _decode(kept)
    missing = [layer for layer in range(routed.num_layers) if layer not in solutions]
    with listener.progress("fitting the bypass", "") as on_progress:
        solver = BypassSolver(routed, texts, rank, on_progress, layers=missing)
        for group in solver.groups:
            for layer, solution in zip(group, solver.solve(group), strict=True):
                solved = store.of(SolvedLayer).put(_name_layer(layer), _encode(solution))
                solutions[layer] = _decode(solved)
    return [solutions[layer] for layer in range(routed.num_layers)]


def _name_layer(layer: int) -> str:
    """Return the name of a layer's map among the kept results."""
    return f"layer {layer}"


def _encode(solution: LayerSolution) -> SolvedLayer:
    """Return a map as it is kept."""
    tensors = dict(zip(TENSORS, solution.layer_map, strict=True))
    return SolvedLayer(unexplained=solution.unexplained, weights=KeptTensors.pack(tensors))


def _decode(kept: SolvedLayer) -> LayerSolution:
    """Return a map that is kept."""
    tensors = kept.weights.unpack()
    layer_map = LayerMap(*(tensors[name] for name in TENSORS))
    return LayerSolution(layer_map, kept.unexplained)
