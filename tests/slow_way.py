"""The slow, obvious way of running a path, which everything fast is compared with.

And what such tests are made of: routers that decide, paths, and how scores are compared.
"""

import copy
import importlib.metadata
import itertools
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drllm.model.identity import fingerprint
from drllm.model.prompts import pad_left
from drllm.models.check import make_tiny
from drllm.models.families import NO_SUBLAYERS
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.kv_cache import RoutedCacheLayer
from drllm.models.routing.policies import Policy
from drllm.models.scoring.score import Request
from drllm.paths import Gap, get_layers, to_path

LOGIT_TOLERANCE = 2e-5
"""Greatest difference of fp32 logits (standard deviation about 1.4) that batched arithmetic made
on these models: 6e-6 was measured, rounded up for other processors."""
SUM_TOLERANCE = 1e-4
"""Nats that a summed log-probability may differ from the path run alone (design figure; 5e-6 was
measured on these models)."""
LOGPROB_TOLERANCE = 1e-4
"""Nats that a continuation may differ from the harness' own number (design figure)."""
TORCH = tuple(map(int, importlib.metadata.version("torch").split(".")[:2]))
needs_tracing = pytest.mark.skipif(
    TORCH < (2, 9), reason="torch before 2.9 can't trace overrides of forward (shown on 2.4)"
)
FULL = (1,) * 6
QUESTIONS = [
    Request([5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]),
    Request([20, 21], [[30, 31, 32, 33], [34], [35], [36, 37]]),
    Request([40, 41, 42, 43, 44, 45, 46], [[50, 51], [52, 53]]),
]
"""Prompts of unequal length whose continuations are scored."""
NOT_TOLD_APART = {
    family: reason.removeprefix("a layer ")
    for reason, families in NO_SUBLAYERS.items()
    for family in families
}
"""Families in whose layers attention and MLP can't be told apart → why."""
FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers raises where the untouched model can't do something either."""


def biased_model(family: str, too_old: Mapping[str, tuple[str, ...]], **overrides: Any) -> Any:
    """Return a tiny model with biases that aren't zero, as after any training.

    The test is skipped where the installed transformers doesn't have the family, or is one of the
    versions (their beginnings) in which it can't be used. `overrides` are settings of its config.
    """
    if family not in CONFIG_MAPPING:
        pytest.skip(f"not in this transformers: {family}")
    if transformers.__version__.startswith(too_old.get(family, ())):
        pytest.skip(f"not routed, or not exported, in this transformers: {family}")
    model = make_tiny(family, **overrides)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


class ListedModel:
    """A plain copy of a model whose layer list *is* the path; one unpadded row, no cache.

    The weights are shared, not copied. What the configuration says layer by layer is put into the
    order of the path too.

    Args:
        model: A model that isn't routed; it stays as it is.
        decisions: `[L]`.
        path: Layers in any order, instead of decisions.
        cached: Give each listed layer a copy of its own and number them anew, so that the model
            can be run with a cache too: one entry a listed layer.
    """

    def __init__(
        self,
        model: Any,
        decisions: Sequence[int] | None = None,
        *,
        path: Sequence[int] = (),
        cached: bool = False,
    ) -> None:
        path = list(path if decisions is None else to_path(decisions))
        weights = {id(weight): weight for weight in model.parameters()}
        self.model = copy.deepcopy(model, dict(weights))
        stack, name = largest_list(self.model)
        layers = getattr(stack, name)
        assert decisions is None or len(layers) == len(decisions)
        listed = []
        for index in path:
            layer = layers[index]
            if cached:
                layer = copy.deepcopy(layer, dict(weights))
            listed.append(layer)
        if cached:
            number_layers(listed)
        setattr(stack, name, nn.ModuleList(listed))
        config = self.model.config
        assert config is stack.config
        for key, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == len(layers):
                setattr(config, key, [value[index] for index in path])
        config.num_hidden_layers = len(path)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits of every position, `[T, V]`."""
        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def each(self, context: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of each token behind a context, in an unpadded row."""
        logprobs = self.logits([*context, *tokens]).log_softmax(-1)[len(context) - 1 :]
        return [float(logprobs[place, token]) for place, token in enumerate(tokens)]

    def sums(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Return each continuation's log-probability, in a row of its own without padding."""
        return [sum(self.each(context, tokens)) for tokens in continuations]

    def greedy(self, tokens: Sequence[int], num_new: int, never: int | None = None) -> list[int]:
        """Return the next tokens, each from a full recomputation of everything before it.

        Args:
            tokens: The prompt.
            num_new: How many.
            never: A token that isn't said, as `min_new_tokens` keeps `generate` from ending early.
        """
        row = list(tokens)
        for _ in range(num_new):
            logits = self.logits(row)[-1]
            if never is not None:
                logits[never] = -torch.inf
            row.append(int(logits.argmax()))
        return row[len(tokens) :]


class MappedModel(ListedModel):
    """A plain model whose layer list is the path, with a hook in front of each gap.

    Args:
        model: As for `ListedModel`.
        plan: Decisions, or a static path.
        maps: Has `cross_alone(gap, states)`, which maps the states `[T, D]` of one whole text.
    """

    def __init__(self, model: Any, plan: Any, maps: Any) -> None:
        path = get_layers(plan)
        super().__init__(model, path=path, cached=True)
        stack, name = largest_list(self.model)
        listed = getattr(stack, name)
        num_layers = len(getattr(*largest_list(model)))
        if path[0] > 0:
            first = Gap(-1, path[0])

            def before(_module: Any, args: Any) -> Any:
                return (maps.cross_alone(first, args[0][0])[None], *args[1:])

            listed[0].register_forward_pre_hook(before)
        for module, layer, next_layer in zip(listed, path, (*path[1:], num_layers), strict=True):
            if next_layer > layer + 1:
                module.register_forward_hook(self._make_hook(maps, Gap(layer, next_layer)))

    @staticmethod
    def _make_hook(maps: Any, gap: Gap) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            states = output[0] if is_tuple else output
            mapped = maps.cross_alone(gap, states[0])[None]
            return (mapped, *output[1:]) if is_tuple else mapped

        return hook


class LayerWalk:
    """A plain Llama, run layer by layer on one unpadded prompt.

    Attributes:
        hidden: What the next layer reads, `[1, T, D]`.
    """

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        num_tokens = len(prompt)
        self.layers = model.model.layers
        self.hidden = model.model.embed_tokens(torch.tensor([list(prompt)]))
        self.positions = model.model.rotary_emb(self.hidden, torch.arange(num_tokens)[None])
        mask = torch.full((num_tokens, num_tokens), -torch.inf, dtype=self.hidden.dtype)
        self.mask = mask.triu(1)[None, None]

    @torch.no_grad()
    def run(self, layer: int, times: int) -> None:
        """Execute a layer as often as its decision says."""
        for _ in range(times):
            output = self.layers[layer](
                self.hidden, attention_mask=self.mask, position_embeddings=self.positions
            )
            self.hidden = output[0] if isinstance(output, tuple) else output


def inputs_alone(model: Any, prompt: Sequence[int], decisions: Sequence[int]) -> list[Tensor]:
    """Return what each layer reads, `[T, D]`, after the executions of the layers before it."""
    walk = LayerWalk(model, prompt)
    inputs = []
    for layer, times in enumerate(decisions):
        inputs.append(walk.hidden[0])
        walk.run(layer, times)
    return inputs


def window_means(tokens: Sequence[Tensor], num_windows: int) -> list[Tensor]:
    """Return the means of `[D]` over at most so many windows of tokens, added up one by one."""
    num_filled = min(len(tokens), num_windows)
    edges = [window * len(tokens) // num_filled for window in range(num_filled + 1)]
    means = []
    for start, end in itertools.pairwise(edges):
        total = torch.zeros_like(tokens[0], dtype=torch.float64)
        for token in tokens[start:end]:
            total = total + token.double()
        means.append((total / (end - start)).float())
    return means


def router_logits(stack: RouterStack, layer: int, windows: Sequence[Tensor]) -> Tensor:
    """Run one router as the paper draws it: logits for each window, then their mean."""
    logits = []
    with torch.no_grad():
        for mean in windows:
            inner = stack.hidden_weight[layer] @ mean + stack.hidden_bias[layer]
            inner = nn.functional.gelu(inner, approximate="tanh")
            logits.append(stack.decision_weight[layer] @ inner + stack.decision_bias[layer])
    return torch.stack(logits).mean(dim=0)


def route_alone(model: Any, stack: RouterStack, prompt: Sequence[int]) -> list[int]:
    """Route one prompt layer by layer, each router on what the decisions before it have left."""
    walk = LayerWalk(model, prompt)
    num_layers = stack.config.num_layers
    route: list[int] = []
    for layer in range(num_layers):
        windows = window_means(list(walk.hidden[0]), stack.config.num_windows)
        decision = int(router_logits(stack, layer, windows).argmax())
        if layer == num_layers - 1 and not any(route):
            decision = max(decision, 1)  # D-10: an empty path is no model
        walk.run(layer, decision)
        route.append(decision)
    return route


def largest_list(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the parent and the name of a model's largest list of modules: that of the layers."""
    largest = 0
    place: tuple[nn.Module, str] | None = None
    for parent in model.modules():
        for name, child in parent.named_children():
            size = sum(weight.numel() for weight in child.parameters())
            if isinstance(child, nn.ModuleList) and size > largest:
                largest = size
                place = (parent, name)
    assert place is not None
    return place


def number_layers(layers: Sequence[nn.Module]) -> None:
    """Give each layer its own entry of a cache."""
    for place, layer in enumerate(layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place


def sums_alone(model: Any, questions: Sequence[Any], pairs: Sequence[Any]) -> list[list[float]]:
    """Score (question, decisions) pairs one by one, each continuation in a row of its own."""
    return [
        ListedModel(model, decisions).sums(questions[row].context, questions[row].continuations)
        for row, decisions in pairs
    ]


def greedy_alone(
    model: Any, contexts: Sequence[Any], pairs: Sequence[Any], num_new: int
) -> list[list[int]]:
    """Generate for (question, decisions) pairs one by one, each token by a full recomputation."""
    return [ListedModel(model, path).greedy(contexts[row], num_new) for row, path in pairs]


def gold_logprob_alone(
    model: Any, path: Sequence[int], questions: Sequence[Any], golds: Sequence[int]
) -> float:
    """Return a path's mean log-probability of the gold options among all, option by option."""
    plain = ListedModel(model, path=path)
    total = 0.0
    for question, gold in zip(questions, golds, strict=True):
        sums = torch.tensor(plain.sums(question.context, question.continuations))
        total += float(sums.log_softmax(0)[gold])
    return total / len(questions)


def confidences_alone(model: Any, prompt: Sequence[int], num_layers: int) -> list[float]:
    """Return the likeliest token's probability under the model cut off behind 1, 2, … layers."""
    confidences = []
    for depth in range(1, num_layers):
        logits = ListedModel(model, path=range(depth)).logits(prompt)
        confidences.append(float(logits[-1].softmax(-1).max()))
    return confidences


def kls_alone(model: Any, contexts: Sequence[Any], pairs: Sequence[Any]) -> list[float]:
    """Run each prompt alone, unpadded, in full, and compare its distributions token by token."""

    def logprobs(row: int, decisions: Any) -> Tensor:
        return ListedModel(model, decisions).logits(contexts[row]).float().log_softmax(-1)

    full = {row: logprobs(row, FULL) for row in {row for row, _ in pairs}}
    return [
        float(kl_div(logprobs(row, each), full[row], reduction="batchmean", log_target=True))
        for row, each in pairs
    ]


def assert_sums(expected: Sequence[Any], found: Sequence[Any]) -> None:
    """Compare sums, or scores that hold them."""
    for slow, fast in zip(expected, found, strict=True):
        sums = [getattr(each, "logprobs", each) for each in (slow, fast)]
        assert sums[0] == pytest.approx(sums[1], abs=SUM_TOLERANCE)


def some_pairs(num: int, seed: int = 0) -> list[tuple[int, tuple[int, ...]]]:
    """Draw (question, decisions) pairs for three questions; none is the full path."""
    rng = random.Random(seed)
    pairs: list[tuple[int, tuple[int, ...]]] = []
    while len(pairs) < num:
        decisions = tuple(rng.choices([0, 1, 2], [2, 5, 2], k=6))
        if any(decisions) and decisions != FULL:
            pairs.append((rng.randrange(3), decisions))
    return pairs


def prefixes(pairs: Sequence[Any]) -> set[tuple[int, tuple[int, ...]]]:
    """Return the distinct states that paths go through: what a perfect sharer runs."""
    return {
        (row, to_path(decisions)[:length])
        for row, decisions in pairs
        for length in range(1, sum(decisions) + 1)
    }


def never(_place: int, _text: str, finished: bool) -> float | None:
    """Grade an answer when it is all there."""
    return 0.0 if finished else None


def tiny_routers(seed: int = 0, spread: float = 3.0, **options: Any) -> RouterStack:
    """Make routers for the tiny models that take all three decisions."""
    shape = {"num_layers": 6, "hidden_size": 32, "num_windows": 4, "router_width": 16}
    stack = RouterStack(RouterConfig(**{**shape, **options}), torch.Generator().manual_seed(seed))
    with torch.no_grad():  # far from the zero biases, so that all three decisions turn up
        stack.decision_weight.mul_(spread)
    return stack


def routers_for(base: Any, seed: int = 3, **options: Any) -> RouterStack:
    """Make routers of the published shape that know their base model by its fingerprint."""
    shape = {"router_width": 128, "num_windows": 8, "base_fingerprint": fingerprint(base.model)}
    return tiny_routers(seed, **{**shape, **options})


def answers(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Let a model generate for a left-padded batch; return what follows each prompt."""
    ids, mask = pad_left(prompts, "cpu")
    options = {"do_sample": False, **options}
    output = model.generate(input_ids=ids, attention_mask=mask, **options)
    return output[:, ids.shape[1] :].tolist()


class Meeting:
    """Stops a pass at its first layer until another thread has had its turn."""

    def __init__(self, layer: nn.Module) -> None:
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.handle = layer.register_forward_pre_hook(self.wait)

    def wait(self, *_args: Any) -> None:
        if not self.has_begun.is_set():
            self.has_begun.set()
            assert self.may_go_on.wait(30)


class Recorder(Policy):
    """A policy that executes everything and keeps what it could read, layer by layer."""

    def __init__(self) -> None:
        self.views: list[Any] = []

    def decide(self, _layer: int, prompts: Any) -> Tensor:
        self.views.append(prompts)
        return torch.ones(prompts.num_rows, dtype=torch.long)

    @property
    def read(self) -> list[list[int]]:
        """How many tokens of each row could be read, pass by pass."""
        return [view.readable.sum(dim=1).tolist() for view in self.views[::6]]

    def assert_read(self, model: Any, contexts: Sequence[Sequence[int]]) -> None:
        """Check that the first layer was shown these contexts and nothing else."""
        view = self.views[0]
        for row, context in enumerate(contexts):
            expected = model.model.embed_tokens(torch.tensor(context))
            assert torch.equal(expected, view.hidden[row][view.readable[row]])


class Opaque:
    """Stands for a mask whose rows can't be cut, as flex attention's."""


def said_to_slide(model: Any) -> Any:
    """Let a model say that it slides, which a Llama doesn't do: its numbers stay the same."""
    model.config.sliding_window = 8
    return model


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask of rows that are padded on the right."""
    width = max(map(len, rows))
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def stored_rows(cache: Any) -> int:
    """Count the K/V rows that a routed cache holds; equals the executions of its rows' plans."""
    entries = [entry for entry in cache.layers if isinstance(entry, RoutedCacheLayer)]
    return sum(len(rows) for entry in entries for rows in entry.rows)


def stored_bytes(cache: Any) -> int:
    """Count the bytes of K and V that a cache holds, of a routed model or not; without shadows."""
    entries = [e.passes if isinstance(e, RoutedCacheLayer) else [e] for e in cache.layers]
    return sum(part.keys.nbytes + part.values.nbytes for parts in entries for part in parts)
