"""Runs the systems of a comparison on one task's questions: base, routed, baselines and paths.

A place is the index of a question in the task. A draw is one way in which a system decides on all
questions. Most systems have one draw, and baselines with random decisions have several.

Routers read only the question. So all options of a question have the same route. The next-token
loss is measured on texts that begin with the question, which have the question's route too.

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
from drllm.models.base.batching import group_by_length
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy
from drllm.paths import Decisions, StaticPath
from drllm.statistics.paired import Outcomes
from drllm.tasks.examples import choose

Answers: TypeAlias = list[list[OptionScore | str]]
"""For each question the score of each option, or a list with the generated answer alone."""
Block: TypeAlias = Sequence[int]  # places of the questions that are run together

MIN_BLOCK_SIZE = 64
"""The fewest questions in a block, if options are scored. Scoring them takes seconds, so the time
to write the block's file hardly counts."""


class BatchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answers of a system to some questions under all of its draws.

    Attributes:
        answers: For each draw the answers to the questions.
        routes: For each draw the questions' decisions; empty for a static path.
        seconds: Wall time of the first draw.
    """

    answers: list[Answers]
    routes: list[list[Decisions]]
    seconds: float = 0.0


class SystemRun(Outcomes, kw_only=True):
    """One system's outcomes on a task.

    If there are several draws, `correct`, `gold_logprob`, `metrics` and `executions` are means over
    them. `text_loss`, `answers`, `seconds` and `decode_executions` come from the first draw.

    Attributes:
        setting: The depth in words; empty for the depth of training.
        path: The static path that the system runs; None for other systems.
        routes: For each draw the questions' decisions; empty for a static path.
        answers: The chosen options, or the generated texts.
        metrics: Name of a metric of the harness → each question's score.
        seconds: Wall time, added up over the blocks.
        decode_executions: Mean executions for a generated token. None if options are scored, or if
            no answer is longer than one token.
        notes: What a reader must know about the system, as parts of sentences.
    """

    executions: float = 0.0
    correct: Sequence[float] = ()
    setting: str = ""
    path: StaticPath | None = None
    routes: list[list[Decisions]] = field(default_factory=list)
    answers: list[int | str] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    decode_executions: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The system's name with its setting."""
        if not self.setting:
            return self.name
        return f"{self.name}, {self.setting}"


KeepBlocks: TypeAlias = Callable[[Mapping[str, Callable[[], BatchResult]]], list[BatchResult]]
"""Runs blocks and stores their results. It takes a function for each block by key, and returns the
blocks' results. If a result was stored under the same key before an interruption, it is read, and
the function isn't called. Keys contain decisions, so a block runs again if its decisions changed.
"""


class TaskRunner:
    """Runs one system after another on all questions of a task.

    Args:
        lm: The model.
        harness_task: The task's questions.
        num_texts: Number of questions on whose texts the next-token loss is measured too.
        seed: Seed with which these questions are drawn.

    Attributes:
        num_tokens: The largest number of tokens that a system reads and writes.
    """

    def __init__(self, lm: RoutedLM, harness_task: RenderedTask, num_texts: int, seed: int) -> None:
        self.lm = lm
        self.harness_task = harness_task
        self._clock = device_clock(lm.device)
        self._requests: list[list[HarnessRequest]] = []  # by question
        if harness_task.has_options:
            self._requests = harness_task.requests()
        self._texts = self._draw_texts(num_texts, seed)
        lengths = self._question_lengths()
        text_lengths = [len(text.context) + len(text.continuation) for text in self._texts]
        self.num_tokens = sum(lengths) + sum(text_lengths)
        self._blocks: list[Block] = self._divide(lengths)
        if harness_task.has_options:
            # A first pass, so that the time for setting up isn't counted for the base model.
            lm.scorer.score(self._requests[0], FullPolicy())

    def _draw_texts(self, num_texts: int, seed: int) -> list[HarnessRequest]:
        """Draw the texts to measure the next-token loss on, in the same way as `tune`."""
        places = choose(range(len(self.harness_task.keys)), num_texts, seed)
        return [self.harness_task.text(place) for place in places]

    def _question_lengths(self) -> list[int]:
        """Return how many tokens each question reads and writes at most."""
        if self.harness_task.has_options:
            lengths = []
            for requests in self._requests:
                option_lengths = [len(request.continuation) for request in requests]
                lengths.append(len(requests[0].context) + sum(option_lengths))
            return lengths
        settings = self.harness_task.instances[0][0].args[1]
        num_new = settings.get("max_gen_toks", self.lm.max_gen_toks)
        return [len(tokens) + num_new for tokens in self.harness_task.prompt_tokens]

    def _divide(self, lengths: Sequence[int]) -> list[Block]:
        """Divide the questions into blocks of similar length."""
        scorer = self.lm.scorer
        batch_size = scorer.max_batch_size
        if isinstance(scorer.batch_size, int):
            batch_size = scorer.batch_size
        if self.harness_task.has_options:
            batches_a_block = math.ceil(MIN_BLOCK_SIZE / batch_size)
            return list(group_by_length(lengths, batch_size * batches_a_block))
        # Generating takes longer than scoring, so each batch is a block. The routes of a block are
        # found by prompt, so a prompt may occur only once in a block.
        prompts = self.harness_task.prompts()
        blocks: list[Block] = []
        for batch in group_by_length(lengths, batch_size):
            blocks += separate_repeats(batch, prompts)
        return blocks

    def run(
        self, name: str, draws: Sequence[BaselineRun], setting: str, keep: KeepBlocks
    ) -> SystemRun:
        """Run a system on all questions and texts.

        Args:
            name: The system's name.
            draws: How the system decides in each draw. A system with several draws has decisions
                for each question in all of them.
            setting: The depth in words; empty for the depth of training.
            keep: Runs blocks and stores their results.
        """
        note = draws[0].note
        decides = [self._name_questions(draw.decides) for draw in draws]
        result = self._run_blocks(keep, decides, note)
        system = SystemRun(name=name, setting=setting, routes=result.routes, seconds=result.seconds)
        if isinstance(decides[0], StaticPath):
            system.path = decides[0]
        if note:
            system.notes.append(note)
        self._add_grades(system, result)
        self._add_executions(system)
        self._add_text_loss(system)
        if not self.harness_task.has_options:
            system.decode_executions = self._decode_executions(system, result)
        return system

    def _add_grades(self, system: SystemRun, result: BatchResult) -> None:
        """Let the harness grade a system's answers, and set the scores and the answers."""
        harness_task = self.harness_task
        grades_by_draw = [harness_task.grade(answers) for answers in result.answers]
        for metric in grades_by_draw[0][0]:
            scores_by_draw = []
            for question_grades in grades_by_draw:
                scores = [grades[metric] for grades in question_grades]
                scores_by_draw.append(scores)
            system.metrics[metric] = _mean_over_draws(scores_by_draw)
        system.correct = system.metrics[harness_task.task.metric]
        for place, answers in enumerate(result.answers[0]):
            system.answers.append(harness_task.answer(place, answers))
        if harness_task.has_options:
            logprobs_by_draw = [self._gold_logprobs(answers) for answers in result.answers]
            system.gold_logprob = _mean_over_draws(logprobs_by_draw)

    def _gold_logprobs(self, answers: Answers) -> list[float]:
        """Return the log-probability of each question's gold option among its options."""
        gold_logprob = self.harness_task.gold_logprob
        return [gold_logprob(place, scores) for place, scores in enumerate(answers)]

    def _add_executions(self, system: SystemRun) -> None:
        """Set the mean executions over questions and draws."""
        if system.path is not None:
            system.executions = path_executions(system.path)
            return
        by_draw = [[mean_executions(routes)] for routes in system.routes]
        [system.executions] = _mean_over_draws(by_draw)

    def _add_text_loss(self, system: SystemRun) -> None:
        """Measure the next-token loss of each text, in nats a token, in the first draw."""
        plan: Paths | StaticPath
        if system.path is not None:
            plan = system.path
        else:
            plan = dict(zip(self.harness_task.keys, system.routes[0], strict=True))
        [scores] = self.lm.scorer.score_plans(self._texts, [plan])
        losses = []
        for text, (logprob, _) in zip(self._texts, scores, strict=True):
            losses.append(-logprob / len(text.continuation))
        system.text_loss = losses

    def _decode_executions(self, system: SystemRun, result: BatchResult) -> float | None:
        """Return the mean executions for a generated token, in the first draw."""
        num_tokens = []
        for [answer] in result.answers[0]:
            tokens = self.lm.tok_encode(str(answer), add_special_tokens=False)
            num_tokens.append(max(1, len(tokens)))
        if system.path is None:
            return decode_executions(result.routes[0], num_tokens)
        if max(num_tokens) == 1:  # the pass that reads the prompt gives this token
            return None
        return system.executions

    def _name_questions(self, decides: Tensor | Policy | StaticPath) -> Decides:
        """Turn decisions `[Q, L]` into a plan by question; return a policy or a path unchanged."""
        if not isinstance(decides, Tensor):
            return decides
        return dict(zip(self.harness_task.keys, map(tuple, decides.tolist()), strict=True))

    def _run_blocks(self, keep: KeepBlocks, draws: Sequence[Decides], note: str) -> BatchResult:
        """Run all blocks under all draws; return the results in the questions' order."""
        calls = {}
        for number, block in enumerate(self._blocks):
            key = f"block {number} {json.dumps(self._decisions_key(block, draws, note))}"
            calls[key] = partial(self._run_block, block, draws)
        return join_blocks(self._blocks, keep(calls))

    def _decisions_key(self, block: Block, draws: Sequence[Decides], note: str) -> Any:
        """Return a key of a block's decisions: the decisions, the path's layers, or the note.

        A policy decides only when the block runs. The note of a baseline that has a policy contains
        the policy's setting.
        """
        decisions = [
            self._list_decisions(draw, block) for draw in draws if isinstance(draw, Mapping)
        ]
        if decisions:
            return decisions
        if isinstance(draws[0], StaticPath):
            return draws[0].layers
        return note

    def _run_block(self, block: Block, draws: Sequence[Decides]) -> BatchResult:
        """Run a block's questions under all draws; only the first draw is timed."""
        started = self._clock()
        first_answers, first_routes = self._run_draw(block, draws[0])
        seconds = self._clock() - started
        answers = [first_answers]
        routes = []
        if not isinstance(draws[0], StaticPath):
            routes.append(first_routes)
        plans = [draw for draw in draws[1:] if isinstance(draw, Mapping)]
        if plans:
            answers += self._run_plans(block, plans)
            routes += [self._list_decisions(plan, block) for plan in plans]
        return BatchResult(answers=answers, routes=routes, seconds=seconds)

    def _run_plans(self, block: Block, plans: Sequence[Plan]) -> list[Answers]:
        """Return a block's answers under each plan."""
        if self.harness_task.has_options:  # layers that begin several plans run once for all
            scores = self.lm.scorer.score_plans(self._list_requests(block), plans)
            return [self._group_by_question(block, plan_scores) for plan_scores in scores]
        answers = []
        for plan in plans:
            plan_answers, _ = self._run_draw(block, plan)
            answers.append(plan_answers)
        return answers

    def _run_draw(self, block: Block, decides: Decides) -> tuple[Answers, list[Decisions]]:
        """Return a block's answers and the questions' routes under one draw.

        For a static path the routes are to be ignored.
        """
        if not self.harness_task.has_options:
            return self._generate(block, decides)
        scores, routes_by_key = self.lm.scorer.score(self._list_requests(block), decides)
        routes: list[Decisions] = []
        if not isinstance(decides, StaticPath):
            routes = self._list_decisions(routes_by_key, block)
        return self._group_by_question(block, scores), routes

    def _generate(self, block: Block, decides: Decides) -> tuple[Answers, list[Decisions]]:
        """Generate a block's answers; return them and the questions' routes."""
        routed = self.lm.routed
        instances = [self.harness_task.instances[place][0] for place in block]
        prompts = [str(instance.args[0]) for instance in instances]
        keys = [self.harness_task.keys[place] for place in block]
        key_by_prompt = dict(zip(prompts, keys, strict=True))
        if isinstance(decides, StaticPath):
            decides = routed.build_policy(decides)

        def make_policy(batch: Sequence[str]) -> Policy:
            if not isinstance(decides, Mapping):
                return decides
            decisions = [decides[key_by_prompt[prompt]] for prompt in batch]
            return FixedPolicy(decisions, routed.num_layers)

        self.lm.choose_policy = make_policy
        texts = self.lm.generate_until(instances, disable_tqdm=True)
        answers: Answers = [[text] for text in texts]
        return answers, [self.lm.generated_routes[prompt] for prompt in prompts]

    def _list_decisions(self, plan: Plan, block: Block) -> list[Decisions]:
        """Return a plan's decisions on the questions of a block."""
        return [plan[self.harness_task.keys[place]] for place in block]

    def _list_requests(self, block: Block) -> list[HarnessRequest]:
        """Return the requests of a block's questions, one question after another."""
        requests: list[HarnessRequest] = []
        for place in block:
            requests += self._requests[place]
        return requests

    def _group_by_question(self, block: Block, scores: Sequence[OptionScore]) -> Answers:
        """Group the scores of a block's requests by question; refuse scores that aren't finite."""
        by_question: Answers = []
        start = 0
        for place in block:
            end = start + len(self._requests[place])
            for logprob, _ in scores[start:end]:
                if not math.isfinite(logprob):  # refused here, before the block's result is stored
                    raise ModelError(
                        f"a log-probability of question {self.harness_task.ids[place]} is "
                        f"{logprob}; load the model with --dtype float32"
                    )
            by_question.append([*scores[start:end]])
            start = end
        return by_question


def separate_repeats(block: Block, prompts: Sequence[str]) -> list[list[int]]:
    """Divide a block into parts in which no prompt occurs twice.

    Args:
        block: The places of the block's questions.
        prompts: The prompts of all questions.
    """
    parts: defaultdict[int, list[int]] = defaultdict(list)
    num_seen: Counter[str] = Counter()
    for place in block:
        prompt = prompts[place]
        # The second question with a prompt belongs to the second part, and so on.
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
    """Join values `[block][draw][question]` to `[draw][question]`, in the questions' order.

    Args:
        places: The places of the blocks' questions, one block after another.
        parts: The values of each block.
    """
    draws = []
    for blocks in zip(*parts, strict=True):  # the values of one draw, block by block
        values: list[Any] = [None] * len(places)
        for place, value in zip(places, itertools.chain(*blocks), strict=True):
            values[place] = value
        draws.append(values)
    return draws


def average_runs(systems: Sequence[SystemRun], name: str) -> SystemRun:
    """Return the mean outcomes of several systems on the same questions, such as those of seeds."""
    means: dict[str, Any] = {}
    for quantity in ("correct", "gold_logprob", "text_loss", "seconds", "executions"):
        values = [getattr(system, quantity) for system in systems]
        means[quantity] = np.mean(values, axis=0).tolist()
    metrics = {}
    for metric in systems[0].metrics:
        metrics[metric] = _mean_over_draws([system.metrics[metric] for system in systems])
    return SystemRun(name=name, metrics=metrics, **means)


def _mean_over_draws(draws: Sequence[Sequence[float]]) -> list[float]:
    """Average values `[draw][question]` over the draws; return a mean for each question."""
    means: list[float] = np.mean(draws, axis=0).tolist()
    return means
