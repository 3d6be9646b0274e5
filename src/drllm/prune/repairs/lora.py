"""LoRA on all linear maps of a shortened model, trained on right answers.

The loss is in `loss`. A *check* measures it on the check part of the questions, before the training
and five times in it; the weights of the best check stay. LoRA is plain PEFT, and is merged into new
tensors at the end, so that the shared ones stay as they are.

Source: LoRA is arXiv 2106.09685; the loss is ours.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from drllm.config import LearnConfig
from drllm.errors import ConfigError
from drllm.model.batching import free_bytes
from drllm.model.layers import find_layers
from drllm.model.load import resolve_dtype
from drllm.prune.loss import Item, compute_losses
from drllm.prune.repairs.base import REPAIRS, Lessons, Repair
from drllm.records.codec import write_atomically
from drllm.work.listener import Listener

WARM_UP = 20  # steps in which the learning rate rises
LEAST_RATE = 0.02  # of the learning rate, at the end of its cosine
CHECKS = 5
SHARE_FOR_CHECKS = 0.25  # of the time; where checks would take more, there are fewer
CHECKED_AT_ONCE = 8
SAVE_SECONDS = 60  # a killed training loses about this much
STATE_FILE = "lora.state.safetensors"
SHARE_FOR_ACTIVATIONS = 0.3  # of the free memory; where a step takes more, it is checkpointed


@REPAIRS.register("lora")
class Lora(Repair):
    """Trains LoRA on right answers."""

    def check(self, model: Any, teacher: Any) -> None:
        """Do nothing: every model can have LoRA."""

    def fit(
        self, model: Any, teacher: Any, lessons: Lessons, work: Path, listener: Listener
    ) -> dict[str, Any]:
        """Train LoRA for some minutes or steps, and merge it.

        The time counts the training and its checks. Each question is drawn once before any is
        drawn again.
        """
        from peft import LoraConfig, get_peft_model

        config = self.config
        items = [item for of_source in lessons.fit.values() for item in of_source]
        checked = lessons.sample_checked(config.seed)
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # PEFT reads a property of the model by a name that transformers deprecates.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            student = get_peft_model(model, lora)
        try:
            named = {n: each for n, each in student.named_parameters() if each.requires_grad}
            parameters = list(named.values())
            optimizer = torch.optim.AdamW(
                parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
            )
            run = _Run(named, optimizer, work / STATE_FILE)
            run.resume()
            draws = _draw(items, config.batch_size, config.seed)
            for _ in range(run.step):
                next(draws)
            with (
                listener.progress("learning", "") as on_progress,
                _quick_weights(model),
                _quick_weights(teacher),
                _checkpointed(student, items, config.batch_size),
            ):
                while True:
                    share = run.share(config)
                    on_progress(min(share, 1.0), 1.0, run.describe())
                    is_due = len(run.curve) <= share * CHECKS and share >= run.next_check
                    if is_due or share >= 1:
                        run.check(student, teacher, checked)
                        share_after = run.share(config)
                        run.next_check = share + (share_after - share) / SHARE_FOR_CHECKS
                        share = share_after
                    if share >= 1:
                        break
                    warm = min(1.0, (run.step + 1) / WARM_UP)
                    cosine = max(LEAST_RATE, math.cos(math.pi / 2 * share))
                    for group in optimizer.param_groups:
                        group["lr"] = config.learning_rate * warm * cosine
                    with _precision(model):
                        losses = compute_losses(student, teacher, next(draws))
                        loss = torch.stack(losses).mean()
                    if not math.isfinite(float(loss.detach())):
                        raise ConfigError(
                            f"the loss became {float(loss.detach())} at a learning rate of up to "
                            f"{config.learning_rate:.3g}; give a lower --learning-rate"
                        )
                    loss.backward()  # type: ignore[no-untyped-call]
                    clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    run.count_step(float(loss.detach()))
            run.use_best()
        except BaseException:
            student.unload()
            raise
        student.merge_and_unload(safe_merge=True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return {
            "before": run.curve[0]["check"],
            "after": min(point["check"] for point in run.curve),
            "draws": run.step * config.batch_size,
            "minutes": round(run.seconds / 60, 2),
            "curve": run.curve,
        }


class _Run:
    """How far a training is, and what it resumes from after an interruption."""

    def __init__(
        self, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, file: Path
    ) -> None:
        self.named = named
        self.optimizer = optimizer
        self.file = file
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.next_check = 0.0  # the share of the training before which there is no check
        self.best = {name: each.detach().clone() for name, each in named.items()}
        self.loss = math.nan  # a running mean
        self._last_time = time.monotonic()
        self._last_save = time.monotonic()

    def share(self, config: LearnConfig) -> float:
        """Return the share of the training that is done, by time or by steps."""
        now = time.monotonic()
        self.seconds += now - self._last_time
        self._last_time = now
        if config.steps is not None:
            return self.step / config.steps
        return self.seconds / 60 / config.minutes

    def count_step(self, loss: float) -> None:
        """Count a step, and keep the state from time to time."""
        self.step += 1
        self.loss = loss if self.step == 1 else 0.95 * self.loss + 0.05 * loss
        if time.monotonic() - self._last_save > SAVE_SECONDS:
            self.save()

    def describe(self) -> str:
        """Describe the last step and the last check."""
        if not self.curve:
            return ""
        checked = self.curve[-1]["check"]
        return f"step {self.step}, loss {self.loss:.3f}, on the check part {checked:.3f}"

    @torch.no_grad()
    def check(self, student: Any, teacher: Any, checked: Sequence[Item]) -> None:
        """Measure the loss on the check part, and keep the weights if they are the best."""
        loss = measure_loss(student, teacher, checked)
        if all(loss < point["check"] for point in self.curve):
            self.best = {name: each.detach().clone() for name, each in self.named.items()}
        point = {"step": self.step, "check": loss, "seconds": round(self.seconds, 1)}
        self.curve.append(point)

    @torch.no_grad()
    def use_best(self) -> None:
        """Go back to the weights of the best check."""
        for name, parameter in self.named.items():
            parameter.copy_(self.best[name])

    def save(self) -> None:
        """Write the weights, the best ones and the optimiser's state."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[f"{name}|weight"] = parameter.detach()
            tensors[f"{name}|best"] = self.best[name]
            for part, tensor in self.optimizer.state[parameter].items():
                tensors[f"{name}|{part}"] = tensor
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "next_check": self.next_check,
            "loss": self.loss,
        }
        write_atomically(self.file, save(tensors, {"state": json.dumps(state)}))
        self._last_save = time.monotonic()

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the state that was written, if there is one."""
        if not self.file.exists():
            return
        with safe_open(self.file, "pt") as file:
            state = json.loads(file.metadata()["state"])
            self.step = state["step"]
            self.seconds = state["seconds"]
            self.curve = state["curve"]
            self.next_check = state["next_check"]
            self.loss = state["loss"]
            for name, parameter in self.named.items():
                parameter.copy_(file.get_tensor(f"{name}|weight"))
                self.best[name].copy_(file.get_tensor(f"{name}|best"))
                for part in ("step", "exp_avg", "exp_avg_sq"):
                    value = file.get_tensor(f"{name}|{part}")
                    if part != "step":  # which stays on the CPU
                        value = value.to(parameter.device)
                    self.optimizer.state[parameter][part] = value


def _draw(items: Sequence[Item], size: int, seed: int) -> Iterator[list[Item]]:
    """Yield batches of questions, each with one text if there are texts beside questions.

    Each item comes once before any comes again.
    """
    random = Random(seed)
    questions = [item for item in items if not item.is_text]
    texts = [item for item in items if item.is_text]
    if not questions:
        questions, texts = texts, []
    pool: list[Item] = []
    text_pool: list[Item] = []
    while True:
        while len(pool) < size:
            pool += random.sample(questions, len(questions))
        batch, pool = pool[:size], pool[size:]
        if texts:
            text_pool = text_pool or random.sample(texts, len(texts))
            batch.append(text_pool.pop())
        yield batch


@torch.no_grad()
def measure_loss(model: Any, teacher: Any, items: Sequence[Item]) -> float:
    """Return the mean loss of a model on questions, plus that on texts."""
    ordered = sorted(items, key=lambda item: item.num_tokens)
    losses: dict[bool, list[float]] = {}
    for start in range(0, len(ordered), CHECKED_AT_ONCE):
        batch = ordered[start : start + CHECKED_AT_ONCE]
        with _precision(model):
            for item, loss in zip(batch, compute_losses(model, teacher, batch), strict=True):
                losses.setdefault(item.is_text, []).append(float(loss))
    return sum(map(fmean, losses.values()))


def _low_precision(model: Any) -> torch.dtype | None:
    """Return a dtype in which a float32 model computes faster on its device; None if none does."""
    if model.dtype != torch.float32:
        return None
    if model.device.type == "cpu":
        # bfloat16 is slower on a CPU without instructions for it. Older versions of torch don't
        # say whether the CPU has them.
        has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        is_faster = has_instructions is not None and has_instructions()
    else:
        is_faster = resolve_dtype("auto", model.device) == torch.bfloat16
    return torch.bfloat16 if is_faster else None


def _precision(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which a model computes in 16 bits, if that is faster."""
    dtype = _low_precision(model)
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


@contextmanager
def _quick_weights(model: Any) -> Iterator[None]:
    """Keep the frozen weights of linear maps in 16 bits inside the block, if that is faster.

    Otherwise autocast would cast them anew in each pass. The results are the same, bit for bit.
    """
    dtype = _low_precision(model)
    with ExitStack() as stack:
        for module in model.modules():
            if dtype is not None and isinstance(module, nn.Linear):
                weight = module.weight
                if not weight.requires_grad and weight.dtype == torch.float32:
                    stack.callback(setattr, module, "weight", weight)
                    module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        yield


@contextmanager
def _checkpointed(student: Any, items: Sequence[Item], batch_size: int) -> Iterator[None]:
    """Compute activations again in the backward pass inside the block, where memory is short."""
    config = student.config.get_text_config()
    layers = find_layers(student)[1]
    longest = batch_size * max(item.num_tokens for item in items)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    num_bytes = 4 * longest * len(layers) * (16 * config.hidden_size + 4 * inner)
    if num_bytes < SHARE_FOR_ACTIVATIONS * free_bytes(student.device):
        yield
        return
    student.enable_input_require_grads()
    student.gradient_checkpointing_enable()
    for layer in layers:
        layer.training = True  # of the layer alone: dropout stays off
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        student.gradient_checkpointing_disable()
        student.disable_input_require_grads()
