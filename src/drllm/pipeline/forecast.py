"""What tuning and training will take, derived from the model's shape: `--dry-run`.

No weights are needed. Work is counted in FLOPs, without what paths share, so it is an upper bound;
the time is that of two layers of the same shape with random weights, which are run on the device.

Axes: B rows, D hidden, L layers, T tokens, W windows.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from drllm.config import ModelConfig, TrainConfig, TuneConfig
from drllm.cost import Shares
from drllm.evaluation.flops import ModelShape, prompt_flops
from drllm.evaluation.latency import device_clock
from drllm.models.base.load import BaseModel, resolve_device, without_weights
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.routing.shares import layer_shares
from drllm.models.scoring.batching import PathSize
from drllm.paths import Plan, StaticPath
from drllm.records.resume import Chunks
from drllm.records.static_paths import CERTIFY, FIT, SELECT, TEST
from drllm.records.supervision import SupervisionRecord
from drllm.statistics.intervals import Floats
from drllm.training.feature_store import DTYPES
from drllm.training.features import MAXIMUM_TOKENS, batch_size_on
from drllm.training.targets import targets_for
from drllm.tuning.beam import LAYERS, beam_of
from drllm.tuning.parts import TaskParts
from drllm.tuning.run import TaskScorer

TIMED_ROWS, TIMED_TOKENS, TIMED_ROUNDS = 4, 256, 5
WEIGHT_BYTES, FIT_BYTES = 4, 16  # of a router's weight; with its gradient and two moments


@dataclass(slots=True)
class Work:
    """Passes, each of one prompt along one path, with their tokens and FLOPs."""

    passes: int = 0
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a stage takes at most: work by part; memory by what takes it, and disk, in bytes."""

    base: BaseModel  # without weights
    work: dict[str, Work] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    disk: float = 0.0
    shares: Shares = ()  # of attention and MLP, where parts of layers run

    def count(self, part: str, lengths: Sequence[int], plans: Mapping[Plan, int]) -> None:
        """Add passes: of each plan so many, over prompts of such lengths in tokens."""
        work, length = self.work.setdefault(part, Work()), round(fmean(lengths))
        shape = ModelShape.of(self.base.model, self.shares)
        for plan, num in plans.items():
            flops = prompt_flops(shape, plan, length)
            work.flops += num * (flops.weights + flops.attention)
        work.passes += sum(plans.values())
        work.tokens += length * sum(plans.values())


def of_tuning(model: ModelConfig, config: TuneConfig, divided: Sequence[TaskParts]) -> Forecast:
    """Run the beam search on values that are drawn at random, and count what it asks."""
    base = without_weights(model)
    routed, L = RoutedModel(base.model, tokenizer=base.tokenizer), base.num_layers
    shares = [(0.5, 0.5)] * L
    if config.edits != LAYERS:
        shares = [*layer_shares(RoutedModel(_shallow(base)))[:1]] * L
    beam = beam_of(config, divided, shares)
    fitted: Counter[StaticPath] = Counter()  # on how many questions of the largest task

    def measure(paths: Sequence[StaticPath], num_questions: int) -> Floats:
        fitted.update({path: max(0, num_questions - fitted[path]) for path in paths})
        return np.random.default_rng(len(fitted)).random(len(paths))

    levels = [level.paths for level in beam.levels(measure, lambda _: True)]
    best = [StaticPath(range(L)), *(paths[0] for paths in levels)]
    fitted[best[0]] = beam.num_questions  # the full path is compared with all of them
    tried = {FIT: list(fitted), SELECT: [best[0], *(path for paths in levels for path in paths)]}
    found, longest = Forecast(base, shares=shares), 0
    for task in divided:
        scorer = TaskScorer(routed, task, config, Chunks(Path(), {}, stage=""), lambda *_: None)
        share = len(task.examples[FIT]) / beam.num_questions
        for part in (FIT, SELECT, TEST, *([CERTIFY] if config.epsilon is not None else [])):
            lengths = [item.question.length for item in scorer.judge(part).items]
            paths = tried.get(part, best)
            asked = [round(share * fitted[p]) if part == FIT else len(lengths) for p in paths]
            found.count(part, lengths, dict(zip(paths, asked, strict=True)))
            longest = max(longest, *lengths)
            if part == FIT:
                continue
            texts = [item.question.length for item in scorer.judge(f"texts of {part}").items]
            found.count("texts", texts, dict.fromkeys(best, len(texts)))
            if scorer.is_generated:
                new = max(prompt.max_new_tokens for prompt in scorer.prompts(part))
                written = [len(item.question.context) + new for item in scorer.judge(part).items]
                found.count("answers", written, dict.fromkeys(best, len(written)))
    if config.state_cache_gb is not None:
        found.memory["shared states (--state-cache-gb)"] = config.state_cache_gb * 1e9
    found.memory["a pass of one path"] = PathSize(longest, longest).num_bytes(base.model)
    return found


def of_training(
    model: ModelConfig, config: TrainConfig, targets: Sequence[SupervisionRecord]
) -> Forecast:
    """Count the pass that pools the routers' inputs, and the steps of the fit."""
    base = without_weights(model)
    L, D, W = base.num_layers, base.model.config.get_text_config().hidden_size, config.num_windows
    kept, prompts, _ = targets_for(base.model, base.tokenizer, L, targets)
    lengths = list(map(len, prompts))
    router = (D + 3) * config.router_width * L  # entries of all routers' matrices
    a_target = L * W * D * DTYPES[config.feature_dtype][0].itemsize
    written = len(kept) * a_target + config.num_seeds * WEIGHT_BYTES * router
    found = Forecast(base, disk=written)
    found.count("features", lengths, Counter(each.optimal_layer_config for each in kept))
    passes = config.num_epochs * config.num_seeds * len(kept)
    # Forward, and backward for weights and inputs: three products of two FLOPs each.
    found.work["fit"] = Work(passes, passes * W, 6.0 * passes * W * router)
    size = min(batch_size_on(resolve_device(model.device).type, L * W * D), len(kept))
    batch = PathSize(min(MAXIMUM_TOKENS, size * max(lengths)), size)
    found.memory["a batch of the feature pass"] = batch.num_bytes(base.model)
    found.memory["the fit"] = FIT_BYTES * router
    found.memory["features, held where memory allows"] = len(kept) * L * W * D * WEIGHT_BYTES
    return found


def flops_a_second(base: BaseModel, device: torch.device) -> float:
    """Run two layers of the model's shape, with random weights, and return how fast they are."""
    small, clock, seconds = _shallow(base).to(device), device_clock(device), []
    ids = torch.arange(TIMED_TOKENS, device=device).repeat(TIMED_ROWS, 1)  # [B, T]
    with torch.inference_mode():
        for _ in range(1 + TIMED_ROUNDS):
            started = clock()
            small(input_ids=ids, use_cache=False, logits_to_keep=1)
            seconds.append(clock() - started)
    flops = prompt_flops(ModelShape.of(small), (1, 1), TIMED_TOKENS)
    return TIMED_ROWS * (flops.weights + flops.attention) / median(seconds[1:])


def _shallow(base: BaseModel) -> Any:
    """Return a model of two layers of the same shape, with random weights and few words."""
    config: Any = copy.deepcopy(base.model.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 2, TIMED_TOKENS, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    return AutoModelForCausalLM.from_config(config, dtype=base.model.dtype).eval()
