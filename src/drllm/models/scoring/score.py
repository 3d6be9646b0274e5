"""Score requests along paths: options, texts, KL from the full path, and generated answers.

`score` is the entry for many paths on many requests. A `Scorer` keeps a batch of requests, so that
later calls reuse what earlier calls have run. Layers that several paths begin with run once, and
the tokens that all prompts begin with are read once. Passes are sized by memory. Every outcome is
that of the path run alone.

Axes: N paths, P requests, L layers.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.model.batching import group_by_length
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import Policy, find_shared_plan
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.prefix_sharing import Pair, PlanPair
from drllm.models.scoring.requests import Grader, Outcome, Request, Tokens
from drllm.paths import Plan, StaticPath, get_layers

__all__ = ["Grader", "Outcome", "Request", "Scorer", "score"]

BATCH_SIZE = 32  # requests of similar length that are scored together


def score(
    routed: RoutedModel,
    requests: Sequence[Request],
    paths: Sequence[Plan],
    *,
    kl: bool = False,
    greedy: bool = False,
    state_cache_gb: float | None = None,
) -> list[list[Outcome]]:
    """Return the outcome of each path on each request, `[N][P]`.

    Args:
        routed: The model; with its tokenizer if answers are generated.
        requests: The requests.
        paths: Decisions or static paths. Answers are generated only along paths that decisions can
            express.
        kl: Whether to measure the KL from the full path too.
        greedy: Whether to tell which continuations the path would generate greedily.
        state_cache_gb: As for `Scorer`.

    Raises:
        RoutingError: See `Scorer` and `Scorer.score`.

    Example:
        >>> request = Request(context=[5, 6, 7], continuations=[[10], [11, 12]])
        >>> paths = [(1, 1, 1, 1), (1, 1, 0, 1)]  # the full path; the path without layer 2
        >>> [[full], [shorter]] = score(routed, [request], paths)  # doctest: +SKIP
    """
    # Paths become decisions if possible, since the full path is recognised by its decisions.
    plans = [_simplify(path, routed.num_layers) for path in paths]
    outcomes = [[Outcome()] * len(requests) for _ in plans]
    for places in _split_into_batches(requests):
        batch = [requests[place] for place in places]
        scorer = Scorer(routed, batch, state_cache_gb)
        batch_outcomes = _score_plans(scorer, plans, kl=kl, greedy=greedy)
        for number in range(len(plans)):
            for place, outcome in zip(places, batch_outcomes[number], strict=True):
                outcomes[number][place] = outcome
        del scorer  # frees its states before the next scorer measures the free memory
    return outcomes


def _split_into_batches(requests: Sequence[Request]) -> list[list[int]]:
    """Return the places of the requests of each batch: of one kind, and of similar length."""
    generated = [place for place, request in enumerate(requests) if request.is_generated]
    scored = [place for place, request in enumerate(requests) if not request.is_generated]
    batches: list[list[int]] = []
    for places in (scored, generated):
        lengths = [requests[place].length for place in places]
        for numbers in group_by_length(lengths, BATCH_SIZE):
            batch = [places[number] for number in numbers]
            batches.append(batch)
    return batches


def _score_plans(
    scorer: "Scorer", plans: Sequence[Plan], *, kl: bool, greedy: bool
) -> list[list[Outcome]]:
    """Return the outcome of each plan on each request of a scorer, `[N][P]`."""
    num_requests = len(scorer.requests)
    # Sorted, so that paths with a common beginning are in the same pass.
    order = sorted(range(len(plans)), key=lambda number: get_layers(plans[number]))
    pairs: list[PlanPair] = []
    for number in order:
        pairs += [(place, plans[number]) for place in range(num_requests)]
    outcomes = iter(scorer.score(pairs, kl=kl, greedy=greedy))
    plan_outcomes: list[list[Outcome]] = [[] for _ in plans]
    for number in order:
        plan_outcomes[number] = list(itertools.islice(outcomes, num_requests))
    return plan_outcomes


class Scorer:
    """Scores a batch of requests, again and again along other paths.

    Args:
        routed: The model; with its tokenizer if answers are generated.
        requests: The requests. Either all of them generate answers, or none does. All their rows
            are padded to the longest, so give requests of similar length.
        state_cache_gb: Maximum size, in GB, of the cache of states that paths share; None chooses
            it by the free memory. It doesn't change outcomes.
        paths_per_pass: Maximum number of paths in a forward pass; None for as many as fit into
            memory. It doesn't change outcomes.

    Attributes:
        generates: Whether answers are generated.
        states: The cache of states.

    Raises:
        RoutingError: A request has no tokens to read or to score; only some requests generate
            answers; one of these has continuations too; or the model has no tokenizer for them.
    """

    def __init__(
        self,
        routed: RoutedModel,
        requests: Sequence[Request],
        state_cache_gb: float | None = None,
        *,
        paths_per_pass: int | None = None,
    ) -> None:
        self.routed = routed
        self.requests = list(requests)
        _check_requests(self.requests)
        self.generates = any(request.is_generated for request in self.requests)
        self._state_cache_gb = state_cache_gb
        self._paths_per_pass = paths_per_pass
        self._batch: ChoiceBatch | AnswerBatch
        if self.generates:
            if routed.tokenizer is None:
                raise RoutingError("answers are texts; give RoutedModel its tokenizer")
            self._batch = AnswerBatch(
                routed,
                routed.tokenizer,
                [request.context for request in self.requests],
                state_cache_gb,
                paths_per_pass=paths_per_pass,
            )
        else:
            self._batch = ChoiceBatch(
                routed,
                self.requests,
                state_cache_gb,
                paths_per_pass=paths_per_pass,
            )
        self.states = self._batch.states

    def score(
        self, pairs: Sequence[PlanPair], *, kl: bool = False, greedy: bool = False
    ) -> list[Outcome]:
        """Return the outcome of each pair, in order.

        Args:
            pairs: Pairs of a request's place in the batch and the path to run. Answers are
                generated only along paths that decisions can express.
            kl: Whether to measure the KL from the full path too. The full path then runs even if it
                isn't among the pairs; its own KL is 0.
            greedy: Whether to tell which continuations the path would generate greedily.

        Raises:
            RoutingError: An answer is to be generated along a path that decisions can't express.
        """
        num_layers = self.routed.num_layers
        plan_pairs = [(place, _simplify(path, num_layers)) for place, path in pairs]
        if isinstance(self._batch, AnswerBatch):
            return self._generate(self._batch, plan_pairs, kl)
        return self._batch.scores(plan_pairs, kl=kl, greedy=greedy)

    def score_under_policy(self, policy: Policy) -> tuple[list[Outcome], Tensor]:
        """Score the continuations of each request once under a policy, with `greedy`.

        The policy reads the prompt but not the continuations. All requests are in one forward pass.
        If the policy has one plan for all requests, the plan is run as a path, so that the prompts'
        common beginning is read once.

        Returns:
            The outcome of each request, and the routes, `[P, L]`.

        Raises:
            RoutingError: The requests generate answers.
        """
        if isinstance(self._batch, AnswerBatch):
            raise RoutingError(
                "answers aren't generated under a policy here; use RoutedModel.generate_many"
            )
        plan = find_shared_plan(policy, self.routed.num_layers)
        if not isinstance(plan, tuple) or not self._batch.shares_beginning:
            return self._batch.routed_scores(policy)
        pairs = [(place, plan) for place in range(len(self.requests))]
        return self._batch.scores(pairs, greedy=True), torch.tensor([plan] * len(pairs))

    def score_continuations(
        self, pairs: Sequence[Pair], continuations: Sequence[Sequence[Tokens]]
    ) -> list[Outcome]:
        """Score continuations after the prompts of generated answers.

        A prompt that was read along the path isn't read again, while its states are cached.

        Args:
            pairs: Pairs of a request's place in the batch and the decisions to run under.
            continuations: For each request of the batch, the tokens of its continuations, `[P]`.

        Returns:
            The outcome of each pair, with the log-probability of each continuation.

        Raises:
            RoutingError: The requests don't generate answers, but have continuations themselves.
        """
        if not isinstance(self._batch, AnswerBatch):
            raise RoutingError(
                "these requests generate no answers; give the continuations to a new scorer"
            )
        requests = [
            Request(request.context, tokens)
            for request, tokens in zip(self.requests, continuations, strict=True)
        ]
        choices = ChoiceBatch(
            self.routed,
            requests,
            self._state_cache_gb,
            paths_per_pass=self._paths_per_pass,
            contexts=self._batch.rows,
        )
        return choices.scores(pairs)

    def forget(self) -> None:
        """Free all states that paths share."""
        self._batch.forget()

    def _generate(self, batch: AnswerBatch, pairs: Sequence[PlanPair], kl: bool) -> list[Outcome]:
        """Generate the answers of pairs, and grade them."""
        decision_pairs: list[Pair] = []
        limits: list[int] = []
        for place, plan in pairs:
            if isinstance(plan, StaticPath):
                raise RoutingError(
                    f"answers can't be scored along {plan}, since decisions can't express it; use "
                    f"RoutedModel.fixed with generate_many"
                )
            limit = self.requests[place].max_new_tokens
            assert limit is not None
            decision_pairs.append((place, plan))
            limits.append(limit)

        def grade(number: int, text: str, is_complete: bool) -> float | None:
            grader = self.requests[pairs[number][0]].grader
            return None if grader is None else grader(text, is_complete)

        return batch.answers(decision_pairs, limits, grade, kl=kl)


def _simplify(plan: Plan, num_layers: int) -> Plan:
    """Return a static path as decisions if they can express it."""
    return plan.plan(num_layers) if isinstance(plan, StaticPath) else plan


def _check_requests(requests: Sequence[Request]) -> None:
    """Refuse requests that can't be in one scorer, or whose answers can't be generated."""
    generated = [request for request in requests if request.is_generated]
    if len(generated) not in (0, len(requests)):
        raise RoutingError(
            f"{len(generated)} of {len(requests)} requests generate answers; put them into a "
            f"scorer of their own, or use the function score"
        )
    for request in generated:
        if request.continuations:
            raise RoutingError(
                "a request has both continuations and max_new_tokens; make two requests of it"
            )
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise RoutingError(
                f"max_new_tokens of a request is {request.max_new_tokens}; give a number from 1"
            )
        if not request.context:
            raise RoutingError("a prompt has no tokens")
