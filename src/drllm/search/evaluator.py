"""What a path is worth on a question: reward, margin and answer, for many questions at once.

The forward passes and their shared prefixes are in `models.scoring`, the rewards in
`tasks.rewards`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from drllm.errors import ModelError
from drllm.models.base.prompts import context_length, encode, encode_continuation, render
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Request
from drllm.models.scoring.prefix_sharing import Pair
from drllm.tasks.base import KL_REWARD, Prompt
from drllm.tasks.rewards import reward_of, score_choices, verdict

WRONG_ANSWERS = 4
"""Wrong answers, the most frequent ones, that a right answer's margin is measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one path fared on one question; see `TriedPath`."""

    reward: float  # in [0, 1]
    margin: float | None  # in nats, positive when right; None where it isn't known (yet)
    # Each option's, in nats; empty where one isn't finite, and of generated answers.
    logprobs: tuple[float, ...]
    answer: str | None = None  # what was generated; None when choices were scored
    tokens: tuple[int, ...] = ()  # those of the answer, without the end-of-sequence token
    # Mean log-probability of the answer's tokens (with the end of sequence), in nats; None when
    # choices were scored, and where it isn't finite.
    logprob: float | None = None
    kl: float | None = None  # in nats a token; None where it wasn't asked for or isn't finite


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the model reads it: with the chat template, where it is sent through one."""

    prompt: Prompt
    text: str
    tokens: list[int]
    continuations: list[list[int]]  # the options; the right answer where one is generated
    num_unscored: tuple[int, ...]  # of each, the tokens that aren't scored; empty for none

    @property
    def question(self) -> Request:
        """What is scored; where the prompt's own tokens are all that is looked at, any token."""
        behind = [self.tokens[-1:]] if self.prompt.reward == KL_REWARD else self.continuations
        return Request(self.tokens, behind, self.num_unscored)


def read(routed: RoutedModel, prompt: Prompt) -> Reading:
    """Render and tokenise a prompt, with what may follow it.

    A ModelError where it, with the longest of what may follow, is beyond the model's context: some
    models fail there, others go on at positions that they have never learned.
    """
    text = render(routed.tokenizer, prompt.asked, chat=prompt.chat)
    tokens = encode(routed.tokenizer, text)
    behind = partial(encode_continuation, routed.tokenizer, text)
    continuations = [behind(each) for each in prompt.continuations or (gold_text(prompt),)]
    num_unscored = tuple(len(behind(each)) for each in prompt.unscored)
    generated = 0 if prompt.continuations else prompt.max_new_tokens
    longest = max(generated, *map(len, continuations))
    context = context_length(routed.model)
    if context is not None and len(tokens) + longest > context:
        raise ModelError(
            f"a prompt of the question has {len(tokens)} tokens, and up to {longest} follow; the "
            f"model's context holds {context}; shorten the question or leave it out"
        )
    return Reading(prompt, text, tokens, continuations, num_unscored)


def gold_text(prompt: Prompt) -> str:
    """Return the gold answer as the model would write it right after the prompt."""
    answer = reward_of(prompt).gold_text(prompt)
    return answer if prompt.chat else f" {answer}"


def outcome_of(logprobs: tuple[float, ...], prompt: Prompt, kl: float | None = None) -> Outcome:
    """Judge the log-probabilities of a prompt's options; without any the path is wrong."""
    if prompt.reward == KL_REWARD:
        worth = 0.0 if kl is None else math.exp(-kl) / 2  # 1 would be right
        return Outcome(reward=worth, margin=None, logprobs=(), kl=kl)
    reward, margin = score_choices(logprobs, prompt) if logprobs else (0.0, None)
    return Outcome(reward=reward, margin=margin, logprobs=logprobs, kl=kl)


class Evaluator:
    """Evaluates paths on a fixed batch of prompts, remembering what paths have in common.

    The prompts, all of one reward, may be read already. What comes out doesn't depend on
    `state_cache_gb` and `paths_per_pass` (see `ChoiceBatch`). With `kl` each path's KL is measured:
    0 for the full path, which is run with the others of its prompt if it wasn't before.
    """

    def __init__(
        self,
        routed: RoutedModel,
        prompts: Sequence[Prompt | Reading],
        state_cache_gb: float | None,
        *,
        kl: bool = False,
        paths_per_pass: int | None = None,
    ) -> None:
        self.readings = [p if isinstance(p, Reading) else read(routed, p) for p in prompts]
        self.routed = routed
        self.kl = kl
        self._choices = partial(
            ChoiceBatch, routed, state_cache_gb=state_cache_gb, paths_per_pass=paths_per_pass
        )
        self._batch: ChoiceBatch | AnswerBatch
        if reward_of(self.readings[0].prompt).scores_options:
            self._batch = self._choices([reading.question for reading in self.readings])
        else:
            contexts = [reading.tokens for reading in self.readings]
            self._batch = AnswerBatch(
                routed, routed.tokenizer, contexts, state_cache_gb, paths_per_pass=paths_per_pass
            )
        self.states = self._batch.states

    @property
    def scores_options(self) -> bool:
        """Whether margins are known at once; those of generated answers need `with_margins`."""
        return isinstance(self._batch, ChoiceBatch)

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcome of each path on its prompt, in order.

        Margins of generated answers are None: they compare with what other paths answered, so
        `with_margins` adds them when all paths are known. Log-probabilities of the full path itself
        that aren't finite are a ModelError.
        """
        if isinstance(self._batch, ChoiceBatch):
            outcomes = []
            for pair, score in zip(pairs, self._batch.scores(pairs, kl=self.kl), strict=True):
                logprobs = score.logprobs if self._is_finite(pair, score.logprobs) else ()
                prompt = self.readings[pair[0]].prompt
                outcomes.append(outcome_of(logprobs, prompt, score.kl))
            return outcomes
        prompts = [self.readings[place].prompt for place, _ in pairs]
        answers = self._batch.answers(
            pairs,
            [prompt.max_new_tokens for prompt in prompts],
            lambda pair, text, finished: verdict(prompts[pair], text, finished),
            kl=self.kl,
        )
        return [
            Outcome(
                reward=answer.grade,
                margin=None,
                logprobs=(),
                answer=answer.text,
                tokens=answer.tokens,
                logprob=answer.logprob if self._is_finite(pair, [answer.logprob]) else None,
                kl=answer.kl,
            )
            for pair, answer in zip(pairs, answers, strict=True)
        ]

    def with_margins(
        self, pairs: Sequence[Pair], outcomes: Sequence[Outcome], *, so_far: bool = False
    ) -> list[Outcome]:
        """Return the outcomes of all paths of the batch with their margins; known ones stay.

        For a generated answer the margin is the mean token log-probability of the gold answer
        minus that of the path's own answer if that is wrong, else that of the best of the most
        frequent wrong answers to the question; None where nobody answered wrong, or where there is
        no gold answer, since a function grades. `so_far` leaves out those of right answers, which
        paths to come may change; the others are best taken now, while the states are there.
        """
        has_gold = all(reading.continuations[0] for reading in self.readings)
        if isinstance(self._batch, ChoiceBatch) or not has_gold:
            return list(outcomes)
        wrong: list[Counter[tuple[int, ...]]] = [Counter() for _ in self.readings]
        for (place, _), outcome in zip(pairs, outcomes, strict=True):
            if outcome.reward < 1 and outcome.tokens:
                wrong[place][outcome.tokens] += 1
        completed = list(outcomes)
        without = [n for n, each in enumerate(outcomes) if each.margin is None]
        kinds = {outcomes[n].reward >= 1 for n in without}
        for is_right in kinds - {True} if so_far else kinds:  # a wrong path needs no rivals
            chosen = [n for n in without if (outcomes[n].reward >= 1) == is_right]
            most = WRONG_ANSWERS if is_right else 0
            rivals = [[tokens for tokens, _ in given.most_common(most)] for given in wrong]
            questions = [
                Request(reading.tokens, [*reading.continuations, *tokens])
                for reading, tokens in zip(self.readings, rivals, strict=True)
            ]
            batch = self._choices(questions, contexts=self._batch.rows)
            scores = batch.logprobs([pairs[number] for number in chosen])
            for number, sums in zip(chosen, scores, strict=True):
                continuations = questions[pairs[number][0]].continuations
                gold, *others = (s / len(c) for s, c in zip(sums, continuations, strict=True))
                own = max(others, default=None) if is_right else outcomes[number].logprob
                margin = None if own is None or not math.isfinite(gold - own) else gold - own
                completed[number] = dataclasses.replace(outcomes[number], margin=margin)
        return completed

    def forget(self) -> None:
        """Give up all shared states."""
        self._batch.forget()

    def _is_finite(self, pair: Pair, logprobs: Sequence[float]) -> bool:
        """Say whether a path's numbers can be judged; nothing can where the full path overflows."""
        place, decisions = pair
        if all(math.isfinite(value) for value in logprobs):
            return True
        if set(decisions) == {1}:
            raise ModelError(
                f"the base model's own log-probabilities are not finite on "
                f"{self.readings[place].text!r}; load it with --dtype float32"
            )
        return False
