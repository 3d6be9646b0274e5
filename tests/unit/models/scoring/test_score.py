"""One entry for options, texts, KL and generated answers: each outcome is the path's run alone."""

import itertools
import pickle

import pytest

from drllm.errors import RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy, FullPolicy, PathPolicy
from drllm.models.scoring import score as module
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Outcome, Request, Scorer, score
from drllm.paths import StaticPath, to_path
from slow_way import (
    FULL,
    QUESTIONS,
    ListedModel,
    assert_sums,
    greedy_alone,
    kls_alone,
    some_pairs,
    sums_alone,
)

PLANS = [FULL, (1, 1, 0, 1, 1, 1), (1, 1, 0, 1, 2, 1), (1, 0, 2, 1, 1, 1)]
CONTEXTS = [question.context for question in QUESTIONS]
TOLERANCE = 1e-4
KL_TOLERANCE = 2e-5


def grade_length(text, is_complete):
    """Grade an answer by its length, at three characters or at its end."""
    return float(len(text)) if is_complete or len(text) >= 3 else None


def answer_requests(limit=5, grader=None):
    return [Request(context, max_new_tokens=limit, grader=grader) for context in CONTEXTS]


@pytest.fixture
def model(tiny_llama):
    """A model whose answers don't end by themselves."""
    return tiny_llama(eos_token_id=None)


@pytest.fixture
def routed(model, tiny_tokenizer):
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    yield routed
    routed.detach()


def test_every_path_is_scored_on_every_request_as_if_alone(routed, tiny_llama):
    slow = tiny_llama(eos_token_id=None)
    outcomes = score(routed, QUESTIONS, PLANS, kl=True)
    pairs = [(row, plan) for plan in PLANS for row in range(len(QUESTIONS))]
    flat = list(itertools.chain.from_iterable(outcomes))
    assert_sums(sums_alone(slow, QUESTIONS, pairs), flat)
    expected = kls_alone(slow, CONTEXTS, pairs)
    assert [outcome.kl for outcome in flat] == pytest.approx(expected, abs=KL_TOLERANCE)
    assert [outcome.kl for outcome in outcomes[0]] == [0.0] * len(QUESTIONS)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_requests_of_every_kind_are_scored_in_one_call_in_batches_of_any_size(
    routed, tiny_llama, monkeypatch, batch_size
):
    monkeypatch.setattr(module, "BATCH_SIZE", batch_size)
    slow = tiny_llama(eos_token_id=None)
    text = [5, 6, 7, 8, 9, 10, 11]
    prompt = Request([20, 21, 22])  # only its KL is of interest
    requests = [*answer_requests(), Request.from_text(text), prompt, *QUESTIONS]
    outcomes = score(routed, requests, PLANS, kl=True)
    for plan, along_plan in zip(PLANS, outcomes, strict=True):
        answers = along_plan[:3]
        text_outcome, prompt_outcome = along_plan[3:5]
        pairs = [(row, plan) for row in range(3)]
        expected = greedy_alone(slow, CONTEXTS, pairs, 5)
        assert [list(outcome.tokens) for outcome in answers] == expected
        listed = ListedModel(slow, plan)
        loss = sum(listed.each(text[:1], text[1:]))
        assert text_outcome.logprobs == (pytest.approx(loss, abs=TOLERANCE),)
        [kl] = kls_alone(slow, [prompt.context], [(0, plan)])
        assert prompt_outcome == Outcome(kl=pytest.approx(kl, abs=KL_TOLERANCE))
        assert_sums(sums_alone(slow, QUESTIONS, pairs), along_plan[5:])


def test_paths_may_be_decisions_or_layers_in_any_order(routed, tiny_llama):
    paths = [StaticPath(to_path(PLANS[1])), StaticPath([5, 0, 3]), PLANS[2]]
    outcomes = score(routed, QUESTIONS, paths, kl=True)
    for path, along_path in zip(paths, outcomes, strict=True):
        layers = path.layers if isinstance(path, StaticPath) else to_path(path)
        slow = ListedModel(tiny_llama(), path=layers)
        expected = [slow.sums(each.context, each.continuations) for each in QUESTIONS]
        assert_sums(expected, along_path)
    [[full]] = score(routed, QUESTIONS[:1], [StaticPath(range(6))], kl=True)
    assert full.kl == 0.0


def test_an_answer_is_graded_as_soon_as_it_can_be_and_has_its_mean_log_probability(
    routed, tiny_llama
):
    slow = tiny_llama(eos_token_id=None)
    plan = PLANS[3]
    scorer = Scorer(routed, answer_requests(5, grade_length), 1.0)
    pairs = [(row, plan) for row in range(3)]
    outcomes = scorer.score(pairs)
    assert scorer.generates
    expected = greedy_alone(slow, CONTEXTS, pairs, 5)
    for context, tokens, outcome in zip(CONTEXTS, expected, outcomes, strict=True):
        assert list(outcome.tokens) == tokens[: len(outcome.tokens)]
        assert outcome.answer == routed.tokenizer.decode(outcome.tokens, skip_special_tokens=True)
        assert outcome.grade == len(outcome.answer)
        each = ListedModel(slow, plan).each(context, outcome.tokens)
        assert outcome.logprob == pytest.approx(sum(each) / len(each), abs=TOLERANCE)
        assert outcome.logprobs == ()
        assert outcome.kl is None
    assert 3 in [len(outcome.tokens) for outcome in outcomes], "one must have stopped early"


def test_an_answer_without_a_grader_goes_on_to_its_limit(routed):
    requests = [Request([5, 6], max_new_tokens=2), Request([7, 8, 9], max_new_tokens=4)]
    outcomes = Scorer(routed, requests, 1.0).score([(0, FULL), (1, FULL), (0, PLANS[1])])
    assert [len(outcome.tokens) for outcome in outcomes] == [2, 4, 2]
    assert {outcome.grade for outcome in outcomes} == {None}


def test_layers_that_earlier_calls_ran_are_not_run_again_until_they_are_forgotten(routed):
    pairs = some_pairs(8)
    scorer = Scorer(routed, QUESTIONS, 1.0)
    first = scorer.score(pairs)
    num_run = scorer.states.executions_run
    assert_sums(first, scorer.score(pairs))
    assert scorer.states.executions_run == num_run
    scorer.forget()
    assert_sums(first, scorer.score(pairs))
    assert scorer.states.executions_run == 2 * num_run


def test_continuations_after_answered_prompts_are_scored_without_reading_the_prompts_again(
    routed, tiny_llama
):
    slow = tiny_llama(eos_token_id=None)
    pairs = some_pairs(6, seed=2)
    scorer = Scorer(routed, answer_requests(2), 1.0)
    scorer.score(pairs)
    tokens_run = scorer.states.tokens_run
    continuations = [question.continuations for question in QUESTIONS]
    outcomes = scorer.score_continuations(pairs, continuations)
    assert_sums(sums_alone(slow, QUESTIONS, pairs), outcomes)
    # Of a prompt only the last token is read again.
    most = sum(sum(path) * (1 + QUESTIONS[row].num_after) for row, path in pairs)
    assert scorer.states.tokens_run - tokens_run <= most


@pytest.mark.parametrize(
    "policy",
    [
        FixedPolicy(PLANS[1:4], 6),
        FixedPolicy(PLANS[2], 6),
        FullPolicy(),
        PathPolicy(StaticPath([5, 0, 3]), 6),
    ],
    ids=["a plan each", "one plan", "full", "path"],
)
@pytest.mark.parametrize("stem", [[], list(range(60, 70))], ids=["apart", "one beginning"])
def test_under_a_policy_outcomes_and_routes_are_those_of_one_routed_pass(routed, policy, stem):
    questions = [Request([*stem, *each.context], each.continuations) for each in QUESTIONS]
    expected, expected_routes = ChoiceBatch(routed, questions, 1.0).routed_scores(policy)
    outcomes, routes = Scorer(routed, questions, 1.0).score_under_policy(policy)
    assert_sums(expected, outcomes)
    assert [outcome.greedy for outcome in outcomes] == [outcome.greedy for outcome in expected]
    assert routes.tolist() == expected_routes.tolist()


def test_what_cannot_be_scored_is_refused(routed, tiny_llama):
    with pytest.raises(RoutingError, match="1 of 2 requests generate answers"):
        Scorer(routed, [QUESTIONS[0], Request([5], max_new_tokens=3)])
    with pytest.raises(RoutingError, match="both continuations and max_new_tokens"):
        score(routed, [Request([5], [[6]], max_new_tokens=3)], [FULL])
    with pytest.raises(RoutingError, match="max_new_tokens of a request is 0"):
        score(routed, [Request([5], max_new_tokens=0)], [FULL])
    for empty in (Request([], [[5]]), Request([], max_new_tokens=2), Request([5], [[]])):
        with pytest.raises(RoutingError, match="no tokens"):
            score(routed, [empty], [FULL])
    without_tokenizer = RoutedModel(tiny_llama())
    with pytest.raises(RoutingError, match="give RoutedModel its tokenizer"):
        Scorer(without_tokenizer, answer_requests(), 1.0)
    answers = Scorer(routed, answer_requests(), 1.0)
    with pytest.raises(RoutingError, match="decisions can't express it"):
        answers.score([(0, StaticPath([5, 0, 3]))])
    with pytest.raises(RoutingError, match="generate_many"):
        answers.score_under_policy(FullPolicy())
    with pytest.raises(RoutingError, match="a new scorer"):
        Scorer(routed, QUESTIONS, 1.0).score_continuations([(0, FULL)], [[[5]]] * 3)


def test_no_requests_and_no_paths_give_no_outcomes(routed):
    assert score(routed, [], [FULL, PLANS[1]]) == [[], []]
    assert score(routed, QUESTIONS, []) == []


def test_a_request_can_be_sent_to_another_process():
    request = Request([5, 6], max_new_tokens=4, grader=grade_length)
    assert pickle.loads(pickle.dumps(request)) == request
