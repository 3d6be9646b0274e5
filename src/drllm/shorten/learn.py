"""Teach a shortened model the right answers, by LoRA on its layers.

The loss is in `learning`. A *check* measures the loss of the right answers on the check part of the
questions, ten times in a training; the best check's weights stay, if they are better than those
before the training. LoRA is plain PEFT, and is merged into new tensors at the end.

Source: ours; LoRA is arXiv 2106.09685.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from drllm.shorten.learning import Item, compute_losses
from drllm.work.listener import Listener

BATCH = 4  # questions a step
WARM_UP = 20  # steps in which the learning rate rises
LEARNING_RATE = 5e-4
LEAST_RATE = 0.02  # of the learning rate, at the end of the cosine
CHECKS = 5
PATIENCE = 9  # the training ends after so many checks in a row without a lower loss
EARLIEST_STOP = 0.5  # but not before this share of it, while the learning rate is high
MAX_CHECKED = 400  # questions that a check measures


def train(
    model: Any,
    teacher: Any,
    items: Sequence[Item],
    checked: Sequence[Item],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    rank: int = 16,
    seed: int = 0,
    form: str = "options",
    kl_weight: float = 0.5,
    all_weights: bool = False,
    learning_rate: float = LEARNING_RATE,
    texts: Sequence[Item] = (),
    text_share: float = 0.25,
    listener: Listener | None = None,
) -> list[dict[str, float]]:
    """Train a model in place; return the curve of checks."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    originals = {}
    if all_weights:
        for name, module in model.named_modules():
            if ".layers." in name and isinstance(module, nn.Linear):
                originals[name] = module.weight
                module.weight = nn.Parameter(module.weight.detach().clone())
        student = model
    else:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        student = get_peft_model(model, config)
    parameters = [each for each in student.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    random = Random(seed)
    checked = Random(seed).sample(list(checked), min(len(checked), MAX_CHECKED))
    curve: list[dict[str, float]] = []
    best = [parameter.detach().clone() for parameter in parameters]
    started = time.monotonic()
    step = 0
    pool: list[Item] = []
    text_pool: list[Item] = []
    mean = 0.0
    while True:
        share = 0.0
        if steps is not None:
            share = step / steps
        if minutes is not None:
            share = max(share, (time.monotonic() - started) / 60 / minutes)
        if share >= len(curve) / CHECKS or share >= 1:
            loss = check(student, checked, form)
            if all(loss < point["loss"] for point in curve):
                best = [parameter.detach().clone() for parameter in parameters]
            curve.append(
                {"step": step, "loss": loss, "train": mean, "seconds": time.monotonic() - started}
            )
            print(curve[-1], flush=True)
            losses = [point["loss"] for point in curve]
            if share >= 1 or (
                share >= EARLIEST_STOP and len(losses) - 1 - losses.index(min(losses)) >= PATIENCE
            ):
                break
        rate = (
            learning_rate
            * min(1, (step + 1) / WARM_UP)
            * max(LEAST_RATE, math.cos(math.pi / 2 * min(share, 1)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(pool) < BATCH:
            pool += random.sample(list(items), len(items))
        batch, pool = pool[:BATCH], pool[BATCH:]
        if texts:
            if not text_pool:
                text_pool = random.sample(list(texts), len(texts))
            if random.random() < text_share * BATCH:
                batch.append(text_pool.pop())
        with precision(model):
            loss, kl = compute_losses(student, teacher, batch, form=form, kl_weight=kl_weight)
        (loss + kl_weight * kl).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        value = float(loss.detach())
        mean = value if step == 1 else 0.98 * mean + 0.02 * value
    with torch.no_grad():
        for parameter, values in zip(parameters, best, strict=True):
            parameter.copy_(values)
    if not all_weights:
        student.merge_and_unload(safe_merge=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return curve


def precision(model: Any) -> Any:
    import os

    if os.environ.get("DRLLM_BF16"):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def check(student: Any, checked: Sequence[Item], form: str) -> float:
    total = 0.0
    for start in range(0, len(checked), 8):
        batch = checked[start : start + 8]
        with precision(student):
            loss, _ = compute_losses(student, None, batch, form=form, kl_weight=0)
        total += float(loss) * len(batch)
    return total / len(checked)
