"""Fit a bypass: for each layer a linear map that stands in for it, in closed form.

The map of layer l is a ridge regression with an intercept, fitted on the full path's own states:
from n(h_l), where h_l enters the layer, to h_{l+1} − h_l, what the layer adds. λ is chosen on
held-out texts. The map is then cut to a rank by the principal axes of the fitted values. First
tokens are apart: there the mean of what the layer adds is used.

One pass over the texts sums up what the regressions need, for as many layers as fit into memory.

Axes: n tokens, L layers, D hidden, r rank.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.config import BypassConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError, ModelError, TaskError
from drllm.model.batching import free_bytes
from drllm.model.devices import on_device
from drllm.model.identity import describe_adapters
from drllm.model.load import BaseModel
from drllm.model.prompts import context_length, encode
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.models.routing.bypass import TENSORS, Bypass, LayerMap, normalise
from drllm.models.routing.bypass_file import (
    BYPASS_FILE,
    BypassRecord,
    load_bypass,
    load_bypass_with_record,
    save_bypass,
)
from drllm.models.routing.injection import Driver, LayerCall
from drllm.prune.least_squares import Ridge, Sums, share_of_error
from drllm.prune.questions import make_prompt
from drllm.prune.repairs.refit import MIN_TEXTS, SHARE_FOR_FLOAT32, split_for_ridge
from drllm.prune.states import TextBatch, in_float32, make_batches
from drllm.records.places import only_writer
from drllm.search.evaluator import tokenize_prompt
from drllm.tasks.base import NoSplitError, Task, check_data_dir
from drllm.tasks.examples import Example, choose
from drllm.tasks.registry import get_tasks
from drllm.tasks.texts import (
    Tokens,
    choose_calibration_texts,
    cut_texts,
    list_text_warnings,
    read_texts,
    refuse_same_name,
)
from drllm.work.listener import Listener, OnProgress
from drllm.work.store import refuse_other_run

SPLITS = ("search", "fit")  # of a task, whose questions are texts
RIDGES = tuple(10.0**exponent for exponent in range(-5, 2))
"""The values of λ to choose from, for inputs of variance 1."""
SMALLEST_DEVIATION = 1e-6
"""The least standard deviation of an input, as a share of its root mean square or of 1."""
SHARE_OF_MEMORY = 0.25  # of the free memory of the host that the sums may take
MATRICES_PER_LAYER = 4  # [D, D] in float64: inner and cross, of both parts of the texts


def fit_bypass(
    model: Any,
    texts: str | Sequence[str] | None = None,
    tasks: Task | str | Sequence[Task | str] | None = None,
    config: BypassConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Bypass:
    """Fit a bypass: for each layer a linear map that runs in its place where it is skipped.

    The maps are solved in closed form, from the states of the full path on texts.

    Args:
        model: The model: its settings or name, what `load` returns, a model of transformers, or a
            `RoutedModel` without a bypass.
        texts: Texts in a list, or names in one string, separated by commas: files of texts, data
            sets of the hub, and `builtin_texts`. None takes those of the settings.
        tasks: Tasks, or their names. Their questions with the right answers are texts, or their
            prompts alone if they have no answers. None takes those of the settings.
        config: The settings; None takes the defaults.
        output_dir: The folder for `bypass.safetensors`; None writes nothing. A bypass of the same
            settings that is there is returned.
        tokenizer: The model's tokenizer; None takes the one that the model comes with.
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
    with listener.busy("reading the questions and texts"):
        questions = _read_questions(config.tasks if tasks is None else tasks, config)
        by_source: dict[str, list[str]] = {}
        if texts is None:
            texts = config.text
        if isinstance(texts, str):
            by_source = read_texts(texts, config.limit, config.seed)
        elif texts:
            by_source = {"texts": choose(texts, config.limit, config.seed)}
    for name in by_source:
        refuse_same_name(name, questions)
    names = [*questions, *by_source]
    if not names:
        raise ConfigError(
            "there is nothing to fit on; give tasks (--tasks, for a first try builtin_facts), "
            "files of texts (--text), or both"
        )
    with ExitStack() as stack:
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        if base.bypass is not None:
            raise ConfigError("the model has a bypass already; fit another one without --bypass")
        context = context_length(base.model)
        if context is not None and config.max_tokens > context:
            raise ConfigError(
                f"--max-tokens is {config.max_tokens}, and this model reads {context} tokens; give "
                f"at most {context}"
            )
        made_from = {
            "settings": config.decisive(),
            "model": base.identity,
            "runtime": {**base.runtime, **describe_adapters(base.model)},
            "texts": names,
        }
        file = None
        if output_dir is not None:
            file = Path(output_dir) / BYPASS_FILE
            stack.enter_context(only_writer(file.parent, "fitting the bypass", "--output-dir"))
            if file.exists():
                bypass, record = load_bypass_with_record(file)
                remedy = "choose another --output-dir, or delete the old one"
                refuse_other_run(f"the bypass in {file}", record.made_from, made_from, remedy)
                return bypass
        sequences = {}
        with listener.busy("reading the texts"):
            for name, (task, examples) in questions.items():
                tokens = _tokenize_questions(base, task, examples)
                sequences[name] = cut_texts(tokens, config.max_tokens)
            for name, source_texts in by_source.items():
                tokens = [tuple(encode(base.tokenizer, text)) for text in source_texts]
                sequences[name] = cut_texts(tokens, config.max_tokens)
        chosen = choose_calibration_texts(sequences, config.tokens, config.seed)
        all_chosen = [sequence for source in chosen.values() for sequence in source]
        num_tokens = sum(map(len, all_chosen))
        for warning in list_text_warnings(list(chosen), num_tokens, "bypass"):
            listener.note(warning)
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        with listener.progress("fitting the bypass", "") as on_progress:
            maps, unexplained = solve_bypass(routed, all_chosen, config.rank, on_progress)
        bypass = join_maps(maps, base.identity)
        if file is None:
            return bypass
        record = BypassRecord(
            model=dict(base.identity),
            texts=tuple(chosen),
            num_tokens=num_tokens,
            unexplained=tuple(unexplained),
            made_from=made_from,
            drllm_version=version("drllm"),
        )
        save_bypass(file, bypass, record)
        return load_bypass(file)


def _read_questions(
    tasks: Task | str | Sequence[Task | str] | None, config: BypassConfig
) -> dict[str, tuple[Task, list[Example]]]:
    """Read the questions of tasks that are texts to fit on; name of a task → both."""
    if isinstance(tasks, (str, Task)):
        tasks = [tasks]
    check_data_dir(config.data_dir)
    all_tasks: list[Task] = []
    for task in tasks or ():
        if isinstance(task, str):
            all_tasks += get_tasks(task, trust_code=config.trust_task_code)
        else:
            all_tasks.append(task)
    questions: dict[str, tuple[Task, list[Example]]] = {}
    for task in all_tasks:
        examples: list[Example] = []
        for split in SPLITS:
            with suppress(NoSplitError):
                examples += task.examples(split, config.data_dir)
        if not examples:
            raise TaskError(
                f"task {task.name!r} has no questions in the splits {' and '.join(SPLITS)}, and "
                f"the others aren't fitted on; give another task, or texts with --text"
            )
        refuse_same_name(task.name, questions)
        questions[task.name] = (task, choose(examples, config.limit, config.seed))
    return questions


def _tokenize_questions(base: BaseModel, task: Task, examples: Sequence[Example]) -> list[Tokens]:
    """Return questions with their right answers, or prompts alone if there are none, as tokens."""
    texts: list[Tokens] = []
    for example in examples:
        prompt = make_prompt(task, example)
        tokenized = tokenize_prompt(base, prompt)
        answer = tokenized.continuations[prompt.gold or 0]
        texts.append((*tokenized.tokens, *answer))
    return texts


class LayerSums:
    """The sums over tokens from which the map of one layer is solved.

    Attributes:
        others: The sums of n(h) and of what the layer adds, over all tokens but first ones.
        first: The sum of what the layer adds over first tokens, `[D]`.
        num_first: How many first tokens there are.
    """

    def __init__(self, hidden_size: int) -> None:
        self.others = Sums(hidden_size, hidden_size, "cpu")
        self.first = torch.zeros(hidden_size, dtype=torch.float64)
        self.num_first = 0

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return self.others.is_finite and bool(self.first.isfinite().all())

    def add(self, states: Tensor, changes: Tensor, is_first: Tensor) -> None:
        """Add tokens: their states and what the layer adds `[n, D]`, and which are first `[n]`."""
        inputs = normalise(states.to(self.first))
        changes = changes.to(self.first)
        is_first = is_first.cpu()
        self.first += changes[is_first].sum(dim=0)
        self.num_first += int(is_first.sum())
        self.others.add(inputs[~is_first], changes[~is_first])


class _ChangeSummer(Driver):
    """Runs all layers, and adds what some of them change to their sums."""

    def __init__(self, batch: TextBatch, sums: Mapping[int, LayerSums]) -> None:
        self.batch = batch
        self.sums = sums

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layer once."""
        output = call.run(hidden)
        if call.index in self.sums:
            states = self.batch.select(hidden)
            changes = self.batch.select(output).to(states.device) - states
            is_first = on_device(self.batch.is_first, states.device)
            self.sums[call.index].add(states, changes, is_first)
        return output


def solve_bypass(
    routed: RoutedModel,
    texts: Sequence[Tokens],
    rank: int,
    on_progress: OnProgress | None = None,
) -> tuple[list[LayerMap], list[float]]:
    """Solve the maps of a model's layers.

    Args:
        routed: The model; it has no bypass yet.
        texts: Texts as tokens, 50 thousand tokens or more. λ is chosen on a tenth of the texts,
            picked by their hash.
        rank: The rank of the maps, at most the hidden size.
        on_progress: Receives the progress after each batch of texts.

    Returns:
        The maps `[L]` in float64, and the squared error of each on held-out texts, as a share of
        that of doing nothing.

    Raises:
        ModelError: The states aren't finite.
        TaskError: There are fewer than two texts.
    """
    if len(texts) < MIN_TEXTS:
        raise TaskError(
            f"a bypass needs at least {MIN_TEXTS} texts, one of them to choose λ on, and there "
            f"are {len(texts)}; give more texts"
        )
    hidden_size = int(routed.config.get_text_config().hidden_size)
    layer_bytes = MATRICES_PER_LAYER * hidden_size**2 * torch.float64.itemsize
    room = SHARE_OF_MEMORY * free_bytes(torch.device("cpu"))
    group_size = max(1, int(room // layer_bytes))
    starts = range(0, routed.num_layers, group_size)
    batches_by_part = [make_batches(part, routed.device) for part in split_for_ridge(texts)]
    num_passes = len(starts) * sum(map(len, batches_by_part))
    num_done = 0
    maps: list[LayerMap] = []
    unexplained: list[float] = []
    with torch.no_grad(), ExitStack() as stack:
        weights = list(routed.model.parameters())
        num_bytes_grown = sum((4 - weight.itemsize) * weight.numel() for weight in weights)
        if num_bytes_grown < SHARE_FOR_FLOAT32 * free_bytes(routed.device):
            stack.enter_context(in_float32(routed.model))
        for start in starts:
            layers = range(start, min(start + group_size, routed.num_layers))
            sums_by_part = []
            for batches in batches_by_part:
                sums = {layer: LayerSums(hidden_size) for layer in layers}
                sums_by_part.append(sums)
                for batch in batches:
                    with routed.injection.driven_by(_ChangeSummer(batch, sums)):
                        routed.injection.decoder(input_ids=batch.ids, use_cache=False)
                    num_done += 1
                    if on_progress is not None:
                        on_progress(num_done, num_passes)
            fit, held_out = sums_by_part
            for layer in layers:
                if not (fit[layer].is_finite and held_out[layer].is_finite):
                    raise ModelError(
                        f"layer {layer} can't have a bypass, since the states of the texts aren't "
                        f"finite; load the model with --dtype float32"
                    )
                layer_map, share = solve_layer(fit[layer], held_out[layer], rank)
                maps.append(layer_map)
                unexplained.append(share)
    return maps, unexplained


def solve_layer(fit: LayerSums, held_out: LayerSums, rank: int) -> tuple[LayerMap, float]:
    """Solve the map of a layer; return it with the share of the held-out error that is left.

    λ is the one whose map of full rank has the lowest error on `held_out`. The map is then solved
    once more from all texts, and cut to the rank. `held_out` is added to `fit`.
    """
    errors = {}
    for ridge in RIDGES:
        weight, bias = _solve_map(fit.others, ridge)
        errors[ridge] = held_out.others.error(weight, bias)
    best = min(errors, key=errors.__getitem__)
    down, up, bias = _solve_low_rank(fit.others, best, rank)
    error = held_out.others.error((up @ down).T, bias)
    unexplained = share_of_error(error, held_out.others.plain_error)
    fit.others.merge(held_out.others)
    down, up, bias = _solve_low_rank(fit.others, best, rank)
    num_first = fit.num_first + held_out.num_first
    first = (fit.first + held_out.first) / max(1, num_first)
    return LayerMap(down, up, bias, first), unexplained


def _solve_map(sums: Sums, ridge: float) -> tuple[Tensor, Tensor]:
    """Return Wᵀ `[D, D]` and b `[D]` for one λ, from inputs of mean 0 and variance 1.

    An input that is the same in every token counts as 0. Its covariances are rounding errors.
    """
    input_mean = sums.inputs / sums.count
    output_mean = sums.outputs / sums.count
    squares = sums.inner / sums.count
    inner = squares - torch.outer(input_mean, input_mean)
    cross = sums.cross / sums.count - torch.outer(input_mean, output_mean)
    variance = inner.diagonal().clone()
    is_constant = variance <= SMALLEST_DEVIATION**2 * squares.diagonal().clamp_min(1.0)
    variance[is_constant] = 1.0
    inner[is_constant] = 0.0
    inner[:, is_constant] = 0.0
    cross[is_constant] = 0.0
    solver = Ridge(inner, variance.sqrt(), 1)
    weight = solver.solve(cross, solver.factor(ridge))
    return weight, output_mean - weight.T @ input_mean


def _solve_low_rank(sums: Sums, ridge: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return P `[r, D]`, Q `[D, r]` and b `[D]` for one λ.

    Q P x are the values W x, projected on their first principal axes.
    """
    weight, _ = _solve_map(sums, ridge)
    mean = sums.inputs / sums.count
    covariance = sums.inner / sums.count - torch.outer(mean, mean)
    _, axes = torch.linalg.eigh(weight.T @ covariance @ weight)  # the largest last
    up = axes[:, -rank:]
    down = up.T @ weight.T
    return down, up, sums.outputs / sums.count - up @ (down @ mean)


def join_maps(maps: Sequence[LayerMap], model: Mapping[str, Any]) -> Bypass:
    """Return the bypass of the maps of all layers `[L]`, for a model with this identity."""
    tensors: dict[str, Any] = {}
    for name in TENSORS:
        tensors[name] = torch.stack([getattr(layer_map, name) for layer_map in maps]).float()
    return Bypass(**tensors, model=model)
