"""The systems of a comparison, run on one task's questions: base, routed, and its baselines.

Routers read the question alone: one route holds for all of its options, and for the text that it
stands in.

Axes: Q questions, L layers.
"""

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
from drllm.models.scoring.batching import batches
from drllm.paths import Decisions, StaticPath
from drllm.statistics.paired import Outcomes
from drllm.tasks.examples import choose

Answers: TypeAlias = list[list[OptionScore | str]]  # for each question, the answers to its requests
Block: TypeAlias = Sequence[int]  # places of the questions that are asked together

LEAST_SCORED = 64
"""Questions of a block whose options are scored, in whole batches: seconds of work, which hide the
file's writing."""


class Answered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What some questions were answered under all draws of a system; `seconds` is the first's time.

    `routes` has every question's decisions; it is empty where a path can't be expressed.
    """

    answers: list[Answers]
    routes: list[list[Decisions]]
    seconds: float = 0.0


class SystemRun(Outcomes, kw_only=True):
    """One system's outcomes on a task; the mean over draws, or of the first one.

    Of draws `correct` and `gold_logprob` are means, `text_loss` is the first one's; the executions
    are a mean over questions and draws.
    """

    executions: float = 0.0
    correct: Sequence[float] = ()
    setting: str = ""  # its depth in words; empty for the routers as they were trained
    path: StaticPath | None = None
    # For each draw, every question's decisions; empty where a path can't be expressed.
    routes: list[list[Decisions]] = field(default_factory=list)
    # The option chosen or the text generated, of the first draw.
    answers: list[int | str] = field(default_factory=list)
    # Mean scores by all metrics of the harness, by name.
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0  # wall time of the first draw, measured block by block and added up
    # Of answers that are generated, mean a token; None with options.
    decode_executions: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """System and setting."""
        return f"{self.name}, {self.setting}" if self.setting else self.name


Keep: TypeAlias = Callable[[Mapping[str, Callable[[], Answered]]], list[Answered]]
"""Called with what asks each block, by key; returns the answers that were kept under the same key,
else those of now. The key has the decisions: were they others after an interruption, the block
would be asked again."""


class TaskRun:
    """All questions of a task, under one system after another.

    The text's loss is read of `num_texts` of them, drawn with the seed. `num_tokens` are those that
    a system reads and writes at most.
    """

    def __init__(self, lm: RoutedLM, asked: RenderedTask, num_texts: int, seed: int) -> None:
        self.lm = lm
        self.asked = asked
        self._clock = device_clock(lm.device)
        self._requests = asked.requests() if asked.has_options else []
        drawn = choose(range(len(asked.keys)), num_texts, seed)  # as `tune` draws its texts
        self._texts = [asked.text(place) for place in drawn]
        scorer = lm.scorer
        size = scorer.batch_size if isinstance(scorer.batch_size, int) else scorer.max_batch_size
        if asked.has_options:
            lengths = [
                len(requests[0].context) + sum(len(request.continuation) for request in requests)
                for requests in self._requests
            ]
            self._blocks = batches(lengths, size * math.ceil(LEAST_SCORED / size))
            # Whatever the first pass sets up would count as time of the base model.
            scorer.score(self._requests[0], FullPolicy())
        else:
            lengths = list(map(len, asked.prompt_tokens))
            blocks = batches(lengths, size)  # one takes long enough by itself
            prompts = asked.prompts()  # by which the answers of a block are told apart
            self._blocks = [part for block in blocks for part in distinct(block, prompts)]
            new = asked.instances[0][0].args[1].get("max_gen_toks", lm.max_gen_toks)
            lengths = [length + new for length in lengths]
        texts = [[*text.context, *text.continuation] for text in self._texts]
        self.num_tokens = sum(lengths) + sum(map(len, texts))

    def run(self, name: str, drawn: Sequence[BaselineRun], setting: str, keep: Keep) -> SystemRun:
        """Run a system that decides by a policy, a path, or one or more draws of plans."""
        note, decides = drawn[0].note, [self._by_key(each.decides) for each in drawn]
        path = decides[0] if isinstance(decides[0], StaticPath) else None
        plans = [each for each in decides if isinstance(each, Mapping)]

        def decided(block: Block) -> Any:
            return [self._rows(plan, block) for plan in plans] or (path and path.layers) or note

        found = self._by_blocks(keep, decided, lambda block: self._ask(block, decides))
        draws = [self.asked.grade(answers) for answers in found.answers]
        metrics = {
            metric: _mean([[each[metric] for each in draw] for draw in draws])
            for metric in draws[0][0]
        }
        system = SystemRun(
            name=name,
            setting=setting,
            path=path,
            routes=found.routes,
            correct=metrics[self.asked.written.metric],
            answers=[self.asked.answer(*each) for each in enumerate(found.answers[0])],
            metrics=metrics,
            seconds=found.seconds,
            notes=[note] if note else [],
        )
        if self.asked.has_options:
            gold = self.asked.gold_logprob
            golds = [[gold(*each) for each in enumerate(answers)] for answers in found.answers]
            system.gold_logprob = _mean(golds)
        of_texts: Paths | StaticPath
        if path is not None:
            of_texts, system.executions = path, path_executions(path)
        else:
            of_texts = dict(zip(self.asked.keys, found.routes[0], strict=True))
            [system.executions] = _mean([[mean_executions(routes)] for routes in found.routes])
        [texts] = self.lm.scorer.score_plans(self._texts, [of_texts])
        system.text_loss = self._losses(texts)
        if not self.asked.has_options:
            tokens = [
                max(1, len(self.lm.tok_encode(str(answer), add_special_tokens=False)))
                for [answer] in found.answers[0]
            ]
            if path is None:
                system.decode_executions = decode_executions(found.routes[0], tokens)
            elif max(tokens) > 1:
                system.decode_executions = system.executions
        return system

    def texts(self, name: str, drawn: BaselineRun, setting: str, keep: Keep) -> SystemRun:
        """Read the texts of all questions, whose answers are generated, without generating any.

        A policy decides on the questions' prompts, as before an answer is generated.
        """
        decides = self._by_key(drawn.decides)

        def read(block: Block) -> Answered:
            texts = [self._texts[place] for place in block]
            answers, taken = self.lm.scorer.score(texts, decides)
            routes = [[taken[text.question] for text in texts]] if taken else []
            return Answered(answers=[[[answer] for answer in answers]], routes=routes)

        found = self._by_blocks(keep, lambda _: "texts", read)
        system = SystemRun(name=name, setting=setting, routes=found.routes)
        system.text_loss = self._losses([answer for [answer] in found.answers[0]])  # type: ignore[misc]
        return system

    def _by_key(self, decides: Tensor | Policy | StaticPath) -> Decides:
        """Return a plan's rows `[Q, L]` by question; anything else as it is."""
        if not isinstance(decides, Tensor):
            return decides
        return dict(zip(self.asked.keys, map(tuple, decides.tolist()), strict=True))

    def _by_blocks(
        self, keep: Keep, decided: Callable[[Block], Any], ask: Callable[[Block], Answered]
    ) -> Answered:
        asks = {
            f"block {number} {json.dumps(decided(block))}": partial(ask, block)
            for number, block in enumerate(self._blocks)
        }
        return joined(self._blocks, keep(asks))

    def _ask(self, block: Block, draws: Sequence[Decides]) -> Answered:
        """Ask a block's questions under the first draw, which is timed, and under further plans."""
        started = self._clock()
        answered, taken = self._under(block, draws[0])
        seconds = self._clock() - started
        answers, others = [answered], [each for each in draws[1:] if isinstance(each, Mapping)]
        if others and self.asked.has_options:  # what options have in common runs once
            scored = self.lm.scorer.score_plans(self._requests_of(block), others)
            answers += [self._by_question(block, each) for each in scored]
        else:
            answers += [self._under(block, plan)[0] for plan in others]
        taken_first = [] if isinstance(draws[0], StaticPath) else [taken]
        routes = [*taken_first, *(self._rows(plan, block) for plan in others)]
        return Answered(answers=answers, routes=routes, seconds=seconds)

    def _under(self, block: Block, decides: Decides) -> tuple[Answers, list[Decisions]]:
        """Return a block's answers, and the routes that its questions took; none of a path."""
        keys = [self.asked.keys[place] for place in block]
        if self.asked.has_options:
            answers, routes = self.lm.scorer.score(self._requests_of(block), decides)
            return self._by_question(block, answers), [routes[key] for key in keys if routes]
        routed, instances = self.lm.routed, [self.asked.instances[place][0] for place in block]
        prompts = [str(instance.args[0]) for instance in instances]
        key_of = dict(zip(prompts, keys, strict=True))
        if isinstance(decides, StaticPath):
            decides = routed.policy_of(decides)

        def policy_of(asked: Sequence[str]) -> Policy:
            if isinstance(decides, Mapping):
                return FixedPolicy([decides[key_of[each]] for each in asked], routed.num_layers)
            return decides

        self.lm.policy_of = policy_of
        texts = self.lm.generate_until(instances, disable_tqdm=True)
        return [[text] for text in texts], [self.lm.generated_routes[prompt] for prompt in prompts]

    def _rows(self, plan: Plan, block: Block) -> list[Decisions]:
        return [plan[self.asked.keys[place]] for place in block]

    def _requests_of(self, block: Block) -> list[HarnessRequest]:
        return [each for place in block for each in self._requests[place]]

    def _by_question(self, block: Block, answers: Sequence[OptionScore]) -> Answers:
        given = iter(answers)
        found: Answers = []
        for place in block:
            each = [next(given) for _ in self._requests[place]]
            for logprob, _ in each:
                if not math.isfinite(logprob):  # refused before it is kept
                    raise ModelError(
                        f"a log-probability of question {self.asked.ids[place]} is {logprob}; load "
                        f"the model with --dtype float32"
                    )
            found.append([*each])
        return found

    def _losses(self, answers: Sequence[OptionScore]) -> list[float]:
        return [
            -logprob / len(text.continuation)
            for text, (logprob, _) in zip(self._texts, answers, strict=True)
        ]


def distinct(block: Block, prompts: Sequence[str]) -> list[list[int]]:
    """Divide a block so that no part of it has a prompt twice."""
    parts: defaultdict[int, list[int]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for place in block:
        parts[seen[prompts[place]]].append(place)
        seen[prompts[place]] += 1
    return list(parts.values())


def joined(blocks: Sequence[Block], answered: Sequence[Answered]) -> Answered:
    """Return the answers of all blocks as those of all questions, in the questions' order."""
    order = np.argsort([place for block in blocks for place in block])

    def in_order(parts: Sequence[Sequence[list[Any]]]) -> list[list[Any]]:
        draws = [[one for part in draw for one in part] for draw in zip(*parts, strict=True)]
        return [[draw[position] for position in order] for draw in draws]

    return Answered(
        answers=in_order([each.answers for each in answered]),
        routes=in_order([each.routes for each in answered]),
        seconds=sum(each.seconds for each in answered),
    )


def mean_of(systems: Sequence[SystemRun], name: str) -> SystemRun:
    """Return the mean outcomes of systems on the same questions."""

    def mean(values: Sequence[Any]) -> Any:
        return np.mean(values, axis=0).tolist()

    metrics = {key: mean([each.metrics[key] for each in systems]) for key in systems[0].metrics}
    names = ("correct", "gold_logprob", "text_loss", "seconds", "executions")
    means = {each: mean([getattr(system, each) for system in systems]) for each in names}
    return SystemRun(name=name, metrics=metrics, **means)


def _mean(draws: Sequence[Sequence[Any]]) -> list[float]:
    found: list[float] = np.mean(draws, axis=0).tolist()
    return found
