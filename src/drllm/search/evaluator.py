"""Score paths on many questions at once: reward, margin, answer and KL of each path.

The forward passes, which share the prefixes of paths, are in `models.scoring`. The rewards are in
`tasks.rewards`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.errors import ModelError
from drllm.models.base.prompts import context_length, encode, encode_continuation, render
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Request
from drllm.models.scoring.prefix_sharing import PackedRows, Pair
from drllm.tasks.examples import KL_REWARD, Prompt
from drllm.tasks.rewards import get_reward, score_choices, verdict

WRONG_ANSWERS = 4
"""Number of frequent wrong answers that a right answer is compared with for its margin."""
CHARACTERS_A_TOKEN = 16
"""Characters per token of the context from which a text is most likely too long. Only the beginning
of a longer text is tokenised at first, since tokenising megabytes takes minutes."""

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one path on one question; see `TriedPath`."""

    reward: float  # in [0, 1]
    margin: float | None  # in nats, positive if right; None if unknown (or not known yet)
    # Log-probability of each option, in nats; empty if one of them isn't finite, and for generated
    # answers.
    logprobs: tuple[float, ...]
    answer: str | None = None  # the generated text; None if options were scored
    tokens: TokenIds = ()  # tokens of the answer, without the end-of-sequence token
    # Mean log-probability of the answer's tokens (with the end of sequence), in nats; None if
    # options were scored, or if the mean isn't finite.
    logprob: float | None = None
    kl: float | None = None  # in nats per token; None if not computed or not finite

    @property
    def is_right(self) -> bool:
        """Whether the path answered right."""
        return self.reward >= 1


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the model reads it, with the chat template if the prompt uses it."""

    prompt: Prompt
    text: str
    tokens: list[int]
    continuations: list[list[int]]  # the options, or the gold answer if an answer is generated
    num_unscored: tuple[int, ...]  # number of first tokens of each option to read without a score

    @property
    def request(self) -> Request:
        """The continuations to score after the prompt.

        For the reward `kl` only the prompt's own tokens matter, so the continuation is the prompt's
        last token.
        """
        continuations = self.continuations
        if self.prompt.reward == KL_REWARD:
            continuations = [self.tokens[-1:]]
        return Request(self.tokens, continuations, self.num_unscored)


def tokenize_prompt(routed: RoutedModel, prompt: Prompt) -> TokenizedPrompt:
    """Render and tokenise a prompt and its possible continuations.

    Raises ModelError if the prompt and its longest continuation don't fit the model's context.
    Beyond the context some models fail, and others run at positions that they were never trained
    on.
    """
    tokenizer = routed.tokenizer
    context = context_length(routed.model)
    text = render(tokenizer, prompt.content, chat=prompt.chat)
    if context is not None:
        _refuse_overlong(tokenizer, text, context)
    tokens = encode(tokenizer, text)
    texts = prompt.continuations or (gold_text(prompt),)
    continuations = [encode_continuation(tokenizer, text, after) for after in texts]
    unscored = [encode_continuation(tokenizer, text, after) for after in prompt.unscored]
    num_unscored = tuple(len(tokens) for tokens in unscored)
    longest = max(len(tokens) for tokens in continuations)
    if not prompt.continuations:  # an answer is generated
        longest = max(longest, prompt.max_new_tokens)
    if context is not None and len(tokens) + longest > context:
        raise ModelError(
            f"a prompt of the question has {len(tokens)} tokens, and up to {longest} follow; the "
            f"model's context holds {context}; shorten the question or leave it out"
        )
    return TokenizedPrompt(prompt, text, tokens, continuations, num_unscored)


def _refuse_overlong(tokenizer: object, text: str, context: int) -> None:
    """Refuse a text whose beginning is longer than twice the context.

    Only the beginning is tokenised. Its end may cut a word, so its tokens may differ from those of
    the whole text. Twice the context leaves room for this.
    """
    beginning = text[: CHARACTERS_A_TOKEN * context]
    if len(beginning) < len(text) and len(encode(tokenizer, beginning)) > 2 * context:
        raise ModelError(
            f"a prompt of the question has {len(text)} characters, more than {2 * context} tokens; "
            f"the model's context holds {context}; shorten the question or leave it out"
        )


def gold_text(prompt: Prompt) -> str:
    """Return the gold answer as the model would write it right after the prompt."""
    answer = get_reward(prompt).gold_text(prompt)
    return answer if prompt.chat else f" {answer}"


def judge_options(logprobs: tuple[float, ...], prompt: Prompt, kl: float | None = None) -> Outcome:
    """Judge a path by the log-probabilities of a prompt's options; without them it is wrong."""
    if prompt.reward == KL_REWARD:
        reward = 0.0 if kl is None else math.exp(-kl) / 2  # 1 would be right
        return Outcome(reward=reward, margin=None, logprobs=(), kl=kl)
    if not logprobs:
        return Outcome(reward=0.0, margin=None, logprobs=(), kl=kl)
    reward, margin = score_choices(logprobs, prompt)
    return Outcome(reward=reward, margin=margin, logprobs=logprobs, kl=kl)


class Evaluator:
    """Evaluates paths on a fixed batch of prompts, sharing the work that paths have in common.

    Args:
        routed: The model, with its tokenizer.
        prompts: Prompts with the same reward, as texts or as tokens.
        state_cache_gb: Memory for shared states (see `ChoiceBatch`); it doesn't change results.
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
        self._state_cache_gb = state_cache_gb
        self._paths_per_pass = paths_per_pass
        self._batch: ChoiceBatch | AnswerBatch
        if get_reward(self.prompts[0].prompt).scores_options:
            self._batch = self._choice_batch([prompt.request for prompt in self.prompts])
        else:
            self._batch = AnswerBatch(
                routed,
                routed.tokenizer,
                [prompt.tokens for prompt in self.prompts],
                state_cache_gb,
                paths_per_pass=paths_per_pass,
            )
        self.states = self._batch.states

    @property
    def scores_options(self) -> bool:
        """Whether options are scored; then margins are known without `with_margins`."""
        return isinstance(self._batch, ChoiceBatch)

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcome of each pair (place of a prompt, path), in order.

        The margins of generated answers are None. They depend on the answers of other paths, so
        `with_margins` adds them when all paths are known.

        Raises ModelError if the full path's own log-probabilities aren't finite.
        """
        if isinstance(self._batch, ChoiceBatch):
            return self._score_options(self._batch, pairs)
        return self._generate_answers(self._batch, pairs)

    def _score_options(self, batch: ChoiceBatch, pairs: Sequence[Pair]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        scores = batch.scores(pairs, kl=self.kl)
        for pair, score in zip(pairs, scores, strict=True):
            place, _ = pair
            is_finite = self._check_finite(pair, score.logprobs)
            logprobs = score.logprobs if is_finite else ()
            outcomes.append(judge_options(logprobs, self.prompts[place].prompt, score.kl))
        return outcomes

    def _generate_answers(self, batch: AnswerBatch, pairs: Sequence[Pair]) -> list[Outcome]:
        prompts = [self.prompts[place].prompt for place, _ in pairs]
        answers = batch.answers(
            pairs,
            [prompt.max_new_tokens for prompt in prompts],
            lambda number, text, is_finished: verdict(prompts[number], text, is_finished),
            kl=self.kl,
        )
        outcomes: list[Outcome] = []
        for pair, answer in zip(pairs, answers, strict=True):
            logprob = answer.logprob if self._check_finite(pair, [answer.logprob]) else None
            outcome = Outcome(
                reward=answer.grade,
                margin=None,
                logprobs=(),
                answer=answer.text,
                tokens=answer.tokens,
                logprob=logprob,
                kl=answer.kl,
            )
            outcomes.append(outcome)
        return outcomes

    def with_margins(
        self, pairs: Sequence[Pair], outcomes: Sequence[Outcome], *, wrong_only: bool = False
    ) -> list[Outcome]:
        """Return the outcomes of all paths of the batch with their margins; known margins stay.

        A margin of a generated answer is a difference of two mean token log-probabilities under the
        path: the gold answer's minus a wrong answer's. If the path answered wrong, the wrong answer
        is the path's own. If the path answered right, the wrong answer is the likeliest of the most
        frequent wrong answers to the question. The margin is None if no path answered wrong, or if
        there is no gold answer because a function grades.

        With `wrong_only` only wrong answers get a margin, since later paths may change the margins
        of right answers. Margins of wrong answers are best computed early, while the states are in
        memory.
        """
        has_gold = all(prompt.continuations[0] for prompt in self.prompts)
        if isinstance(self._batch, ChoiceBatch) or not has_gold:
            return list(outcomes)
        completed = list(outcomes)
        right: list[int] = []  # numbers of the pairs with a right answer and no margin
        wrong: list[int] = []  # numbers of the pairs with a wrong answer and no margin
        for number, outcome in enumerate(outcomes):
            if outcome.margin is None:
                numbers = right if outcome.is_right else wrong
                numbers.append(number)
        self._add_margins_of_wrong(self._batch, pairs, wrong, completed)
        if not wrong_only:
            rivals = self._wrong_answers(pairs, outcomes)
            self._add_margins_of_right(self._batch, pairs, right, rivals, completed)
        return completed

    def _add_margins_of_wrong(
        self,
        batch: AnswerBatch,
        pairs: Sequence[Pair],
        numbers: Sequence[int],
        outcomes: list[Outcome],
    ) -> None:
        """Add the margins of wrong answers: the gold answer against the path's own answer."""
        no_rivals: list[list[TokenIds]] = [[] for _ in self.prompts]
        scores = self._score_answers(batch, pairs, numbers, no_rivals)
        for number, (gold,) in zip(numbers, scores, strict=True):
            margin = _difference(gold, outcomes[number].logprob)
            outcomes[number] = dataclasses.replace(outcomes[number], margin=margin)

    def _add_margins_of_right(
        self,
        batch: AnswerBatch,
        pairs: Sequence[Pair],
        numbers: Sequence[int],
        rivals: Sequence[Sequence[TokenIds]],
        outcomes: list[Outcome],
    ) -> None:
        """Add the margins of right answers: the gold answer against its likeliest rival."""
        scores = self._score_answers(batch, pairs, numbers, rivals)
        for number, (gold, *wrong) in zip(numbers, scores, strict=True):
            margin = _difference(gold, max(wrong, default=None))
            outcomes[number] = dataclasses.replace(outcomes[number], margin=margin)

    def _wrong_answers(
        self, pairs: Sequence[Pair], outcomes: Sequence[Outcome]
    ) -> list[list[TokenIds]]:
        """Return, for each prompt, the most frequent wrong answers."""
        counts: list[Counter[TokenIds]] = [Counter() for _ in self.prompts]
        for (place, _), outcome in zip(pairs, outcomes, strict=True):
            if outcome.tokens and not outcome.is_right:
                counts[place][outcome.tokens] += 1
        return [_most_common(count) for count in counts]

    def _score_answers(
        self,
        batch: AnswerBatch,
        pairs: Sequence[Pair],
        numbers: Sequence[int],
        rivals: Sequence[Sequence[TokenIds]],
    ) -> list[list[float]]:
        """Score the gold answer and its rivals along the paths of some of the pairs.

        Args:
            batch: The batch that generated the answers; its rows hold the prompts' states.
            pairs: All pairs.
            numbers: Numbers of the pairs to score.
            rivals: For each prompt, further answers to score.

        Returns:
            For each number, the mean token log-probability of the gold answer, then of each rival,
            in nats.
        """
        if not numbers:
            return []
        requests = [
            Request(prompt.tokens, [*prompt.continuations, *answers])
            for prompt, answers in zip(self.prompts, rivals, strict=True)
        ]
        choices = self._choice_batch(requests, contexts=batch.rows)
        sums = choices.logprobs([pairs[number] for number in numbers])
        means: list[list[float]] = []
        for number, sums_of_pair in zip(numbers, sums, strict=True):
            place, _ = pairs[number]
            lengths = [len(tokens) for tokens in requests[place].continuations]
            means.append(
                [total / length for total, length in zip(sums_of_pair, lengths, strict=True)]
            )
        return means

    def _choice_batch(
        self, requests: Sequence[Request], contexts: PackedRows | None = None
    ) -> ChoiceBatch:
        return ChoiceBatch(
            self.routed,
            requests,
            self._state_cache_gb,
            paths_per_pass=self._paths_per_pass,
            contexts=contexts,
        )

    def forget(self) -> None:
        """Free all shared states."""
        self._batch.forget()

    def _check_finite(self, pair: Pair, logprobs: Sequence[float]) -> bool:
        """Tell whether all log-probabilities of a path are finite.

        Raises ModelError if the full path has one that isn't finite, since no path can be judged
        without them.
        """
        place, decisions = pair
        if all(math.isfinite(value) for value in logprobs):
            return True
        if set(decisions) == {1}:
            raise ModelError(
                f"the base model's own log-probabilities are not finite on "
                f"{self.prompts[place].text!r}; load it with --dtype float32"
            )
        return False


def _most_common(counts: Counter[TokenIds]) -> list[TokenIds]:
    return [tokens for tokens, _ in counts.most_common(WRONG_ANSWERS)]


def _difference(gold: float, other: float | None) -> float | None:
    """Return a margin; None if a log-probability is missing or not finite."""
    if other is None or not math.isfinite(gold - other):
        return None
    return gold - other
