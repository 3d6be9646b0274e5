"""What a path is worth on a question: reward, margin and answer, for a block of questions at once.

Owns the step from a task's `Prompt` to an `Outcome`. Leaves the forward passes and their shared
prefixes to `models.scoring`, the grading rules to `tasks.grading`, and which paths are tried to
the strategies.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.errors import ModelError
from drllm.models.base.prompts import context_length, encode, encode_continuation, render
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.answers import Answer, AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch, Score, tokenised
from drllm.models.scoring.packing import Question
from drllm.models.scoring.prefix_cache import PrefixCache
from drllm.models.scoring.prefix_sharing import Pair
from drllm.tasks.base import Prompt
from drllm.tasks.grading import score_choices, verdict

WRONG_ANSWERS = 4
"""Wrong answers, the most frequent ones, that a right answer's margin is measured against."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one path fared on one question.

    Attributes:
        reward: In [0, 1].
        margin: In nats, positive when right; None where it isn't known (yet).
        answer: What was generated; None when choices were scored.
        kl: Mean KL divergence from the full path's next-token distributions to the path's,
            over the prompt's tokens, in nats a token; None where it wasn't asked for or isn't
            finite.
    """

    reward: float
    margin: float | None
    answer: Answer | None = None
    kl: float | None = None


class BlockEvaluator:
    """Evaluates paths on a fixed block of prompts, remembering what paths have in common.

    Args:
        routed: The model, with its tokenizer.
        prompts: All of one reward.
        state_cache_gb: Most memory for shared states, in GB. States that a pass needs and the
            full path's distributions count too; more than this is held only while a single pass
            needs more.
        kl: Measure each path's KL. It is 0 for the full path, which is run with the
            others of its prompt if it wasn't before.
        paths_per_pass: Most paths in a forward pass; None picks it by the memory that is free.
            Where memory runs out, half as many are tried. What comes out doesn't depend on it.
    """

    def __init__(
        self,
        routed: RoutedModel,
        prompts: Sequence[Prompt],
        state_cache_gb: float,
        *,
        kl: bool = False,
        paths_per_pass: int | None = None,
    ) -> None:
        self.routed = routed
        self.prompts = list(prompts)
        self.kl = kl
        self._state_cache_gb = state_cache_gb
        self._paths_per_pass = paths_per_pass
        self._texts = [render(routed.tokenizer, p.text, chat=p.chat) for p in self.prompts]
        self._contexts = [encode(routed.tokenizer, text) for text in self._texts]
        self._choices: ChoiceBatch | None = None
        self._answers: AnswerBatch | None = None
        if self.prompts[0].reward == "loglikelihood":
            choices = [
                tokenised(routed.tokenizer, text, p.continuations)
                for text, p in zip(self._texts, self.prompts, strict=True)
            ]
            self._choices = ChoiceBatch(
                routed, choices, state_cache_gb, paths_per_pass=paths_per_pass
            )
        else:
            self._answers = AnswerBatch(
                routed,
                routed.tokenizer,
                self._contexts,
                state_cache_gb,
                paths_per_pass=paths_per_pass,
            )

    @property
    def texts(self) -> list[str]:
        """What the model reads of each prompt."""
        return self._texts

    @property
    def states(self) -> PrefixCache:
        """The shared states, with the count of executions run and asked for."""
        batch = self._choices or self._answers
        assert batch is not None
        return batch.states

    def num_tokens(self, place: int) -> int:
        """Return how many tokens the model reads of a prompt and its continuations."""
        behind = 0 if self._choices is None else self._choices.questions[place].num_after
        return len(self._contexts[place]) + behind

    def reads_the_same(self, prompts: Sequence[Prompt]) -> bool:
        """Whether other prompts put the same tokens before the model, and only judge otherwise."""
        return [(p.text, p.continuations) for p in prompts] == [
            (p.text, p.continuations) for p in self.prompts
        ]

    def judged_as(self, prompts: Sequence[Prompt]) -> BlockEvaluator:
        """Return this evaluator, its known states included, with another way of judging.

        It measures no KL: that doesn't depend on how a path is judged.

        Raises:
            ValueError: The prompts read differently.
        """
        if not self.reads_the_same(prompts):
            raise ValueError("the prompts differ in what the model reads")
        other = copy.copy(self)
        other.prompts = list(prompts)
        other.kl = False
        return other

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcome of each path on its prompt.

        Args:
            pairs: Prompt's place in the block, and decisions.

        Returns:
            Outcomes in order. Margins of generated answers are None: they compare with what other
            paths answered, so `with_margins` adds them when all paths are known.
        """
        if self._choices is not None:
            scores = self._choices.scores(pairs, kl=self.kl)
            return [self._judged(pair, score) for pair, score in zip(pairs, scores, strict=True)]
        assert self._answers is not None
        answers = self._answers.answers(
            pairs,
            [self.prompts[place].max_new_tokens for place, _ in pairs],
            lambda pair, text, finished: verdict(self.prompts[pairs[pair][0]], text, finished),
            kl=self.kl,
        )
        for pair, answer in zip(pairs, answers, strict=True):
            self._check_finite(pair, [answer.logprob])
        return [Outcome(answer.grade, None, answer, answer.kl) for answer in answers]

    def with_margins(self, pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes of all paths of the block with their margins.

        For a generated answer the margin is the mean token log-probability of the gold answer
        minus that of the path's own answer if that is wrong, else that of the best of the most
        frequent wrong answers to the question; None where nobody answered wrong.
        """
        if self._answers is None:
            return list(outcomes)
        wrong: dict[int, Counter[tuple[int, ...]]] = {}
        for (place, _), outcome in zip(pairs, outcomes, strict=True):
            if outcome.reward < 1 and outcome.answer is not None and outcome.answer.tokens:
                wrong.setdefault(place, Counter())[outcome.answer.tokens] += 1
        rivals = {
            place: [tokens for tokens, _ in counts.most_common(WRONG_ANSWERS)]
            for place, counts in wrong.items()
        }
        questions = [
            Question(
                context,
                [
                    encode_continuation(self.routed.tokenizer, text, gold_text(prompt)),
                    *rivals.get(place, []),
                ],
            )
            for place, (context, text, prompt) in enumerate(
                zip(self._contexts, self._texts, self.prompts, strict=True)
            )
        ]
        batch = ChoiceBatch(
            self.routed,
            questions,
            self._state_cache_gb,
            paths_per_pass=self._paths_per_pass,
            contexts=self._answers.rows,
        )
        completed = []
        scores = batch.logprobs(pairs)
        for (place, _), outcome, sums in zip(pairs, outcomes, scores, strict=True):
            continuations = questions[place].continuations
            means = [s / len(c) for s, c in zip(sums, continuations, strict=True)]
            margin: float | None
            if outcome.reward < 1 and outcome.answer is not None:
                margin = means[0] - outcome.answer.logprob
            else:
                margin = means[0] - max(means[1:]) if means[1:] else None
            if margin is not None and not math.isfinite(margin):
                margin = None
            completed.append(dataclasses.replace(outcome, margin=margin))
        return completed

    def _judged(self, pair: Pair, score: Score) -> Outcome:
        if not self._check_finite(pair, score.logprobs):
            return Outcome(0.0, None, kl=score.kl)
        reward, margin = score_choices(score.logprobs, self.prompts[pair[0]])
        return Outcome(reward, margin, kl=score.kl)

    def _check_finite(self, pair: Pair, logprobs: Sequence[float]) -> bool:
        """Say whether a path's numbers can be judged; one that overflows has no answer.

        Raises:
            ModelError: The full path itself overflows, so that nothing can be compared with it.
        """
        place, decisions = pair
        if all(math.isfinite(value) for value in logprobs):
            return True
        if set(decisions) == {1}:
            raise ModelError(
                f"the base model's own log-probabilities are not finite on {self.texts[place]!r}; "
                f"load it with --dtype float32"
            )
        return False

    def forget(self) -> None:
        """Give up all shared states."""
        batch = self._choices or self._answers
        assert batch is not None
        batch.forget()


def check_fits(routed: RoutedModel, prompt: Prompt) -> None:
    """Refuse a prompt that, with the longest of what may follow it, is beyond the model's context.

    Some models fail there; others go on, at positions that they have never learned.

    Args:
        routed: The model, with its tokenizer.
        prompt: With its continuations; an answer that is generated may be as long as the prompt
            allows, and the gold answer is scored behind the prompt too.

    Raises:
        ModelError: Naming the tokens and the context.
    """
    context = context_length(routed.model)
    if context is None:
        return
    text = render(routed.tokenizer, prompt.text, chat=prompt.chat)
    num_tokens = len(encode(routed.tokenizer, text))
    texts = [text + each for each in prompt.continuations or (gold_text(prompt),)]
    num_behind = max(len(encode(routed.tokenizer, each)) for each in texts) - num_tokens
    if not prompt.continuations:
        num_behind = max(num_behind, prompt.max_new_tokens)
    if num_tokens + num_behind > context:
        raise ModelError(
            f"a prompt of the question has {num_tokens} tokens, and up to {num_behind} follow; the "
            f"model's context holds {context}; shorten the question or leave it out"
        )


def gold_text(prompt: Prompt) -> str:
    """Return the gold answer as the model would write it right behind the prompt."""
    answer = f"\\boxed{{{prompt.answer}}}" if prompt.reward == "boxed" else prompt.answer
    return answer if prompt.chat else f" {answer}"
