"""Planners make all decisions before the first layer runs, from what it reads of the prompt.

There are two: a linear map for the whole model, and the whole program, segment by segment.

Axes: N examples or prompts, B rows, D hidden, L layers, H width, C = 3 decisions.
"""

import copy
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drllm.bisection import Setting, nearest_setting
from drllm.errors import RecordError
from drllm.models.routers.depth_control import routes_of
from drllm.models.routing.policies import Policy, PromptView, biased, full_precision
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import Decisions, full_decisions
from drllm.records import SearchRecord
from drllm.supervision.rules import is_saving, is_valid

STEEPEST = 1024.0
"""Greatest bias in either direction; logits of planners lie far within."""
FEWEST_TO_HOLD_OUT = 10
LONGEST = {0: 4, 1: 4, 2: 1}
"""Maximum layers of a segment, by what is done with it. A decision of 2 runs one layer twice in
succession, so two repeated neighbours are two segments: repeating both as a block is another path,
which the search log can't hold."""
MAXIMUM_PATHS = 50
"""Maximum valid paths of a question that are learned from."""
FULL_PATH_WEIGHT = 0.30
"""Weight of the full path beside shorter valid paths, whose weight is 1."""
WIDTH = 128


class Planner(nn.Module):
    """Makes all decisions for a prompt from what is read of it at the first layer.

    First-layer inputs are small, and differ in scale from model to model, so every component is
    scaled to the mean 0 and deviation 1 that it has over the training prompts, `[N, D]`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        deviation = inputs.std(dim=0, correction=0)
        self.register_buffer("mean", inputs.mean(dim=0))
        # A component that never varies carries nothing: whatever it is, it counts as its mean.
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.inf))

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return `[B, D]`, scaled."""
        return (inputs - self.mean) / self.deviation

    @abstractmethod
    def likeliest(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return the likeliest decisions `[B, L]`, the bias taken off for each execution."""

    @torch.no_grad()
    def plans(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return decisions `[B, L]` of what `first_input` gives, `[B, D]`.

        The higher the bias, the price of an execution, the fewer a row has; one that would skip
        everything runs the last layer.
        """
        plans = self.likeliest(inputs, depth_bias).clone()
        plans[plans.sum(dim=1) == 0, -1] = 1
        return plans


class UpFrontPolicy(Policy):
    """Takes all decisions at the first layer, from its pooled input, by a planner on the CPU."""

    def __init__(self, planner: Planner, depth_bias: float = 0.0) -> None:
        self.planner = planner
        self.depth_bias = depth_bias
        self._plans = torch.empty(0, 0, dtype=torch.long)

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one column of the plans."""
        if layer == 0:
            inputs = first_input(prompts).cpu()  # where the planner is
            with full_precision(inputs.device):
                self._plans = self.planner.plans(inputs, self.depth_bias)
        return self._plans[:, layer]


def find_bias(planner: Planner, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias under which prompts run the wanted executions on average.

    What a planner reads doesn't depend on its decisions, so no forward pass is needed.

    Source: ours (D-20).
    """

    def mean(bias: float) -> float:
        return float(planner.plans(inputs, bias).sum(dim=1).double().mean())

    return nearest_setting(mean, executions, -STEEPEST, STEEPEST)


# --- reading prompts -----------------------------------------------------------------------------


def first_input(prompts: PromptView) -> Tensor:
    """Return the mean of each prompt's real tokens as a layer reads them, `[B, D]` in float32."""
    return prompts.windows(1).means[:, 0]


def first_inputs(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return `first_input` at the first layer, where nothing but the embedding has run, `[N, D]`.

    All layers are skipped, of which routing runs the last one all the same; see `recorded`.
    """
    return recorded(routed, prompts, first_input, [0], decision=0)[:, 0]


def recorded(
    routed: RoutedModel,
    prompts: Sequence[Sequence[int]],
    read: Callable[[PromptView], Tensor],
    layers: Collection[int],
    *,
    decision: int,
) -> Tensor:
    """Return what is read of every prompt at some layers, while all take the same decision.

    It is `[N, layers, …]` on the CPU, in the order of the prompts. See `routes_of`.
    """
    kept: list[Tensor] = []  # batch by batch, layer by layer

    class Recorder(Policy):
        def decide(self, layer: int, prompts: PromptView) -> list[int]:
            if layer in layers:
                kept.append(read(prompts).cpu())
            return [decision] * prompts.num_rows

    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    routes_of(routed, Recorder(), [prompts[row] for row in by_length])
    starts = range(0, len(kept), len(layers))
    values = torch.cat([torch.stack(kept[at : at + len(layers)], dim=1) for at in starts])
    return values[torch.tensor(by_length).argsort()]


# --- training ------------------------------------------------------------------------------------


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    num_examples: int,
    generator: torch.Generator,
    *,
    num_epochs: int = 100,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    held_out: float = 0.2,
) -> None:
    """Train a module in place by AdamW and freeze it; the same arguments give the same weights.

    The epoch kept is the one after which the loss on examples held out was least, so that a
    baseline is neither cut short nor left to learn its few examples by heart. With a share of 0
    held out, or below 10 examples, none is and the last epoch counts. The loss is the mean of the
    examples at places `[B]`; from the learning rate half a cosine leads to 0. The generator draws
    what is held out, and the order of the others in every epoch.
    """
    examples = torch.randperm(num_examples, generator=generator)
    num_held_out = round(held_out * num_examples) if num_examples >= FEWEST_TO_HOLD_OUT else 0
    unseen, learned = examples[:num_held_out], examples[num_held_out:]
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.01)
    num_steps = num_epochs * math.ceil(len(learned) / batch_size)
    step, least, best = 0, math.inf, None
    [group] = optimizer.param_groups
    for _ in range(num_epochs):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for places in torch.split(order, batch_size):
            group["lr"] = learning_rate * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
            optimizer.zero_grad()
            loss(places).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        if num_held_out:
            with torch.no_grad():
                found = float(loss(unseen))
            if found < least:
                least, best = found, copy.deepcopy(module.state_dict())
    if best is not None:
        module.load_state_dict(best)
    module.eval().requires_grad_(False)


def linear(num_inputs: int, num_outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a linear map with zero bias and Xavier weights of this generator, or zeros."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)  # type: ignore[no-untyped-call]
    for weights in (made.bias, made.weight):
        nn.init.zeros_(weights)
    if generator is not None:
        nn.init.xavier_uniform_(made.weight, generator=generator)
    return made


# --- one router for the whole model --------------------------------------------------------------


class SequenceRouter(Planner):
    """Gives the logits of every layer's decision from one linear map of the pooled prompt.

    Source: MindSkip in Router-Tuning (arXiv 2410.13184), changed as D-18 says.
    """

    def __init__(self, inputs: Tensor, num_layers: int) -> None:
        super().__init__(inputs)
        self.num_layers = num_layers
        # Zeros: of fewer prompts than components, training would never move what random weights
        # say about the others.
        self.linear = linear(inputs.shape[1], num_layers * 3, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of skip, execute and repeat, `[B, D]` to `[B, L, C]`."""
        logits: Tensor = self.linear(self.scaled(inputs))
        return logits.view(-1, self.num_layers, 3)

    def likeliest(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """See `Planner.likeliest`."""
        return biased(self(inputs), depth_bias).argmax(dim=-1)


def train_sequence_router(
    inputs: Tensor, labels: Tensor, *, seed: int = 0, **settings: Any
) -> SequenceRouter:
    """Train a router on target paths, by cross-entropy at every layer.

    Classes are not weighted, since a bias sets the executions afterwards. Inputs are `first_inputs`
    of the targets' prompts, labels their decisions `[N, L]`; settings are `fit`'s.
    """
    router = SequenceRouter(inputs, labels.shape[1])

    def loss(places: Tensor) -> Tensor:
        logits = router(inputs[places])  # [B, L, C]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[places].flatten())

    fit(router, loss, len(labels), torch.Generator().manual_seed(seed), **settings)
    return router


# --- the whole program, segment by segment ------------------------------------------------------


def segments_of(decisions: Decisions) -> list[tuple[int, int]]:
    """Cut decisions `[L]` into the fewest segments, long ones first: first layers and decisions.

    Example:
        >>> segments_of((1, 1, 1, 1, 1, 0, 2, 2))
        [(0, 1), (4, 1), (5, 0), (6, 2), (7, 2)]
    """
    segments: list[tuple[int, int]] = []
    for layer, decision in enumerate(decisions):
        start, before = segments[-1] if segments else (0, -1)
        if decision != before or layer - start == LONGEST[decision]:
            segments.append((layer, decision))
    return segments


@dataclass(frozen=True, slots=True)
class Programs:
    """The valid programs of searched questions, added up by question.

    A program's loss is linear in what the program says of each layer, so the weighted sums over a
    question's programs say all that is needed to learn them.

    Attributes:
        questions: `[N]`: the places, among the records, of the questions with a valid program.
        starts: `[N, L]`: the weight of those with a segment that starts at the layer; at layer 0
            that of all.
        operations: `[N, L, C]`: the weight of those that do this from there, each divided by its
            number of segments.
    """

    questions: Tensor
    starts: Tensor
    operations: Tensor


def programs_of(records: Sequence[SearchRecord], seed: int = 0) -> Programs:
    """Collect the valid programs of a search log.

    Of more than `MAXIMUM_PATHS` that many are drawn. If a shorter path is valid too, the full path
    counts `FULL_PATH_WEIGHT`, so that the predictor isn't drawn to it; each weight is divided by
    the question's number of paths. RecordError if no record has a valid path.

    Source: PoLar (arXiv 2606.06574), and the published code for what 0.30 is a weight of.
    """
    rng = random.Random(seed)
    places = [i for i, record in enumerate(records) if any(map(is_valid, record.paths))]
    if not places:
        raise RecordError(
            "no question of these search records has a valid path, so there is no program to "
            "learn; search more questions"
        )
    L = records[0].num_layers
    starts, operations = torch.zeros(len(places), L), torch.zeros(len(places), L, 3)
    for row, place in enumerate(places):
        record = records[place]
        valid = [path.decisions for path in record.paths if is_valid(path)]
        if len(valid) > MAXIMUM_PATHS:
            valid = rng.sample(valid, MAXIMUM_PATHS)
        has_shorter = any(is_saving(path, record) for path in record.paths)
        for decisions in valid:
            is_lighter = has_shorter and decisions == full_decisions(L)
            weight = (FULL_PATH_WEIGHT if is_lighter else 1.0) / len(valid)
            segments = segments_of(decisions)
            for layer, decision in segments:
                starts[row, layer] += weight
                operations[row, layer, decision] += weight / len(segments)
    return Programs(torch.tensor(places), starts, operations)


class ProgramPredictor(Planner):
    """Gives, for every layer, the logit of a segment's start and those of its operation.

    Source: PoLar (arXiv 2606.06574), much simplified; docs/differences.md (D-18) says how.
    """

    def __init__(self, inputs: Tensor, num_layers: int, generator: torch.Generator) -> None:
        super().__init__(inputs)
        self.project = linear(inputs.shape[1], WIDTH, generator)
        self.queries = nn.Parameter(torch.randn(num_layers, WIDTH, generator=generator))
        self.start = linear(WIDTH, 1, generator)
        self.operation = linear(WIDTH, 3, generator)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of starts `[B, L]` and of operations `[B, L, C]`."""
        prompt = self.project(self.scaled(inputs))  # [B, H]
        inner = nn.functional.gelu(prompt[:, None] + self.queries)  # [B, L, H]
        return self.start(inner)[..., 0], self.operation(inner)

    def likeliest(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """See `Planner.likeliest`."""
        starts, operations = self(inputs)
        return best_programs(starts, operations, depth_bias)


def best_programs(starts: Tensor, operations: Tensor, depth_bias: float) -> Tensor:
    """Return the likeliest program of each row, by dynamic programming over its segments.

    A program's log-probability is the sum, over layers, of that of a segment starting there or
    not, and, over segments, of that of the operation at its first layer; the first layer always
    starts one. The bias is taken off for each execution. Logits are `[B, L]` and `[B, L, C]`, the
    decisions `[B, L]`; they may skip every layer.
    """
    B, L = starts.shape
    start = nn.functional.logsigmoid(starts)
    inside = nn.functional.logsigmoid(-starts).cumsum(dim=1)  # [B, L], of no start up to here
    operation = operations.log_softmax(dim=-1)
    choices = [(d, n) for d, longest in LONGEST.items() for n in range(1, longest + 1)]
    best = [starts.new_zeros(B)]  # by layers decided: the best score so far
    taken: list[Tensor] = []  # likewise: which choice the last segment was
    for end in range(1, L + 1):
        scores = []
        for decision, length in choices:
            first = end - length
            if first < 0:
                scores.append(torch.full_like(best[0], -torch.inf))
                continue
            score = best[first] + operation[:, first, decision] + inside[:, end - 1]
            score = score - inside[:, first] - depth_bias * decision * length
            scores.append(score + start[:, first] if first else score)
        highest = torch.stack(scores).max(dim=0)
        best.append(highest.values)
        taken.append(highest.indices)
    rows = []
    for row in torch.stack(taken, dim=1).tolist():
        decisions: list[int] = []
        while len(decisions) < L:  # from the last segment to the first
            decision, length = choices[row[L - 1 - len(decisions)]]
            decisions += [decision] * length
        rows.append(decisions[::-1])
    return torch.tensor(rows)


def train_predictor(
    inputs: Tensor, programs: Programs, *, seed: int = 0, **settings: Any
) -> ProgramPredictor:
    """Train a predictor on the valid programs of a search log; an example is a question.

    Inputs are `first_inputs` of all records' prompts; settings are `planners.fit`'s.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = inputs[programs.questions]
    predictor = ProgramPredictor(inputs, programs.starts.shape[1], generator)

    def loss(rows: Tensor) -> Tensor:
        starts, operations = predictor(inputs[rows])
        losses = program_losses(starts, operations, programs, rows)
        return losses.sum() / programs.starts[rows, 0].sum()

    fit(predictor, loss, len(inputs), generator, **settings)
    return predictor


def program_losses(starts: Tensor, operations: Tensor, programs: Programs, rows: Tensor) -> Tensor:
    """Return the weighted losses of some questions' programs, added up by question, `[B]`.

    The loss of a program is the mean binary cross-entropy of the starts (but the first layer's,
    which always is one) plus the mean cross-entropy of the operations where its segments start.
    """
    starting = programs.starts[rows]
    log_start, log_inside = nn.functional.logsigmoid(starts), nn.functional.logsigmoid(-starts)
    of_starts = starting * log_start + (starting[:, :1] - starting) * log_inside  # [B, L]
    of_operations = programs.operations[rows] * operations.log_softmax(dim=-1)  # [B, L, C]
    return -(of_starts[:, 1:].mean(dim=1) + of_operations.sum(dim=(1, 2)))
