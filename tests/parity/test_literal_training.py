"""Training as the paper describes it, taken literally, against ours.

Literally: in every epoch the base model runs along each example's target path, one example at a
time; before each layer its router reads the hidden states, and gradients accumulate over the
examples of a step. Nothing is stored, batched or stacked. Ours runs the base model once.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drllm.config import TrainConfig
from drllm.models.routed import RoutedModel
from drllm.models.routers import RouterStack
from drllm.records import SupervisionRecord
from drllm.training.features import Features, collect
from drllm.training.fit import Fit
from drllm.training.loop import train
from drllm.training.plans import Plan, new_stack
from drllm.training.split import epoch_batches, hold_out

L, W, D, H = 5, 4, 32, 16

IN_DOUBLE = 1e-8
"""float64, weights of size about 0.3, after all epochs; less than 1e-13 was measured."""
IN_SINGLE = 1e-5
"""float32, relative, of the loss of an epoch; less than 5e-7 was measured."""

CONFIG = TrainConfig(
    num_epochs=5,
    gradient_accumulation=4,
    num_windows=W,
    router_width=H,
    warmup_steps=6,
    learning_rate=0.01,
    weight_decay=0.1,
    validation_fraction=0.3,
)


def records() -> list[SupervisionRecord]:
    """Prompts from 1 to 23 tokens, with skips, repeats and whole paths."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(24):
        share = torch.tensor([0.25, 0.6, 0.15])
        decisions = torch.multinomial(share, L, replacement=True, generator=generator)
        decisions[-1] = max(1, int(decisions[-1]))
        prompt = "".join(chr(97 + (number * 7 + place * place) % 26) for place in range(number + 1))
        found.append(
            SupervisionRecord(
                question=f"What is {prompt}?",
                optimal_layer_config=tuple(decisions.tolist()),
                answer="yes",
                prompt=prompt[:23],
                id=f"q{number}",
                task="own",
                executions=float(decisions.sum()),
                improving=False,
            )
        )
    return found


RECORDS = records()
FRESH = [f"{first} {second}" for first in ("why", "where to", "h") for second in ("go", "is it?")]


# --- the literal way ---------------------------------------------------------------------------


class Walk:
    """The base model, layer by layer, on one prompt."""

    def __init__(self, model: Any, tokenizer: Any, prompt: str) -> None:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        tokens = ids.shape[1]
        self.layers = model.model.layers
        self.hidden = model.model.embed_tokens(ids)  # [1, T, D]
        self.positions = model.model.rotary_emb(self.hidden, torch.arange(tokens)[None])
        mask = torch.full((tokens, tokens), -math.inf, dtype=self.hidden.dtype)
        self.mask = mask.triu(1)[None, None]

    def run(self, layer: int, times: int) -> None:
        for _ in range(times):
            output = self.layers[layer](
                self.hidden, attention_mask=self.mask, position_embeddings=self.positions
            )
            self.hidden = output[0] if isinstance(output, tuple) else output


def windows(hidden: Tensor) -> list[Tensor]:
    """Means over the windows of `[T, D]`, in a loop."""
    number = min(len(hidden), W)
    edges = [window * len(hidden) // number for window in range(number + 1)]
    return [
        sum(hidden[token] for token in range(start, end)) / (end - start)
        for start, end in itertools.pairwise(edges)
    ]


class Router(nn.Module):
    """One layer's, as the paper draws it; begins with the weights that ours begin with."""

    def __init__(self, stack: RouterStack, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, H), nn.Linear(H, 3)
        for mine, theirs in zip(self.parameters(), stack.parameters(), strict=True):
            mine.data.copy_(theirs[layer].data)
        self.to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = [
            self.outer(nn.functional.gelu(self.inner(window), approximate="tanh"))
            for window in windows(hidden)
        ]
        return sum(logits) / len(logits)


def rate_of(step: int, steps: int) -> float:
    if step < CONFIG.warmup_steps:
        return CONFIG.learning_rate * (step + 1) / (CONFIG.warmup_steps + 1)
    share = (step - CONFIG.warmup_steps) / (steps - CONFIG.warmup_steps)
    return CONFIG.learning_rate * (1 + math.cos(math.pi * share)) / 2


class Literal:
    """The training of the paper, for one run."""

    def __init__(self, model: Any, tokenizer: Any, stack: RouterStack) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.routers = nn.ModuleList(Router(stack, layer, model.dtype) for layer in range(L))
        questions = [record.question for record in RECORDS]
        self.trained, self.held_out = hold_out(questions, CONFIG.validation_fraction, CONFIG.seed)
        labels = [label for row in self.trained for label in RECORDS[row].optimal_layer_config]
        numbers = [sum(CONFIG.beta**power for power in range(labels.count(c))) for c in range(3)]
        self.class_weights = [3 / n / sum(1 / each for each in numbers) for n in numbers]

    def loss(self, row: int) -> Tensor:
        """Run the base model along the row's target path, its routers reading along."""
        target = RECORDS[row].optimal_layer_config
        walk = Walk(self.model, self.tokenizer, RECORDS[row].prompt)
        loss = torch.zeros((), dtype=self.model.dtype)
        for layer, (router, label) in enumerate(zip(self.routers, target, strict=True)):
            p = router(walk.hidden[0]).softmax(dim=-1)[label]
            loss = loss - self.class_weights[label] * (1 - p) ** CONFIG.gamma * p.log() / L
            walk.run(layer, label)
        return loss

    def train(self) -> Iterator[tuple[float, float]]:
        """Yield the losses of each epoch: of the examples trained on, and of those held out."""
        named = list(self.routers.named_parameters())
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [weight for name, weight in named if name.endswith("weight")],
                    "weight_decay": CONFIG.weight_decay,
                },
                {
                    "params": [weight for name, weight in named if name.endswith("bias")],
                    "weight_decay": 0.0,
                },
            ]
        )
        size = CONFIG.gradient_accumulation
        steps, step = CONFIG.num_epochs * math.ceil(len(self.trained) / size), 0
        for epoch in range(1, CONFIG.num_epochs + 1):
            total = 0.0
            for rows in epoch_batches(self.trained, size, CONFIG.seed, epoch):
                optimizer.zero_grad()
                for row in rows:
                    loss = self.loss(row)
                    (loss / len(rows)).backward()
                    total += float(loss.detach())
                for group in optimizer.param_groups:
                    group["lr"] = rate_of(step, steps)
                optimizer.step()
                step += 1
            with torch.no_grad():
                held_out = sum(float(self.loss(row)) for row in self.held_out)
            yield total / len(self.trained), held_out / len(self.held_out)

    @torch.no_grad()
    def route(self, prompt: str) -> list[int]:
        """Let the routers decide, each on what the decisions before it have left."""
        walk = Walk(self.model, self.tokenizer, prompt)
        route: list[int] = []
        for layer, router in enumerate(self.routers):
            decision = int(router(walk.hidden[0]).argmax())
            if layer == L - 1 and not any(route):
                decision = max(decision, 1)  # D-10
            walk.run(layer, decision)
            route.append(decision)
        return route


# --- ours --------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    return tiny_llama(num_layers=L, hidden_size=D, initializer_range=0.2)


IDENTITY = {
    "id": "tiny",
    "revision": None,
    "class": "LlamaForCausalLM",
    "num_layers": L,
    "hidden_size": D,
    "fingerprint": "",
}


def double_features(model: Any, tokenizer: Any) -> Features:
    """What each router reads along the target paths, pooled once in float64."""
    means = torch.zeros(len(RECORDS), L, W, D, dtype=torch.float64)
    filled = []
    for row, record in enumerate(RECORDS):
        walk = Walk(model, tokenizer, record.prompt)
        for layer, label in enumerate(record.optimal_layer_config):
            pooled = windows(walk.hidden[0])
            means[row, layer, : len(pooled)] = torch.stack(pooled)
            walk.run(layer, label)
        filled.append(len(pooled))
    return Features(
        means=means,
        filled=torch.tensor(filled),
        labels=torch.tensor([record.optimal_layer_config for record in RECORDS]),
        questions=tuple(record.question for record in RECORDS),
        tasks=tuple(record.task for record in RECORDS),
    )


def losses(rows: Sequence[dict[str, Any]], split: str) -> list[float]:
    return [row["routers_loss"] for row in rows if row["split"] == split]


def test_in_double_precision_the_weights_are_those_of_the_literal_way(
    model: Any, tiny_tokenizer: Any
) -> None:
    model = model.double()
    features = double_features(model, tiny_tokenizer)
    plan = Plan.of(features, CONFIG)
    fit = Fit(features, IDENTITY, [plan], dtype=torch.float64)
    literal = Literal(model, tiny_tokenizer, new_stack(features, plan, IDENTITY))
    for trained, held_out in literal.train():
        fit.epoch()
        assert fit.rows[0][-2]["routers_loss"] == pytest.approx(trained, rel=1e-10)
        assert fit.rows[0][-1]["routers_loss"] == pytest.approx(held_out, rel=1e-10)
    weights = fit.kept[0]
    for layer, router in enumerate(literal.routers):
        for name, expected in (
            ("hidden_weight", router.inner.weight.T),
            ("hidden_bias", router.inner.bias),
            ("decision_weight", router.outer.weight.T),
            ("decision_bias", router.outer.bias),
        ):
            torch.testing.assert_close(weights[name][layer], expected.data, rtol=0, atol=IN_DOUBLE)


def test_in_single_precision_losses_and_decisions_are_those_of_the_literal_way(
    model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    routed = RoutedModel(model)
    features = collect(routed, tiny_tokenizer, RECORDS, num_windows=W, batch_size=5)
    routed.detach()
    rows = train(features, IDENTITY, CONFIG, tmp_path)

    plan = Plan.of(features, CONFIG)
    literal = Literal(model, tiny_tokenizer, new_stack(features, plan, IDENTITY))
    expected = list(literal.train())
    assert losses(rows, "train") == pytest.approx([pair[0] for pair in expected], rel=IN_SINGLE)
    assert losses(rows, "validation") == pytest.approx(
        [pair[1] for pair in expected], rel=IN_SINGLE
    )

    prompts = [RECORDS[row].prompt for row in literal.held_out] + FRESH
    routes = [literal.route(prompt) for prompt in prompts]
    assert len({tuple(route) for route in routes}) > 3  # routers that say one thing show nothing
    routed = RoutedModel(model, RouterStack.load(tmp_path))
    for prompt, route in zip(prompts, routes, strict=True):
        ids = tiny_tokenizer(prompt, return_tensors="pt")
        routed.model(input_ids=ids["input_ids"])
        assert routed.last_route.tolist() == [route]
    routed.detach()
