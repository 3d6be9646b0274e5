"""The training of the paper, to the letter: the base model runs in the loop, example by example.

It knows models that are laid out like Llama's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drllm.config import TrainConfig
from drllm.models.routers.stack import RouterStack
from drllm.records.supervision import SupervisionRecord
from drllm.training.features import Features
from drllm.training.trainer import shuffle_batches


class Walk:
    """The base model, layer by layer, on one prompt."""

    def __init__(self, model: Any, tokenizer: Any, prompt: str) -> None:
        device = model.device
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        num_tokens = ids.shape[1]
        self.layers = model.model.layers
        self.hidden = model.model.embed_tokens(ids)  # [1, T, D]
        self.positions = model.model.rotary_emb(
            self.hidden, torch.arange(num_tokens, device=device)[None]
        )
        size = (num_tokens, num_tokens)
        mask = torch.full(size, -math.inf, dtype=self.hidden.dtype, device=device)
        self.mask = mask.triu(1)[None, None]

    @torch.no_grad()
    def run(self, layer: int, times: int) -> None:
        """Execute a layer as often as its decision says."""
        for _ in range(times):
            output = self.layers[layer](
                self.hidden, attention_mask=self.mask, position_embeddings=self.positions
            )
            self.hidden = output[0] if isinstance(output, tuple) else output


def window_means(hidden: Tensor, num_windows: int) -> Tensor:
    """Return the means over at most so many windows of `[T, D]`, `[W, D]`."""
    num_tokens = len(hidden)
    num_windows = min(num_tokens, num_windows)
    edges = [window * num_tokens // num_windows for window in range(num_windows + 1)]
    return torch.stack([hidden[start:end].mean(dim=0) for start, end in itertools.pairwise(edges)])


class Router(nn.Module):
    """One layer's router, as the paper draws it; begins with the weights that ours begin with."""

    def __init__(self, stack: RouterStack, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = stack.config
        self.num_windows = config.num_windows
        self.inner = nn.Linear(config.hidden_size, config.router_width)
        self.outer = nn.Linear(config.router_width, 3)
        for mine, theirs in zip(self.parameters(), stack.parameters(), strict=True):
            mine.data.copy_(theirs[layer].data)
        self.to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Read `[T, D]`, return logits `[3]`."""
        inner = self.inner(window_means(hidden, self.num_windows))
        logits: Tensor = self.outer(nn.functional.gelu(inner, approximate="tanh"))
        return logits.mean(dim=0)


class Literal:
    """The training of the paper, for one run.

    Args:
        model: The frozen base model.
        tokenizer: Its tokenizer.
        stack: The routers to begin with.
        records: The targets.
        config: The paper's settings; of ours nothing is turned on.
        trained: Which targets are learned from.
        held_out: Which are only measured.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stack: RouterStack,
        records: Sequence[SupervisionRecord],
        config: TrainConfig,
        trained: Sequence[int],
        held_out: Sequence[int],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.records = records
        self.config = config
        self.trained = trained
        self.held_out = held_out
        num_layers = stack.config.num_layers
        self.routers = nn.ModuleList(Router(stack, i, model.dtype) for i in range(num_layers))
        labels = [label for row in trained for label in records[row].optimal_layer_config]
        self.class_weights = effective_number_weights(labels, config.beta)
        num_batches = math.ceil(len(trained) / config.gradient_accumulation)
        self.num_steps = config.num_epochs * num_batches

    def loss(self, row: int) -> Tensor:
        """Run the base model along the row's target path, its routers reading along."""
        target = self.records[row].optimal_layer_config
        walk = Walk(self.model, self.tokenizer, self.records[row].prompt)
        loss = torch.zeros((), dtype=self.model.dtype)
        for layer, (router, label) in enumerate(zip(self.routers, target, strict=True)):
            log_p = router(walk.hidden[0]).log_softmax(dim=-1)[label]
            focus = (1 - log_p.exp()) ** self.config.gamma
            loss = loss - self.class_weights[label] * focus * log_p / len(target)
            walk.run(layer, label)
        return loss

    def train(self) -> Iterator[tuple[float, float | None]]:
        """Yield the losses of each epoch: of the examples trained on, and of those held out."""
        config = self.config
        optimizer = self.make_optimizer()
        step = 0
        for epoch in range(1, config.num_epochs + 1):
            total = 0.0
            batches = shuffle_batches(
                self.trained, config.gradient_accumulation, config.seed, epoch
            )
            for rows in batches:
                total += self.train_step(optimizer, rows, step)
                step += 1
            yield total / len(self.trained), self.held_out_loss()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over all routers, with weight decay of the weights alone."""
        named = list(self.routers.named_parameters())
        weights = [parameter for name, parameter in named if name.endswith("weight")]
        biases = [parameter for name, parameter in named if name.endswith("bias")]
        return torch.optim.AdamW(
            [
                {"params": weights, "weight_decay": self.config.weight_decay},
                {"params": biases, "weight_decay": 0.0},
            ]
        )

    def train_step(self, optimizer: torch.optim.Optimizer, rows: Sequence[int], step: int) -> float:
        """Learn from a step's examples, one by one; return the sum of their losses."""
        config = self.config
        total = 0.0
        optimizer.zero_grad()
        for row in rows:
            loss = self.loss(row)
            total += float(loss.detach())
            if config.loss_reduction != "sum":
                loss = loss / len(rows)
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.routers.parameters(), config.max_grad_norm)
        optimizer.step()
        return total

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Return the mean loss of the held-out examples; None without any."""
        if not self.held_out:
            return None
        return sum(float(self.loss(row)) for row in self.held_out) / len(self.held_out)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then half a cosine."""
        warmup = self.config.warmup_steps
        peak = self.config.learning_rate
        if warmup >= self.num_steps:
            warmup = 0.1  # D-14
        if warmup < 1:
            warmup = int(warmup * self.num_steps)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / (self.num_steps - warmup)
        return peak * (1 + math.cos(math.pi * progress)) / 2


def effective_number_weights(labels: Sequence[int], beta: float) -> list[float]:
    """Return a weight for each decision, by the effective number of its labels.

    The weights of the decisions that there are labels of are 1 on average; others have none.
    """
    numbers = []
    for decision in range(3):
        count = labels.count(decision)
        numbers.append(sum(beta**power for power in range(count)))
    inverses = [1 / number if number else 0.0 for number in numbers]
    num_there = sum(number > 0 for number in numbers)
    return [inverse * num_there / sum(inverses) for inverse in inverses]


def read_along(
    model: Any, tokenizer: Any, records: Sequence[SupervisionRecord], num_windows: int
) -> Features:
    """Pool what the routers of this loop read along the target paths, in the model's dtype."""
    size = (len(records), len(model.model.layers), num_windows, model.config.hidden_size)
    means = torch.zeros(size, dtype=model.dtype)
    filled = []
    for row, record in enumerate(records):
        walk = Walk(model, tokenizer, record.prompt)
        for layer, label in enumerate(record.optimal_layer_config):
            read = window_means(walk.hidden[0], num_windows)
            means[row, layer, : len(read)] = read
            walk.run(layer, label)
        filled.append(len(read))
    return Features(
        means=means,
        filled=torch.tensor(filled),
        labels=torch.tensor([record.optimal_layer_config for record in records]),
        questions=tuple(record.question for record in records),
        tasks=tuple(record.task for record in records),
    )
