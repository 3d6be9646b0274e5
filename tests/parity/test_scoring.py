"""Shared prefixes and packed choices against running every path alone, choice by choice."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from drllm.errors import RoutingError
from drllm.models.routing.policies import FixedPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring import prefix_sharing as sharing
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question
from drllm.paths import to_path

SUM_TOLERANCE = 1e-4
"""Nats that a summed log-probability may differ from the path run alone (design figure; 5e-6 was
measured on these models)."""

TELLING_ONLY = True

QUESTIONS = [
    Question([5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]),
    Question([20, 21], [[30, 31, 32, 33], [34], [35], [36, 37]]),
    Question([40, 41, 42, 43, 44, 45, 46], [[50, 51], [52, 53]]),
]
CONTEXTS = [question.context for question in QUESTIONS]


def some_pairs(num, num_layers=6, seed=0):
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < num:
        decisions = tuple(rng.choices([0, 1, 2], [2, 5, 2], k=num_layers))
        if any(decisions):
            pairs.append((rng.randrange(len(QUESTIONS)), decisions))
    return pairs


def prefixes(pairs):
    """Return the distinct states that paths go through."""
    return {
        (row, to_path(decisions)[:length])
        for row, decisions in pairs
        for length in range(1, sum(decisions) + 1)
    }


def alone(listed, model, question, decisions):
    """Score each continuation in a row of its own, without padding."""
    return listed(model, decisions).sums(question.context, question.continuations)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_shared_scores_equal_each_path_alone(tiny_llama, listed, attention):
    model = tiny_llama(attn_implementation=attention)
    pairs = some_pairs(24)
    expected = [alone(listed, model, QUESTIONS[row], decisions) for row, decisions in pairs]
    scores = ChoiceBatch(RoutedModel(model), QUESTIONS, 1.0).logprobs(pairs)
    for slow, fast in zip(expected, scores, strict=True):
        assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)


def test_scores_across_calls_reuse_states_and_stay_equal(tiny_llama):
    model = tiny_llama()
    pairs = some_pairs(30)
    routed = RoutedModel(model)
    at_once = ChoiceBatch(routed, QUESTIONS, 1.0).logprobs(pairs)
    batch = ChoiceBatch(routed, QUESTIONS, 1.0)
    one_by_one = [batch.logprobs([pair])[0] for pair in pairs]
    for first, second in zip(at_once, one_by_one, strict=True):
        assert first == pytest.approx(second, abs=SUM_TOLERANCE)
    run, asked = batch.states.executions_run, batch.states.executions_asked
    assert sum(sum(decisions) for _, decisions in pairs) == asked
    assert len(prefixes(pairs)) == run, "every distinct state is run exactly once"


def test_a_state_cache_that_is_too_small_costs_time_and_nothing_else(tiny_llama):
    model = tiny_llama()
    pairs = some_pairs(20)
    routed = RoutedModel(model)
    roomy = ChoiceBatch(routed, QUESTIONS, 1.0)
    tight = ChoiceBatch(routed, QUESTIONS, 20e-6)  # 20 kB: a handful of states
    for pair in pairs:
        assert roomy.logprobs([pair])[0] == pytest.approx(tight.logprobs([pair])[0], abs=1e-4)
    assert tight.states.num_bytes <= 20e3 < roomy.states.num_bytes
    assert tight.states.executions_run > roomy.states.executions_run


def test_deciding_and_scoring_in_one_pass_equals_scoring_under_that_route(tiny_llama):
    model = tiny_llama()
    routed = RoutedModel(model)
    plans = [(1, 0, 2, 1, 1, 1), (0, 1, 1, 1, 2, 1), (1, 1, 1, 1, 0, 0)]
    batch = ChoiceBatch(routed, QUESTIONS, 1.0)
    scores, route = batch.routed_scores(FixedPolicy(plans, 6))
    assert plans == [tuple(row) for row in route.tolist()]
    for fast, slow in zip(scores, batch.logprobs(list(enumerate(plans))), strict=True):
        assert slow == pytest.approx(fast.logprobs, abs=SUM_TOLERANCE)


def test_tokens_that_are_not_scored_are_read_like_those_of_the_prompt(tiny_llama, listed):
    model = tiny_llama()
    question = Question([5, 6, 7, 8], [[10, 11, 12, 13], [20, 21, 13], [30, 13]], [3, 2, 0])
    pairs = [(0, decisions) for _, decisions in some_pairs(8)]
    expected = []
    for _, decisions in pairs:
        plain = listed(model, decisions)
        sums = [
            plain.sums([*question.context, *tokens[:num]], [tokens[num:]])[0]
            for tokens, num in zip(question.continuations, question.num_unscored, strict=True)
        ]
        expected.append(sums)
    routed = RoutedModel(model)
    packed = ChoiceBatch(routed, [question], 1.0).logprobs(pairs)
    apart = [
        [ChoiceBatch(routed, [row], 1.0).logprobs([pair])[0][0] for row in question.apart()]
        for pair in pairs
    ]
    for slow, fast, row in zip(expected, packed, apart, strict=True):
        assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)
        assert slow == pytest.approx(row, abs=SUM_TOLERANCE)


def test_greedy_are_the_continuations_that_the_path_would_say_itself(tiny_llama, listed):
    model = tiny_llama()
    decisions = (1, 0, 2, 1, 1, 1)
    said = listed(model, decisions).greedy([5, 6, 7], 4)
    other = [said[0], said[1] + 1, said[2]]
    question = Question([5, 6, 7], [said, said[:2], other, [*other, 9]], [0, 0, 0, 3])
    last = int(listed(model, decisions).logits([5, 6, 7, *other])[-1].argmax()) == 9
    batch = ChoiceBatch(RoutedModel(model), [question], 1.0)
    [alone] = batch.scores([(0, decisions)], greedy=True)
    [routed_score], _ = batch.routed_scores(FixedPolicy(decisions, 6))
    assert (True, True, False, last) == alone.greedy == routed_score.greedy
    assert batch.scores([(0, decisions)])[0].greedy == ()


class Recorder:
    """A policy that executes everything and keeps what it could read."""

    def __init__(self):
        self.views = []

    def decide(self, layer, prompts):
        if layer == 0:
            self.views.append(prompts)
        return torch.ones(prompts.num_rows, dtype=torch.long)


def test_policies_read_the_context_and_no_candidate_answer(tiny_llama):
    model = tiny_llama()
    routed = RoutedModel(model)
    recorder = Recorder()
    ChoiceBatch(routed, QUESTIONS, 1.0).routed_scores(recorder)
    [view] = recorder.views
    for row, question in enumerate(QUESTIONS):
        readable = view.hidden[row][view.readable[row]]
        expected = model.model.embed_tokens(torch.tensor(question.context))
        assert torch.equal(expected, readable)


def test_paths_are_not_shared_where_a_skipped_layer_leaves_something_else(tiny_llama):
    routed = RoutedModel(tiny_llama(), bypass=lambda call, hidden: 2 * hidden)
    batch = ChoiceBatch(routed, [Question([5, 6], [[7], [8]])], state_cache_gb=1.0)
    with pytest.raises(RoutingError, match="passes its input on as it is"):
        batch.logprobs([(0, (1, 1, 1, 1, 1, 1))])


def never(place, text, finished):
    return 0.0 if finished else None


def test_answers_equal_plain_generation_of_each_path(tiny_llama, tiny_tokenizer, listed):
    model = tiny_llama(eos_token_id=None)
    pairs = some_pairs(16, seed=3)
    expected = [listed(model, d).greedy(QUESTIONS[row].context, 20) for row, d in pairs]
    batch = AnswerBatch(RoutedModel(model), tiny_tokenizer, CONTEXTS, 1.0)
    first = batch.answers(pairs[:9], [20] * 9, never)
    second = batch.answers(pairs[9:], [20] * 7, never)  # partly from states of the first call
    assert expected == [list(answer.tokens) for answer in first + second]


def test_an_answer_stops_at_its_verdict_and_lets_the_others_go_on(
    tiny_llama, tiny_tokenizer, listed
):
    model = tiny_llama(eos_token_id=None)
    pairs = some_pairs(8, seed=4)
    expected = [listed(model, d).greedy(QUESTIONS[row].context, 20) for row, d in pairs]

    def verdict(place, text, finished):
        return float(place) if finished or len(text) >= place + 1 else None

    answers = AnswerBatch(RoutedModel(model), tiny_tokenizer, CONTEXTS, 1.0).answers(
        pairs, [20] * 8, verdict
    )
    assert list(range(8)) == [answer.grade for answer in answers]
    lengths = [len(answer.tokens) for answer in answers]
    assert lengths[0] < 20, "the first answer must have stopped early"
    for slow, answer in zip(expected, answers, strict=True):
        assert slow[: len(answer.tokens)] == list(answer.tokens)


def test_an_answer_ends_at_the_end_of_sequence_token(tiny_llama, tiny_tokenizer, listed):
    model = tiny_llama(eos_token_id=None)
    tokens = listed(model, (1,) * 6).greedy(QUESTIONS[0].context, 20)
    model.generation_config.eos_token_id = tokens[4]
    [answer] = AnswerBatch(RoutedModel(model), tiny_tokenizer, CONTEXTS, 1.0).answers(
        [(0, (1,) * 6)], [20], never
    )
    assert tokens[: tokens.index(tokens[4])] == list(answer.tokens)


def test_the_logprob_of_an_answer_is_the_mean_over_its_tokens(tiny_llama, tiny_tokenizer, listed):
    model = tiny_llama(eos_token_id=None)
    decisions = (1, 0, 2, 1, 1, 1)
    slow = listed(model, decisions)
    batch = AnswerBatch(RoutedModel(model), tiny_tokenizer, CONTEXTS, 1.0)
    [answer] = batch.answers([(0, decisions)], [6], never)
    context = list(QUESTIONS[0].context)
    logprobs = slow.logits(context + list(answer.tokens)).log_softmax(-1)
    each = [float(logprobs[len(context) - 1 + k, t]) for k, t in enumerate(answer.tokens)]
    assert sum(each) / len(each) == pytest.approx(answer.logprob, abs=1e-4)


def test_more_pairs_than_one_pass_takes_keep_their_places(tiny_llama, tiny_tokenizer):
    routed = RoutedModel(tiny_llama(eos_token_id=None))
    pairs = some_pairs(37, seed=6)

    def verdict(place, text, finished):
        return float(place) if finished else None

    batch = AnswerBatch(routed, tiny_tokenizer, CONTEXTS, 1.0)
    limits = [1 + place % 3 for place in range(len(pairs))]
    answers = batch.answers(pairs, limits, verdict)
    assert [float(place) for place in range(len(pairs))] == [a.grade for a in answers]
    assert limits == [len(answer.tokens) for answer in answers]
    scores = ChoiceBatch(routed, QUESTIONS, 1.0).logprobs(pairs)
    last = ChoiceBatch(routed, QUESTIONS, 1.0).logprobs(pairs[-5:])
    for first, second in zip(scores[-5:], last, strict=True):
        assert first == pytest.approx(second, abs=SUM_TOLERANCE)


STEM = [60, 61, 62, 63, 64, 65, 66, 67]
WITH_STEM = [Question([*STEM, *q.context], q.continuations) for q in QUESTIONS]


def test_what_all_prompts_begin_with_is_run_once_for_all_of_them(tiny_llama, listed):
    model = tiny_llama()
    pairs = some_pairs(24)
    expected = [alone(listed, model, WITH_STEM[row], decisions) for row, decisions in pairs]
    batch = ChoiceBatch(RoutedModel(model), WITH_STEM, 1.0)
    scores = batch.logprobs(pairs[:12]) + batch.logprobs(pairs[12:])
    for slow, fast in zip(expected, scores, strict=True):
        assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)
    stems = {path for _, path in prefixes(pairs)}
    assert len(prefixes(pairs)) + len(stems) == batch.states.executions_run


def test_a_model_that_counts_the_rows_of_its_mask_scores_as_each_path_alone(tiny_model, listed):
    model, pairs = tiny_model("xglm"), some_pairs(12)
    expected = [alone(listed, model, WITH_STEM[row], decisions) for row, decisions in pairs]
    scores = ChoiceBatch(RoutedModel(model), WITH_STEM, 1.0).logprobs(pairs)
    for slow, fast in zip(expected, scores, strict=True):
        assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)


def test_answers_behind_a_common_beginning_equal_plain_generation(
    tiny_llama, tiny_tokenizer, listed
):
    model = tiny_llama(eos_token_id=None)
    pairs = some_pairs(16, seed=3)
    contexts = [question.context for question in WITH_STEM]
    expected = [listed(model, d).greedy(contexts[row], 12) for row, d in pairs]
    batch = AnswerBatch(RoutedModel(model), tiny_tokenizer, contexts, 1.0)
    assert batch.rows.past is not None
    answers = batch.answers(pairs, [12] * 16, never)
    assert expected == [list(answer.tokens) for answer in answers]


def test_continuations_behind_contexts_that_were_run_equal_each_path_alone(
    tiny_llama, tiny_tokenizer, listed
):
    model = tiny_llama(eos_token_id=None)
    pairs = some_pairs(20, seed=5)
    expected = {
        len(questions[0].context): [alone(listed, model, questions[row], d) for row, d in pairs]
        for questions in (QUESTIONS, WITH_STEM)
    }
    routed = RoutedModel(model)
    for questions in (QUESTIONS, WITH_STEM):
        answers = AnswerBatch(routed, tiny_tokenizer, [q.context for q in questions], 1.0)
        answers.answers(pairs[:15], [2] * 15, never)
        run = answers.states.executions_run
        batch = ChoiceBatch(routed, questions, 1.0, contexts=answers.rows)
        scores = batch.logprobs(pairs[:15])
        contexts_run = answers.states.executions_run - run
        assert contexts_run == len(prefixes(pairs[:15])), "nothing but the continuations is run"
        scores += batch.logprobs(pairs[15:])  # paths whose contexts weren't run yet
        slow_scores = expected[len(questions[0].context)]
        for slow, fast in zip(slow_scores, scores, strict=True):
            assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)


def test_answers_equal_plain_generation_in_families_of_every_kind(
    tiny_model, tiny_tokenizer, listed, family
):
    model = tiny_model(family)
    contexts = [question.context for question in WITH_STEM]  # longer than a sliding window
    pairs = some_pairs(8, seed=7)
    expected = [listed(model, d).greedy(contexts[row], 6) for row, d in pairs]
    model.generation_config.eos_token_id = None
    batch = AnswerBatch(RoutedModel(model), tiny_tokenizer, contexts, 1.0)
    answers = batch.answers(pairs, [6] * 8, never, kl=True)
    assert expected == [list(answer.tokens) for answer in answers]
    assert None not in [answer.kl for answer in answers]


@pytest.mark.parametrize("length", ["within a window", "longer than a window"])
def test_scores_equal_each_path_alone_in_families_of_every_kind(tiny_model, listed, family, length):
    model, questions = tiny_model(family), WITH_STEM
    if length == "within a window":
        questions = [Question(q.context[-2:], [c[:2] for c in q.continuations]) for q in WITH_STEM]
    pairs = some_pairs(8, seed=7)
    expected = [alone(listed, model, questions[row], decisions) for row, decisions in pairs]
    scores = ChoiceBatch(RoutedModel(model), questions, 1.0).logprobs(pairs)
    for slow, fast in zip(expected, scores, strict=True):
        assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)


@pytest.mark.parametrize("padding", [0, 5, 10_000])
def test_rows_of_unequal_length_share_runs_whatever_padding_costs(
    tiny_llama, listed, monkeypatch, padding
):
    monkeypatch.setitem(sharing.PADDING_WORTH_A_RUN, "cpu", padding)
    model = tiny_llama()
    pairs = some_pairs(12, seed=8)
    expected = [alone(listed, model, WITH_STEM[row], decisions) for row, decisions in pairs]
    scores = ChoiceBatch(RoutedModel(model), WITH_STEM, 1.0).logprobs(pairs)
    for slow, fast in zip(expected, scores, strict=True):
        assert slow == pytest.approx(fast, abs=SUM_TOLERANCE)


@pytest.mark.parametrize("num_paths", [1, 3, 7])
def test_scores_and_answers_do_not_depend_on_how_paths_are_split(
    tiny_llama, tiny_tokenizer, num_paths
):
    routed = RoutedModel(tiny_llama(eos_token_id=None))
    pairs = some_pairs(14, seed=9)
    limits = [1 + place % 4 for place in range(14)]
    contexts = [question.context for question in WITH_STEM]

    def both(paths_per_pass):
        scores = ChoiceBatch(routed, WITH_STEM, 1.0, paths_per_pass=paths_per_pass)
        answers = AnswerBatch(
            routed, tiny_tokenizer, contexts, 1.0, paths_per_pass=paths_per_pass
        ).answers(pairs, limits, never)
        return scores.logprobs(pairs), answers

    whole, split = both(100), both(num_paths)
    for first, second in zip(whole[0], split[0], strict=True):
        assert first == pytest.approx(second, abs=SUM_TOLERANCE)
    assert [a.tokens for a in whole[1]] == [a.tokens for a in split[1]]
    assert [a.logprob for a in whole[1]] == pytest.approx(
        [a.logprob for a in split[1]], abs=SUM_TOLERANCE
    )


def test_memory_stays_within_the_bound_but_for_what_one_pass_needs(tiny_llama, tiny_tokenizer):
    routed = RoutedModel(tiny_llama(eos_token_id=None))
    contexts = [question.context for question in WITH_STEM]
    pairs = some_pairs(20, seed=10)
    bound = 30e3
    batch = AnswerBatch(routed, tiny_tokenizer, contexts, bound / 1e9)
    needed = 0
    for pair in pairs:
        batch.answers([pair], [2], never, kl=True)
        assert batch.states.num_bytes <= bound
        row, decisions = pair
        tokens = len(contexts[row])
        # Hidden state, K and V of every execution, of the path and of the full path.
        needed = max(needed, (sum(decisions) + 6) * tokens * (32 + 2 * 2 * 8) * 4)
    distributions = sum(len(context) for context in contexts) * (101 + 1) * 4
    assert bound < batch.states.peak_bytes <= bound + needed + distributions


def tensors():
    """Return all tensors that are alive."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


def test_what_memory_holds_is_measured_on_the_tensors(tiny_llama, tiny_tokenizer):
    routed = RoutedModel(tiny_llama(eos_token_id=None))
    contexts = [question.context for question in QUESTIONS]
    batch = AnswerBatch(routed, tiny_tokenizer, contexts, 1.0)
    known = set(map(id, tensors()))
    batch.answers(some_pairs(10, seed=11), [3] * 10, never)
    new = [each for each in tensors() if id(each) not in known]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in new}
    assert sum(storages.values()) == batch.states.num_bytes
