"""Runs the systems of a comparison on one task's questions: base, routed, baselines and paths.

Routers read only the question. So all options of a question have the same route, and so does the
text that begins with the question.

Axes: Q questions, L layers.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec
import numpy as np
from msgspec import field
from torch import Tensor

from drllm.cost import decode_executions, mean_executions, path_executions
from drllm.errors import ModelError
from drllm.evaluation.baselines.base import BaselineRun
from drllm.evaluation.latency import device_clock
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import Decides, HarnessRequest, OptionScore, Paths, Plan
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy
from drllm.models.scoring.batching import group_by_length
from drllm.paths import Decisions, StaticPath
from drllm.statistics.paired import Outcomes
from drllm.tasks.examples import choose

Answers: TypeAlias = list[list[OptionScore | str]]  # for each question, the answers to its requests
Block: TypeAlias = Sequence[int]  # places of the questions that are asked together

MIN_BLOCK_SIZE = 64
"""The fewest questions in a block, if options are scored. Scoring them takes seconds, so the time
to write the block's file hardly counts."""


class BatchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answers to some questions under all draws of a system, and the first draw's time.

    `answers` and `routes` have an item for each draw, with the answers to every question or its
    decisions. `routes` is empty for a static path.
    """

    answers: list[Answers]
    routes: list[list[Decisions]]
    seconds: float = 0.0


class SystemRun(Outcomes, kw_only=True):
    """One system's outcomes on a task.

    If there are several draws, `correct` and `gold_logprob` are means over them, and `text_loss` is
    the first draw's. The executions are a mean over questions and draws.
    """

    executions: float = 0.0
    correct: Sequence[float] = ()
    setting: str = ""  # the depth in words; empty for the depth of training
    path: StaticPath | None = None
    # For each draw, every question's decisions; empty for a static path.
    routes: list[list[Decisions]] = field(default_factory=list)
    # The first draw's answers: the chosen options, or the generated texts.
    answers: list[int | str] = field(default_factory=list)
    # Name of a metric of the harness → each question's score, a mean over the draws.
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0  # wall time of the first draw, added up over the blocks
    # Mean executions for a generated token; None if options are scored.
    decode_executions: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The system with its setting."""
        return f"{self.name}, {self.setting}" if self.setting else self.name


KeepBlocks: TypeAlias = Callable[[Mapping[str, Callable[[], BatchResult]]], list[BatchResult]]
"""Takes key → a function that runs a block, and returns the blocks' results. If a result was stored
under the same key before an interruption, it is read instead. A key contains the decisions, so a
block is run again if its decisions have changed."""


class TaskRunner:
    """Runs one system after another on all questions of a task.

    The next-token loss is measured on the texts of `num_texts` questions, which are drawn with the
    seed. `num_tokens` is the largest number of tokens that a system reads and writes.
    """

    def __init__(self, lm: RoutedLM, harness_task: RenderedTask, num_texts: int, seed: int) -> None:
        self.lm = lm
        self.harness_task = harness_task
        self._clock = device_clock(lm.device)
        self._requests: list[list[HarnessRequest]] = []  # by question
        if harness_task.has_options:
            self._requests = harness_task.requests()
        places = choose(range(len(harness_task.keys)), num_texts, seed)  # as `tune` draws texts
        self._texts = [harness_task.text(place) for place in places]
        text_lengths = [len(text.context) + len(text.continuation) for text in self._texts]
        lengths = self._question_lengths()
        self.num_tokens = sum(lengths) + sum(text_lengths)
        self._blocks: list[Block] = self._divide(lengths)
        if harness_task.has_options:
            # A first pass, so that the time for setting up isn't counted for the base model.
            lm.scorer.score(self._requests[0], FullPolicy())

    def _question_lengths(self) -> list[int]:
        """Return how many tokens each question reads and writes at most."""
        if self.harness_task.has_options:
            lengths = []
            for requests in self._requests:
                options = sum(len(request.continuation) for request in requests)
                lengths.append(len(requests[0].context) + options)
            return lengths
        settings = self.harness_task.instances[0][0].args[1]
        num_new = settings.get("max_gen_toks", self.lm.max_gen_toks)
        return [len(tokens) + num_new for tokens in self.harness_task.prompt_tokens]

    def _divide(self, lengths: Sequence[int]) -> list[Block]:
        """Divide the questions into blocks of similar length."""
        scorer = self.lm.scorer
        size = scorer.max_batch_size
        if isinstance(scorer.batch_size, int):
            size = scorer.batch_size
        if self.harness_task.has_options:
            return list(group_by_length(lengths, size * math.ceil(MIN_BLOCK_SIZE / size)))
        prompts = self.harness_task.prompts()  # a block's answers are found by their prompt
        blocks: list[Block] = []
        for block in group_by_length(lengths, size):  # a batch takes long enough to be a block
            blocks += separate_repeats(block, prompts)
        return blocks

    def run(
        self, name: str, draws: Sequence[BaselineRun], setting: str, keep: KeepBlocks
    ) -> SystemRun:
        """Run a system that decides by a policy, by a path, or by one or more draws of plans.

        Args:
            name: The system's name.
            draws: The system's decisions, one item for each draw.
            setting: The depth in words; empty for the depth of training.
            keep: Runs blocks and stores their results.
        """
        note = draws[0].note
        decides = [self._by_key(draw.decides) for draw in draws]
        path = decides[0] if isinstance(decides[0], StaticPath) else None
        result = self._run_blocks(keep, decides, note)
        system = self._grade(result)
        system.name = name
        system.setting = setting
        system.path = path
        system.routes = result.routes
        system.seconds = result.seconds
        system.notes = [note] if note else []
        along: Paths | StaticPath
        if path is not None:
            along = path
            system.executions = path_executions(path)
        else:
            along = dict(zip(self.harness_task.keys, result.routes[0], strict=True))
            by_draw = [[mean_executions(routes)] for routes in result.routes]
            [system.executions] = _mean_over_draws(by_draw)
        [texts] = self.lm.scorer.score_plans(self._texts, [along])
        system.text_loss = self._losses(texts)
        if not self.harness_task.has_options:
            system.decode_executions = self._decode_executions(system, result)
        return system

    def _grade(self, result: BatchResult) -> SystemRun:
        """Return the outcomes of a system's answers; its name and cost aren't set yet."""
        harness_task = self.harness_task
        draws = [harness_task.grade(answers) for answers in result.answers]
        metrics = {}
        for metric in draws[0][0]:
            by_draw = [[grades[metric] for grades in draw] for draw in draws]
            metrics[metric] = _mean_over_draws(by_draw)
        system = SystemRun(
            name="",
            correct=metrics[harness_task.written.metric],
            answers=[
                harness_task.answer(place, answers)
                for place, answers in enumerate(result.answers[0])
            ],
            metrics=metrics,
        )
        if harness_task.has_options:
            by_draw = [self._gold_logprobs(answers) for answers in result.answers]
            system.gold_logprob = _mean_over_draws(by_draw)
        return system

    def _gold_logprobs(self, answers: Answers) -> list[float]:
        """Return the log-probability of each question's gold option among its options."""
        gold_logprob = self.harness_task.gold_logprob
        return [gold_logprob(place, scores) for place, scores in enumerate(answers)]

    def _decode_executions(self, system: SystemRun, result: BatchResult) -> float | None:
        """Return the mean executions for a generated token, in the first draw."""
        num_tokens = []
        for [answer] in result.answers[0]:
            tokens = self.lm.tok_encode(str(answer), add_special_tokens=False)
            num_tokens.append(max(1, len(tokens)))
        if system.path is None:
            return decode_executions(result.routes[0], num_tokens)
        return system.executions if max(num_tokens) > 1 else None

    def _by_key(self, decides: Tensor | Policy | StaticPath) -> Decides:
        """Return a plan's rows `[Q, L]` by question; return a policy or a path as it is."""
        if not isinstance(decides, Tensor):
            return decides
        return dict(zip(self.harness_task.keys, map(tuple, decides.tolist()), strict=True))

    def _run_blocks(self, keep: KeepBlocks, decides: Sequence[Decides], note: str) -> BatchResult:
        """Run all blocks under all draws; return the results in the questions' order."""
        calls = {}
        for number, block in enumerate(self._blocks):
            key = f"block {number} {json.dumps(self._decisions_key(block, decides, note))}"
            calls[key] = partial(self._run_block, block, decides)
        return join_blocks(self._blocks, keep(calls))

    def _decisions_key(self, block: Block, decides: Sequence[Decides], note: str) -> Any:
        """Return values that identify a block's decisions, as far as these are known beforehand."""
        plans = [self._rows(plan, block) for plan in decides if isinstance(plan, Mapping)]
        if plans:
            return plans
        if isinstance(decides[0], StaticPath):
            return decides[0].layers
        return note

    def _run_block(self, block: Block, draws: Sequence[Decides]) -> BatchResult:
        """Run a block's questions under all draws; only the first draw is timed."""
        started = self._clock()
        first_answers, first_routes = self._run_draw(block, draws[0])
        seconds = self._clock() - started
        further = [draw for draw in draws[1:] if isinstance(draw, Mapping)]
        answers = [first_answers]
        if further and self.harness_task.has_options:  # prefixes that draws share run once
            scored = self.lm.scorer.score_plans(self._requests_of(block), further)
            answers += [self._by_question(block, scores) for scores in scored]
        else:
            answers += [self._run_draw(block, plan)[0] for plan in further]
        routes = []
        if not isinstance(draws[0], StaticPath):
            routes.append(first_routes)
        routes += [self._rows(plan, block) for plan in further]
        return BatchResult(answers=answers, routes=routes, seconds=seconds)

    def _run_draw(self, block: Block, decides: Decides) -> tuple[Answers, list[Decisions]]:
        """Return a block's answers and its questions' routes; a path has no routes."""
        if self.harness_task.has_options:
            answers, routes = self.lm.scorer.score(self._requests_of(block), decides)
            keys = [self.harness_task.keys[place] for place in block]
            return self._by_question(block, answers), [routes[key] for key in keys if routes]
        return self._generate(block, decides)

    def _generate(self, block: Block, decides: Decides) -> tuple[Answers, list[Decisions]]:
        """Generate a block's answers; return them and the questions' routes."""
        routed = self.lm.routed
        instances = [self.harness_task.instances[place][0] for place in block]
        prompts = [str(instance.args[0]) for instance in instances]
        keys = [self.harness_task.keys[place] for place in block]
        key_of = dict(zip(prompts, keys, strict=True))
        if isinstance(decides, StaticPath):
            decides = routed.policy_of(decides)

        def policy_of(batch: Sequence[str]) -> Policy:
            if isinstance(decides, Mapping):
                return FixedPolicy([decides[key_of[p]] for p in batch], routed.num_layers)
            return decides

        self.lm.choose_policy = policy_of
        texts = self.lm.generate_until(instances, disable_tqdm=True)
        return [[text] for text in texts], [self.lm.generated_routes[prompt] for prompt in prompts]

    def _rows(self, plan: Plan, block: Block) -> list[Decisions]:
        return [plan[self.harness_task.keys[place]] for place in block]

    def _requests_of(self, block: Block) -> list[HarnessRequest]:
        return [request for place in block for request in self._requests[place]]

    def _by_question(self, block: Block, answers: Sequence[OptionScore]) -> Answers:
        """Return the answers to a block's requests, question by question."""
        by_question: Answers = []
        start = 0
        for place in block:
            end = start + len(self._requests[place])
            for logprob, _ in answers[start:end]:
                if not math.isfinite(logprob):  # refused before the block is kept
                    raise ModelError(
                        f"a log-probability of question {self.harness_task.ids[place]} is "
                        f"{logprob}; load the model with --dtype float32"
                    )
            by_question.append([*answers[start:end]])
            start = end
        return by_question

    def _losses(self, answers: Sequence[OptionScore]) -> list[float]:
        """Return the next-token loss of each text, in nats a token."""
        losses = []
        for text, (logprob, _) in zip(self._texts, answers, strict=True):
            losses.append(-logprob / len(text.continuation))
        return losses


def separate_repeats(block: Block, prompts: Sequence[str]) -> list[list[int]]:
    """Divide a block into parts in which no prompt occurs twice."""
    parts: defaultdict[int, list[int]] = defaultdict(list)
    num_seen: Counter[str] = Counter()
    for place in block:
        prompt = prompts[place]
        parts[num_seen[prompt]].append(place)
        num_seen[prompt] += 1
    return list(parts.values())


def join_blocks(blocks: Sequence[Block], results: Sequence[BatchResult]) -> BatchResult:
    """Join the results of all blocks into one, in the questions' order."""
    places = [place for block in blocks for place in block]
    return BatchResult(
        answers=_in_order(places, [result.answers for result in results]),
        routes=_in_order(places, [result.routes for result in results]),
        seconds=sum(result.seconds for result in results),
    )


def _in_order(places: Sequence[int], parts: Sequence[Sequence[list[Any]]]) -> list[list[Any]]:
    """Join values `[block][draw][question]` to `[draw][question]`, in the questions' order."""
    draws = []
    for blocks in zip(*parts, strict=True):
        values: list[Any] = [None] * len(places)
        for place, value in zip(places, itertools.chain(*blocks), strict=True):
            values[place] = value
        draws.append(values)
    return draws


def average_runs(systems: Sequence[SystemRun], name: str) -> SystemRun:
    """Return the mean outcomes of several systems on the same questions."""
    means: dict[str, Any] = {}
    for quantity in ("correct", "gold_logprob", "text_loss", "seconds", "executions"):
        values = [getattr(system, quantity) for system in systems]
        means[quantity] = np.mean(values, axis=0).tolist()
    metrics = {}
    for metric in systems[0].metrics:
        metrics[metric] = _mean_over_draws([system.metrics[metric] for system in systems])
    return SystemRun(name=name, metrics=metrics, **means)


def _mean_over_draws(draws: Sequence[Sequence[Any]]) -> list[float]:
    means: list[float] = np.mean(draws, axis=0).tolist()
    return means
