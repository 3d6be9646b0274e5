"""Evaluate many paths on many questions: `Evaluator` returns the `JudgedOutcome` of each path.

`models.scoring` runs the model and `tasks.rewards` grades the answers. This module joins them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from drllm.errors import ModelError, TaskError
from drllm.model.load import BaseModel
from drllm.model.prompts import context_length, encode, encode_continuation, render
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import Pair
from drllm.models.scoring.score import Outcome, Request, Scorer
from drllm.paths import full_decisions
from drllm.tasks.examples import KL_REWARD, Prompt
from drllm.tasks.rewards import get_reward, score_choices, verdict

MAX_RIVALS = 4
"""Maximum number of rivals of a right answer: the question's most frequent wrong answers."""
CHARACTERS_A_TOKEN = 16
"""A text with more characters than this per token of the context is probably too long.

Its beginning is tokenised first to check this, since tokenising megabytes takes minutes."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedOutcome(Outcome):
    """The outcome of a path on a question, judged by the question's reward.

    Log-probabilities that aren't finite are left out: `logprobs` is then empty, and `logprob` None.

    Attributes:
        reward: In [0, 1]; 1 is a right answer. The reward of a generated answer is its grade.
        margin: How much likelier the right answer is than a wrong answer, in nats. None if unknown.
            For a generated answer also None until `with_margins` adds it.
    """

    reward: float
    margin: float | None

    @property
    def is_right(self) -> bool:
        """Whether the path answered right."""
        return self.reward >= 1


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the model reads it.

    Attributes:
        prompt: The prompt.
        text: Its text, rendered with the chat template if the prompt uses one.
        tokens: The tokens of the text.
        continuations: Tokens of each option; tokens of the gold answer if an answer is generated.
        num_unscored: For each option, how many of its first tokens are read but not scored; see
            `Prompt.unscored`.
    """

    prompt: Prompt
    text: str
    tokens: list[int]
    continuations: list[list[int]]
    num_unscored: tuple[int, ...]

    @property
    def request(self) -> Request:
        """What is scored: the prompt's options, or an answer that is generated and graded.

        For the reward `kl` only the prompt's tokens count. Its last token is scored as a
        continuation, which shows whether log-probabilities are finite.
        """
        if not get_reward(self.prompt).scores_options:
            return Request(
                self.tokens,
                max_new_tokens=self.prompt.max_new_tokens,
                grader=partial(verdict, self.prompt),
            )
        continuations = self.continuations
        if self.prompt.reward == KL_REWARD:
            continuations = [self.tokens[-1:]]
        return Request(self.tokens, continuations, self.num_unscored)


def tokenize_prompt(model: RoutedModel | BaseModel, prompt: Prompt) -> TokenizedPrompt:
    """Render and tokenise a prompt and its continuations; the model's weights aren't needed.

    Raises:
        ModelError: The prompt and its longest continuation don't fit the model's context. Beyond
            the context some models fail, and others run at positions that they were never trained
            on.
        TaskError: The model would read nothing before the continuations.
    """
    tokenizer = model.tokenizer
    context = context_length(model.model)
    text = render(tokenizer, prompt.content, chat=prompt.chat)
    if context is not None:
        _refuse_overlong(tokenizer, text, context)
    tokens = encode(tokenizer, text)
    is_generated = not prompt.continuations
    continuation_texts = prompt.continuations
    if is_generated:
        continuation_texts = (gold_text(prompt, tokenizer),)
    if not text.strip():
        raise TaskError(
            f"a prompt of the question is {text!r}, so the model reads nothing before "
            f"{continuation_texts[0]!r}; put text before it, or leave the question out"
        )
    continuations = [
        encode_continuation(tokenizer, text, continuation) for continuation in continuation_texts
    ]
    num_unscored = tuple(
        len(encode_continuation(tokenizer, text, beginning)) for beginning in prompt.unscored
    )
    longest = max(len(continuation) for continuation in continuations)
    if is_generated:
        longest = max(longest, prompt.max_new_tokens)
    if context is not None and len(tokens) + longest > context:
        raise ModelError(
            f"a prompt of the question has {len(tokens)} tokens, and up to {longest} follow; the "
            f"model's context holds {context}; shorten the question or leave it out"
        )
    return TokenizedPrompt(prompt, text, tokens, continuations, num_unscored)


def _refuse_overlong(tokenizer: object, text: str, context: int) -> None:
    """Refuse a text that is surely longer than the context, without tokenising all of it.

    Only the beginning is tokenised. It may end within a word, and so get a few more tokens than in
    the whole text. So the text is refused only if the beginning has twice the context's tokens.
    """
    beginning = text[: CHARACTERS_A_TOKEN * context]
    if beginning == text:
        return
    if len(encode(tokenizer, beginning)) > 2 * context:
        raise ModelError(
            f"a prompt of the question has {len(text)} characters, more than {2 * context} tokens; "
            f"the model's context holds {context}; shorten the question or leave it out"
        )


def gold_text(prompt: Prompt, tokenizer: Any) -> str:
    """Return the gold answer as the model would write it right after the prompt.

    After a plain text it begins with a space. It is empty if the question has no gold answer.

    Args:
        prompt: The prompt.
        tokenizer: The model's tokenizer; without a chat template prompts are plain texts.
    """
    answer = get_reward(prompt).gold_text(prompt)
    is_turn = prompt.chat and getattr(tokenizer, "chat_template", None)
    return answer if is_turn or not answer else f" {answer}"


def judge_options(
    logprobs: tuple[float, ...], prompt: Prompt, kl: float | None = None
) -> JudgedOutcome:
    """Return the outcome of a path whose log-probabilities of the prompt's options are known.

    Args:
        logprobs: Log-probability of each option, in nats. If one of them isn't finite, or there are
            none, the path counts as wrong.
        prompt: The prompt.
        kl: The path's KL. For the reward `kl`, only it decides the outcome.
    """
    if prompt.reward == KL_REWARD:
        reward = 0.0
        if kl is not None:
            reward = math.exp(-kl) / 2  # at most 1/2, since a reward of 1 is a right answer
        return JudgedOutcome(reward=reward, margin=None, kl=kl)
    if not logprobs or not _are_finite(logprobs):
        return JudgedOutcome(reward=0.0, margin=None, kl=kl)
    reward, margin = score_choices(logprobs, prompt)
    return JudgedOutcome(reward=reward, margin=margin, logprobs=logprobs, kl=kl)


def judge_answer(outcome: Outcome) -> JudgedOutcome:
    """Return the judged outcome of a path that has generated an answer; it has no margin yet."""
    assert outcome.grade is not None
    assert outcome.logprob is not None
    logprob = outcome.logprob if math.isfinite(outcome.logprob) else None
    return JudgedOutcome(
        reward=outcome.grade,
        margin=None,
        answer=outcome.answer,
        tokens=outcome.tokens,
        grade=outcome.grade,
        logprob=logprob,
        kl=outcome.kl,
    )


class Evaluator:
    """Evaluates paths on a fixed batch of prompts.

    A path is given as a pair: the place of a prompt in the batch, and the decisions. Layers that
    several paths begin with run once.

    Args:
        routed: The model, with its tokenizer.
        prompts: Prompts with the same reward, tokenised or not.
        state_cache_gb: Gigabytes of memory for the states that paths share; None chooses by the
            free memory. It doesn't change results.
        kl: Measure each path's KL from the full path. The full path then runs even if it isn't
            among the pairs; its own KL is 0.
        paths_per_pass: Rows of a forward pass; None chooses the number by the free memory. It
            doesn't change results.
    """

    def __init__(
        self,
        routed: RoutedModel,
        prompts: Sequence[Prompt | TokenizedPrompt],
        state_cache_gb: float | None,
        *,
        kl: bool = False,
        paths_per_pass: int | None = None,
    ) -> None:
        self.prompts: list[TokenizedPrompt] = []
        for prompt in prompts:
            if isinstance(prompt, Prompt):
                prompt = tokenize_prompt(routed, prompt)
            self.prompts.append(prompt)
        self.routed = routed
        self.kl = kl
        self._scorer = Scorer(
            routed,
            [prompt.request for prompt in self.prompts],
            state_cache_gb,
            paths_per_pass=paths_per_pass,
        )
        self.states = self._scorer.states

    @property
    def scores_options(self) -> bool:
        """Whether options are scored, and not answers generated.

        The margins of options are known at once, without `with_margins`.
        """
        return not self._scorer.generates

    def evaluate(self, pairs: Sequence[Pair]) -> list[JudgedOutcome]:
        """Return the outcome of each pair, in order.

        The margins of generated answers are None. They depend on the answers of other paths, so
        `with_margins` adds them when all answers are known.

        Raises ModelError if a log-probability of the full path isn't finite.
        """
        judged_outcomes: list[JudgedOutcome] = []
        outcomes = self._scorer.score(pairs, kl=self.kl)
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if not _is_finite(outcome):
                self._refuse_full_path(pair)
            if self.scores_options:
                place, _ = pair
                prompt = self.prompts[place].prompt
                judged_outcome = judge_options(outcome.logprobs, prompt, outcome.kl)
            else:
                judged_outcome = judge_answer(outcome)
            judged_outcomes.append(judged_outcome)
        return judged_outcomes

    def with_margins(
        self, pairs: Sequence[Pair], outcomes: Sequence[JudgedOutcome], *, wrong_only: bool = False
    ) -> list[JudgedOutcome]:
        """Return the outcomes with margins for generated answers; margins that are known stay.

        The margin of a generated answer compares two mean log-probabilities of tokens along the
        path: that of the gold answer minus that of a wrong answer. If the path answered wrong, the
        wrong answer is its own answer. If the path answered right, the wrong answer is the
        likeliest rival; the rivals of a question are the most frequent wrong answers of all paths.
        The margin is None if no path answered wrong, or if the question has no gold answer because
        a function grades.

        Args:
            pairs: All pairs of the batch so far.
            outcomes: The outcome of each pair.
            wrong_only: Only wrong answers get margins. Their margins don't depend on later paths,
                and are cheaper to compute while the states of the paths are still in memory.
        """
        if self.scores_options:
            return list(outcomes)
        completed_outcomes = list(outcomes)
        right: list[int] = []  # numbers of the pairs with a right answer and no margin
        wrong: list[int] = []  # numbers of the pairs with a wrong answer and no margin
        for number, ((place, _), outcome) in enumerate(zip(pairs, outcomes, strict=True)):
            if outcome.margin is not None or not self._has_gold(place):
                continue
            if outcome.is_right:
                right.append(number)
            else:
                wrong.append(number)
        self._add_margins_of_wrong(pairs, wrong, completed_outcomes)
        if not wrong_only:
            rivals = self._find_rivals(pairs, outcomes)
            self._add_margins_of_right(pairs, right, rivals, completed_outcomes)
        return completed_outcomes

    def _has_gold(self, place: int) -> bool:
        """Tell whether a prompt whose answer is generated has a gold answer."""
        return bool(self.prompts[place].continuations[0])

    def _add_margins_of_wrong(
        self,
        pairs: Sequence[Pair],
        numbers: Sequence[int],
        outcomes: list[JudgedOutcome],
    ) -> None:
        """Add the margins of wrong answers: the gold answer against the path's own answer."""
        no_rivals: list[list[TokenIds]] = [[] for _ in self.prompts]
        scores = self._score_answers(pairs, numbers, no_rivals)
        for number, (gold_score,) in zip(numbers, scores, strict=True):
            margin = _compute_margin(gold_score, outcomes[number].logprob)
            outcomes[number] = dataclasses.replace(outcomes[number], margin=margin)

    def _add_margins_of_right(
        self,
        pairs: Sequence[Pair],
        numbers: Sequence[int],
        rivals: Sequence[Sequence[TokenIds]],
        outcomes: list[JudgedOutcome],
    ) -> None:
        """Add the margins of right answers: the gold answer against its likeliest rival."""
        scores = self._score_answers(pairs, numbers, rivals)
        for number, (gold_score, *rival_scores) in zip(numbers, scores, strict=True):
            margin = _compute_margin(gold_score, max(rival_scores, default=None))
            outcomes[number] = dataclasses.replace(outcomes[number], margin=margin)

    def _find_rivals(
        self, pairs: Sequence[Pair], outcomes: Sequence[JudgedOutcome]
    ) -> list[list[TokenIds]]:
        """Return, for each prompt, the most frequent wrong answers."""
        counters: list[Counter[TokenIds]] = [Counter() for _ in self.prompts]
        for (place, _), outcome in zip(pairs, outcomes, strict=True):
            if outcome.tokens and not outcome.is_right:
                counters[place][outcome.tokens] += 1
        return [_list_most_common(counter) for counter in counters]

    def _score_answers(
        self,
        pairs: Sequence[Pair],
        numbers: Sequence[int],
        rivals: Sequence[Sequence[TokenIds]],
    ) -> list[list[float]]:
        """Score the gold answer and its rivals along the paths of some of the pairs.

        Args:
            pairs: All pairs.
            numbers: Numbers of the pairs to score.
            rivals: For each prompt, the rivals to score.

        Returns:
            For each number, the mean log-probability of the gold answer's tokens, then of each
            rival's tokens, in nats.
        """
        if not numbers:
            return []
        continuations = [
            [*prompt.continuations, *answers] if self._has_gold(place) else []
            for place, (prompt, answers) in enumerate(zip(self.prompts, rivals, strict=True))
        ]
        outcomes = self._scorer.score_continuations(
            [pairs[number] for number in numbers], continuations
        )
        scores: list[list[float]] = []
        for number, outcome in zip(numbers, outcomes, strict=True):
            place, _ = pairs[number]
            answers = continuations[place]
            means = [
                logprob / len(tokens)
                for logprob, tokens in zip(outcome.logprobs, answers, strict=True)
            ]
            scores.append(means)
        return scores

    def forget(self) -> None:
        """Free all shared states."""
        self._scorer.forget()

    def _refuse_full_path(self, pair: Pair) -> None:
        """Raise ModelError if a pair without finite log-probabilities has the full path.

        Such log-probabilities make another path wrong. But if the full path has them, the model
        itself fails on the prompt.
        """
        place, decisions = pair
        if decisions == full_decisions(len(decisions)):
            raise ModelError(
                f"the base model's own log-probabilities are not finite on "
                f"{self.prompts[place].text!r}; load it with --dtype float32"
            )


def _is_finite(outcome: Outcome) -> bool:
    """Tell whether all log-probabilities of an outcome are finite."""
    logprobs = list(outcome.logprobs)
    if outcome.logprob is not None:
        logprobs.append(outcome.logprob)
    return _are_finite(logprobs)


def _are_finite(logprobs: Sequence[float]) -> bool:
    return all(math.isfinite(logprob) for logprob in logprobs)


def _list_most_common(counter: Counter[TokenIds]) -> list[TokenIds]:
    return [tokens for tokens, _ in counter.most_common(MAX_RIVALS)]


def _compute_margin(gold: float, wrong: float | None) -> float | None:
    """Return the margin; None if a log-probability is missing, or the margin isn't finite."""
    if wrong is None or not math.isfinite(gold - wrong):
        return None
    return gold - wrong
