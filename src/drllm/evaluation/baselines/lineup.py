"""Who a routed model is compared with: baselines fitted once, then asked for at any executions.

Owns what each baseline may be fitted on (`Material`), fitting it when it is first asked for, and
turning it into decisions for a task's questions at the routed model's executions. Leaves the
baselines themselves to `baselines`, and running them to `systems`.

Axes: Q questions, L layers, N calibration prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from drllm.cost import mean_executions
from drllm.evaluation.baselines.early_exit import ExitPolicy, confidences, find_threshold
from drllm.evaluation.baselines.first_layer import UpFrontPolicy, find_bias, first_inputs
from drllm.evaluation.baselines.greedy import Greedy
from drllm.evaluation.baselines.influence import block_influence, order_by_influence
from drllm.evaluation.baselines.layer_dropping import (
    Plan,
    evenly_spaced,
    last_layers,
    mixture,
    nested,
    skipping,
)
from drllm.evaluation.baselines.measures import (
    Measure,
    PathMeasure,
    gold_logprob,
    gold_logprob_along,
    text_question,
    token_logprob,
)
from drllm.evaluation.baselines.program import best_program, reach
from drllm.evaluation.baselines.random_routes import (
    expected_executions,
    label_frequency,
    permuted,
    random_like,
    tilted,
)
from drllm.evaluation.baselines.registry import NEEDS
from drllm.evaluation.baselines.repeat import RepeatedBlock, best_block
from drllm.evaluation.baselines.segments import programs_of, train_predictor
from drllm.evaluation.baselines.sequence import train_sequence_router
from drllm.evaluation.blocks import blocks_of
from drllm.models.base.prompts import encode
from drllm.models.routing.policies import Policy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.logit_lens import LogitLens
from drllm.models.scoring.packing import Question
from drllm.paths import Path, edits, full_decisions
from drllm.records import SearchRecord, SupervisionRecord

TOLERANCE = 1e-6
"""How far expected executions may lie from those wanted and still be called equal."""
BATCH_SIZE = 16
"""Questions a pass while baselines are fitted; of like length, so that little is padding."""
STATE_CACHE_GB = 1.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """How an baseline decides on the questions of a task; one of the first three.

    Attributes:
        plan: `[Q, L]` decisions.
        policy: What decides on each prompt.
        path: One path for all, which decisions can't express.
        note: What a reader should know beyond the baseline's description; a part of a sentence.
    """

    plan: Tensor | None = None
    policy: Policy | None = None
    path: Path | None = None
    note: str = ""


@dataclass(frozen=True)
class Material:
    """What baselines may be fitted on, never what is reported on.

    Attributes:
        routed: The model with its routers.
        prompts: Token ids of each calibration prompt, `[N]`.
        questions: The same questions with their options, and which is right; empty where answers
            are generated.
        golds: Of each question.
        search: The search log of the training questions; empty if not given.
        targets: The routers' own targets; empty if not given.
        seed: Of what is trained.
    """

    routed: RoutedModel
    prompts: Sequence[Sequence[int]]
    questions: Sequence[Question] = ()
    golds: Sequence[int] = ()
    search: Sequence[SearchRecord] = ()
    targets: Sequence[SupervisionRecord] = ()
    seed: int = 0

    def by_loss(self) -> Measure:
        """Return the log-probability of the prompts' own tokens."""
        texts = [text_question(tokens) for tokens in self.prompts if len(tokens) > 1]
        return token_logprob([self._batch(texts, places) for places in _by_length(texts)])

    def by_answers(self) -> Measure:
        """Return the log-probability of the right options."""
        return gold_logprob(*self._batches())

    def by_answers_along(self) -> PathMeasure:
        """Return the same of paths that decisions can't express."""
        return gold_logprob_along(*self._batches())

    def _batches(self) -> tuple[list[ChoiceBatch], list[list[int]]]:
        """Return the questions with options in batches, and which options are right in each."""
        grouped = _by_length(self.questions)
        return (
            [self._batch(self.questions, places) for places in grouped],
            [[self.golds[place] for place in places] for places in grouped],
        )

    def _batch(self, questions: Sequence[Question], places: Sequence[int]) -> ChoiceBatch:
        return ChoiceBatch(self.routed, [questions[place] for place in places], STATE_CACHE_GB)


def _by_length(questions: Sequence[Question]) -> list[tuple[int, ...]]:
    """Return the places of the questions of each batch."""
    lengths = [question.length for question in questions]
    return [block.places for block in blocks_of(lengths, least=1, batch_size=BATCH_SIZE)]


At: TypeAlias = Callable[[Tensor, torch.Generator], Drawn]
"""Decides on the questions that took some routes `[Q, L]`, at the same mean executions."""

Remember: TypeAlias = Callable[[str, Sequence[Path], PathMeasure], list[float]]
"""Returns what the measure of a name gives for candidates, asking it unless that is known."""


class Lineup:
    """Baselines of one routed model on one task.

    Args:
        name: Of the task whose questions they are fitted on.
        prepare: Gives what they are fitted on; asked when the first one is that needs it.
        routed: The model with its routers.
        remember: Keeps what candidates were measured at, by far the longest part of fitting.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[], Material],
        routed: RoutedModel,
        remember: Remember,
    ) -> None:
        self.name = name
        self._prepare = prepare
        self.routed = routed
        self._remember = remember
        self._fitted: dict[str, object] = {}

    @cached_property
    def material(self) -> Material:
        """What baselines are fitted on."""
        return self._prepare()

    def obstacle(self, name: str, executions: float) -> str | None:
        """Say why an baseline can't be had at given mean executions; None where it can."""
        attribute, words = NEEDS.get(name, ("", ""))
        if attribute and not getattr(self.material, attribute):
            return f"it needs {words}"
        if name == "best program":
            reached = reach(self.material.search)
            if reached is None:
                return "the search log has tried nothing but the full path"
            fewest, most = reached
            if not fewest <= executions <= most:
                return (
                    f"mixed with the full path, programs of the search log run {fewest} to {most} "
                    f"executions, and the routed model has {executions:.2f}"
                )
        return None

    def at(self, name: str, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return how an baseline decides at the mean executions of some routes.

        Args:
            name: One of `BASELINES`.
            routes: `[Q, L]`, those that the routed model took on the questions.
            generator: Source of randomness.

        Raises:
            ConfigError: An baseline that can't be had at these executions.
        """
        ways: dict[str, At] = {
            "permuted routes": lambda routes, g: Drawn(permuted(routes, g)),
            "random decisions": lambda routes, g: Drawn(random_like(routes, g)),
            "label frequency": self._label_frequency,
            "last layers": lambda routes, g: self._static(last_layers(self.num_layers), routes, g),
            "evenly spaced": lambda routes, g: self._static(
                evenly_spaced(self.num_layers), routes, g
            ),
            "block influence": lambda routes, g: self._static(self._influence, routes, g),
            "greedy by loss": lambda routes, g: self._static(self._by_loss, routes, g),
            "greedy by answers": lambda routes, g: self._static(self._by_answers, routes, g),
            "best program": self._program,
            "confidence exit": self._exit,
            "block repeat": self._repeat,
            "sequence router": self._sequence,
            "program predictor": self._predictor,
        }
        return ways[name](routes, generator)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.routed.num_layers

    # --- drawn from the routes, or given up in an order ---

    def _label_frequency(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        routers = self.routed.routers
        assert routers is not None
        wanted = mean_executions(routes.tolist())
        frequencies = tilted(routers.config.label_counts, wanted)
        expected = expected_executions(frequencies)
        note = ""
        if abs(expected - wanted) > TOLERANCE:
            note = (
                f"not at equal executions: whatever the tilt, the labels give no nearer mean than "
                f"{expected:.2f} where the routed model has {wanted:.2f}"
            )
        return Drawn(label_frequency(frequencies, len(routes), generator), note=note)

    def _static(self, plan: Plan, routes: Tensor, generator: torch.Generator) -> Drawn:
        wanted = mean_executions(routes.tolist())
        if wanted > self.num_layers:
            full = torch.ones(len(routes), self.num_layers, dtype=torch.long)
            return Drawn(full, note=f"runs {self.num_layers} layers, having none to give up")
        return Drawn(skipping(plan, wanted, len(routes), generator))

    @cached_property
    def _influence(self) -> Plan:
        influence = block_influence(self.routed, self.material.prompts)
        return nested(order_by_influence(influence), self.num_layers)

    @cached_property
    def _by_loss(self) -> Plan:
        return Greedy(self._by("loss"), self.num_layers)

    @cached_property
    def _by_answers(self) -> Plan:
        return Greedy(self._by("answers"), self.num_layers)

    def _by(self, name: str) -> PathMeasure:
        """Return a measure that remembers; it is made when it is first asked something new."""
        ways = {
            "loss": self.material.by_loss,
            "answers": self.material.by_answers,
            "answers along": self.material.by_answers_along,
        }
        return lambda candidates: self._remember(
            f"{self.name} by {name}", candidates, lambda unknown: ways[name]()(unknown)
        )

    # --- from the search log, and from prompts ---

    def _program(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        wanted = mean_executions(routes.tolist())
        measure = self._by("answers" if self.material.questions else "loss")
        found = best_program(self.material.search, measure, wanted)
        pair = (found.program.decisions, full_decisions(self.num_layers))
        first, second = sorted(pair, key=sum)
        return Drawn(
            mixture(first, second, wanted, len(routes), generator),
            note=f"{edits(found.program.decisions)} on {1 - found.full_share:.0%} of the questions",
        )

    def _exit(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        readout = LogitLens(self.routed)
        if "exit" not in self._fitted:
            self._fitted["exit"] = confidences(self.routed, readout, self.material.prompts)
        measured = self._fitted["exit"]
        assert isinstance(measured, Tensor)
        wanted = min(mean_executions(routes.tolist()), float(self.num_layers))
        found = find_threshold(measured, wanted)
        return Drawn(
            policy=ExitPolicy(readout, found.value),
            note=f"exits above a confidence of {found.value:.4f}",
        )

    def _repeat(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        if "repeat" not in self._fitted:
            self._fitted["repeat"] = best_block(self._by("answers along"), self.num_layers)
        found = self._fitted["repeat"]
        assert isinstance(found, RepeatedBlock)
        block = f"layer {found.start}"
        if found.end > found.start:
            block = f"layers {found.start} to {found.end}"
        return Drawn(path=found.path, note=f"runs {block} twice")

    def _sequence(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        if "sequence" not in self._fitted:
            targets = self.material.targets
            labels = torch.tensor([target.optimal_layer_config for target in targets])
            inputs = self._inputs([target.prompt for target in targets])
            self._fitted["sequence"] = train_sequence_router(inputs, labels)
        return self._up_front("sequence", routes)

    def _predictor(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        if "predictor" not in self._fitted:
            records = self.material.search
            inputs = self._inputs([record.prompt for record in records])
            programs = programs_of(records, seed=self.material.seed)
            self._fitted["predictor"] = train_predictor(inputs, programs)
        return self._up_front("predictor", routes)

    def _inputs(self, prompts: Sequence[str]) -> Tensor:
        tokenizer = self.routed.tokenizer
        return first_inputs(self.routed, [encode(tokenizer, text) for text in prompts])

    def _up_front(self, which: str, routes: Tensor) -> Drawn:
        planner = self._fitted[which]
        if "inputs" not in self._fitted:
            self._fitted["inputs"] = first_inputs(self.routed, self.material.prompts)
        inputs = self._fitted["inputs"]
        assert isinstance(inputs, Tensor)
        found = find_bias(planner, inputs, mean_executions(routes.tolist()))  # type: ignore[arg-type]
        return Drawn(
            policy=UpFrontPolicy(planner, found.value),  # type: ignore[arg-type]
            note=f"with a bias of {found.value:.4g}",
        )
