"""Shared prefixes and packed choices against running every path alone, choice by choice."""

import copy
import dataclasses
import gc
from functools import cache

import pytest
import torch

from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy, FullPolicy
from drllm.models.scoring import prefix_sharing as sharing
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from slow_way import (
    FULL,
    QUESTIONS,
    SUM_TOLERANCE,
    ListedModel,
    Recorder,
    assert_sums,
    greedy_alone,
    never,
    prefixes,
    said_to_slide,
    some_pairs,
    sums_alone,
)

TELLING_ONLY = True

STEM = [60, 61, 62, 63, 64, 65, 66, 67]
WITH_STEM = [Request([*STEM, *q.context], q.continuations) for q in QUESTIONS]
CONTEXTS = [question.context for question in QUESTIONS]
STEM_CONTEXTS = [question.context for question in WITH_STEM]
PATH = (1, 0, 2, 1, 1, 1)


def check_sums(model, questions, pairs, parts=1):
    """Hold a batch's scores, asked for in parts, to those of each path alone; return the batch."""
    expected = sums_alone(model, questions, pairs)
    batch = ChoiceBatch(RoutedModel(model), questions, 1.0)
    size = -(-len(pairs) // parts)
    starts = range(0, len(pairs), size)
    assert_sums(expected, [s for at in starts for s in batch.logprobs(pairs[at : at + size])])
    return batch


def tokens(answers):
    return [list(answer.tokens) for answer in answers]


@pytest.fixture
def endless(tiny_llama):
    """A model whose answers don't end by themselves."""
    return tiny_llama(eos_token_id=None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_shared_scores_equal_each_path_alone(tiny_llama, attention):
    check_sums(tiny_llama(attn_implementation=attention), QUESTIONS, some_pairs(24))


def test_scores_across_calls_reuse_states_and_stay_equal(tiny_llama):
    pairs = some_pairs(30)
    routed = RoutedModel(tiny_llama())
    at_once = ChoiceBatch(routed, QUESTIONS, 1.0).logprobs(pairs)
    batch = ChoiceBatch(routed, QUESTIONS, 1.0)
    assert_sums(at_once, [batch.logprobs([pair])[0] for pair in pairs])
    assert len(prefixes(pairs)) == batch.states.executions_run, "every state is run exactly once"


def test_a_state_cache_that_is_too_small_costs_time_and_nothing_else(tiny_llama):
    routed = RoutedModel(tiny_llama())
    roomy = ChoiceBatch(routed, QUESTIONS, 1.0)
    tight = ChoiceBatch(routed, QUESTIONS, 20e-6)  # 20 kB: a handful of states
    for pair in some_pairs(20):
        assert_sums(roomy.logprobs([pair]), tight.logprobs([pair]))
    assert tight.states.num_bytes <= 20e3 < roomy.states.num_bytes
    assert tight.states.executions_run > roomy.states.executions_run


@pytest.fixture(params=[False, True], ids=["packed", "rows apart"])
def model(tiny_llama, request):
    """A model whose choices are packed, and one whose choices stand in rows of their own."""
    return said_to_slide(tiny_llama()) if request.param else tiny_llama()


def test_deciding_and_scoring_in_one_pass_equals_scoring_under_that_route(model):
    plans = [PATH, (0, 1, 1, 1, 2, 1), (1, 1, 1, 1, 0, 0)]
    batch = ChoiceBatch(RoutedModel(model), QUESTIONS, 1.0)
    scores, route = batch.routed_scores(FixedPolicy(plans, 6))
    assert plans == [tuple(row) for row in route.tolist()]
    assert_sums(batch.logprobs(list(enumerate(plans))), scores)


def test_tokens_that_are_not_scored_are_read_like_those_of_the_prompt(tiny_llama):
    model = tiny_llama()
    question = Request([5, 6, 7, 8], [[10, 11, 12, 13], [20, 21, 13], [30, 13]], [3, 2, 0])
    pairs = [(0, decisions) for _, decisions in some_pairs(8)]
    parts = list(zip(question.continuations, question.num_unscored, strict=True))
    expected = [
        [
            ListedModel(model, path).sums([*question.context, *c[:num]], [c[num:]])[0]
            for c, num in parts
        ]
        for _, path in pairs
    ]
    routed = RoutedModel(model)
    assert_sums(expected, ChoiceBatch(routed, [question], 1.0).logprobs(pairs))
    apart = [
        [ChoiceBatch(routed, [row], 1.0).logprobs([pair])[0][0] for row in question.split()]
        for pair in pairs
    ]
    assert_sums(expected, apart)


def test_greedy_are_the_continuations_that_the_path_would_say_itself(tiny_llama):
    model = tiny_llama()
    listed = ListedModel(model, PATH)
    said = listed.greedy([5, 6, 7], 4)
    other = [said[0], said[1] + 1, said[2]]
    question = Request([5, 6, 7], [said, said[:2], other, [*other, 9]], [0, 0, 0, 3])
    last = int(listed.logits([5, 6, 7, *other])[-1].argmax()) == 9
    batch = ChoiceBatch(RoutedModel(model), [question], 1.0)
    [alone] = batch.scores([(0, PATH)], greedy=True)
    [routed_score], _ = batch.routed_scores(FixedPolicy(PATH, 6))
    assert (True, True, False, last) == alone.greedy == routed_score.greedy
    assert batch.scores([(0, PATH)])[0].greedy == ()


def test_policies_are_asked_once_a_question_and_read_its_context_alone(model):
    recorder = Recorder()
    ChoiceBatch(RoutedModel(model), QUESTIONS, 1.0).routed_scores(recorder)
    assert [len(QUESTIONS)] * 6 == [view.num_rows for view in recorder.views]
    recorder.assert_read(model, CONTEXTS)


def test_answers_equal_plain_generation_of_each_path(endless, tiny_tokenizer):
    pairs = some_pairs(16, seed=3)
    expected = greedy_alone(endless, CONTEXTS, pairs, 20)
    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, CONTEXTS, 1.0)
    first = batch.answers(pairs[:9], [20] * 9, never)
    second = batch.answers(pairs[9:], [20] * 7, never)  # partly from states of the first call
    assert expected == tokens(first + second)


def test_an_answer_stops_at_its_verdict_and_lets_the_others_go_on(endless, tiny_tokenizer):
    pairs = some_pairs(8, seed=4)
    expected = greedy_alone(endless, CONTEXTS, pairs, 20)

    def verdict(place, text, finished):
        return float(place) if finished or len(text) >= place + 1 else None

    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, CONTEXTS, 1.0)
    answers = batch.answers(pairs, [20] * 8, verdict)
    assert list(range(8)) == [answer.grade for answer in answers]
    assert len(answers[0].tokens) < 20, "the first answer must have stopped early"
    for slow, said in zip(expected, tokens(answers), strict=True):
        assert slow[: len(said)] == said


def test_an_answer_ends_at_the_end_of_sequence_token(endless, tiny_tokenizer):
    [said] = greedy_alone(endless, CONTEXTS, [(0, FULL)], 20)
    endless.generation_config.eos_token_id = said[4]
    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, CONTEXTS, 1.0)
    assert [said[: said.index(said[4])]] == tokens(batch.answers([(0, FULL)], [20], never))


def test_the_logprob_of_an_answer_is_the_mean_over_its_tokens(endless, tiny_tokenizer):
    slow = ListedModel(endless, PATH)
    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, CONTEXTS, 1.0)
    [answer] = batch.answers([(0, PATH)], [6], never)
    each = slow.each(CONTEXTS[0], answer.tokens)
    assert sum(each) / len(each) == pytest.approx(answer.logprob, abs=1e-4)


def test_what_all_prompts_begin_with_is_run_once_for_all_of_them(tiny_llama):
    pairs = some_pairs(24)
    batch = check_sums(tiny_llama(), WITH_STEM, pairs, parts=2)
    stems = {path for _, path in prefixes(pairs)}
    num_states = len(prefixes(pairs)) + len(stems)
    # Where a path ends, only scored tokens are kept; a later path that goes on runs it again.
    repeats = {path for _, path in prefixes(pairs) if path[-2:] == (5, 5)}
    assert num_states <= batch.states.executions_run <= num_states + len(repeats)


def test_a_model_that_counts_the_rows_of_its_mask_scores_as_each_path_alone(tiny_model):
    check_sums(tiny_model("xglm"), WITH_STEM, some_pairs(12))


def test_answers_behind_a_common_beginning_equal_plain_generation(endless, tiny_tokenizer):
    pairs = some_pairs(16, seed=3)
    expected = greedy_alone(endless, STEM_CONTEXTS, pairs, 12)
    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, STEM_CONTEXTS, 1.0)
    assert batch.rows.past is not None
    assert expected == tokens(batch.answers(pairs, [12] * 16, never))


@pytest.mark.parametrize("questions", [QUESTIONS, WITH_STEM], ids=["apart", "one beginning"])
def test_continuations_behind_contexts_that_were_run_equal_each_path_alone(
    endless, tiny_tokenizer, questions
):
    pairs = some_pairs(20, seed=5)
    expected = sums_alone(endless, questions, pairs)
    routed = RoutedModel(endless)
    answers = AnswerBatch(routed, tiny_tokenizer, [q.context for q in questions], 1.0)
    answers.answers(pairs[:15], [2] * 15, never)
    run = answers.states.executions_run
    batch = ChoiceBatch(routed, questions, 1.0, contexts=answers.rows)
    scores = batch.logprobs(pairs[:15])
    contexts_run = answers.states.executions_run - run
    assert contexts_run == len(prefixes(pairs[:15])), "nothing but the continuations is run"
    scores += batch.logprobs(pairs[15:])  # paths whose contexts weren't run yet
    assert_sums(expected, scores)


def test_answers_equal_plain_generation_in_families_of_every_kind(
    tiny_model, tiny_tokenizer, family
):
    model, pairs = tiny_model(family), some_pairs(8, seed=7)
    expected = greedy_alone(model, STEM_CONTEXTS, pairs, 6)  # longer than a sliding window
    model.generation_config.eos_token_id = None
    batch = AnswerBatch(RoutedModel(model), tiny_tokenizer, STEM_CONTEXTS, 1.0)
    answers = batch.answers(pairs, [6] * 8, never, kl=True)
    assert expected == tokens(answers)
    assert None not in [answer.kl for answer in answers]


@pytest.mark.parametrize("length", ["within a window", "longer than a window"])
def test_scores_equal_each_path_alone_in_families_of_every_kind(tiny_model, family, length):
    questions = WITH_STEM
    if length == "within a window":
        questions = [Request(q.context[-2:], [c[:2] for c in q.continuations]) for q in WITH_STEM]
    check_sums(tiny_model(family), questions, some_pairs(8, seed=7))


@pytest.mark.parametrize("padding", [0, 5, 10_000])
def test_rows_of_unequal_length_share_runs_whatever_padding_costs(tiny_llama, monkeypatch, padding):
    monkeypatch.setattr(sharing, "MAX_CPU_PADDING", padding)
    check_sums(tiny_llama(), WITH_STEM, some_pairs(12, seed=8))


@pytest.mark.parametrize("num_paths", [1, 3, 7])
def test_scores_and_answers_do_not_depend_on_how_paths_are_split(
    endless, tiny_tokenizer, num_paths
):
    routed, pairs = RoutedModel(endless), some_pairs(14, seed=9)
    limits = [1 + place % 4 for place in range(14)]

    def both(number):
        scores = ChoiceBatch(routed, WITH_STEM, 1.0, paths_per_pass=number)
        answers = AnswerBatch(routed, tiny_tokenizer, STEM_CONTEXTS, 1.0, paths_per_pass=number)
        place_at_end = lambda place, _, ended: float(place) if ended else None  # noqa: E731
        return scores.logprobs(pairs), answers.answers(pairs, limits, place_at_end)

    whole, split = both(100), both(num_paths)
    assert_sums(whole[0], split[0])
    assert tokens(whole[1]) == tokens(split[1])
    assert limits == [len(answer.tokens) for answer in split[1]]
    assert [*range(14)] == [answer.grade for answer in split[1]]
    assert [a.logprob for a in whole[1]] == pytest.approx(
        [a.logprob for a in split[1]], abs=SUM_TOLERANCE
    )


def test_memory_stays_within_the_bound_but_for_what_one_pass_needs(endless, tiny_tokenizer):
    bound, needed = 30e3, 0
    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, STEM_CONTEXTS, bound / 1e9)
    for row, decisions in some_pairs(20, seed=10):
        batch.answers([(row, decisions)], [2], never, kl=True)
        assert batch.states.num_bytes <= bound
        # Hidden state, K and V of every execution, of the path and of the full path.
        num_tokens = len(STEM_CONTEXTS[row])
        needed = max(needed, (sum(decisions) + 6) * num_tokens * (32 + 2 * 2 * 8) * 4)
    distributions = sum(map(len, STEM_CONTEXTS)) * (101 + 1) * 4
    assert bound < batch.states.peak_bytes <= bound + needed + distributions


def tensors():
    """Return all tensors that are alive."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


def test_what_memory_holds_is_measured_on_the_tensors(endless, tiny_tokenizer):
    batch = AnswerBatch(RoutedModel(endless), tiny_tokenizer, CONTEXTS, 1.0)
    known = set(map(id, tensors()))
    batch.answers(some_pairs(10, seed=11), [3] * 10, never)
    new = [each for each in tensors() if id(each) not in known]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in new}
    assert sum(storages.values()) == batch.states.num_bytes


# --- paths in any order, many in a pass --------------------------------------------------------

PATHS = [
    (0, 1, 2, 3, 4, 5),
    (0, 1, 2, 3, 2, 3, 4, 5),
    (5, 0, 3),
    (0, 1, 2, 3, 1, 2, 3, 4, 5),
    (2, 2, 2),
    (0, 1, 2, 3, 4, 5, 0, 1),
    (0, 1, 2),
]


def along(paths):
    return [(row, StaticPath(path)) for path in paths for row in range(2)]


@pytest.fixture(scope="module")
def path_by_path(tiny_model):
    """A function: family and questions → model, questions, paths, and scores of each path alone."""

    @cache
    def make(kind, questions):
        model, asked, paths = tiny_model(kind), QUESTIONS[:2], PATHS
        if questions != "apart":
            asked = [dataclasses.replace(q, context=[*range(3, 15), *q.context]) for q in asked]
        lists = [ListedModel(model, path=path) for path in paths]
        alone = [slow.sums(q.context, q.continuations) for slow in lists for q in asked]
        return model, asked, paths, alone

    return make


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("paths_per_pass", [1, 3, 100])
@pytest.mark.parametrize("questions", ["apart", "with a common beginning"])
def test_scores_along_paths_equal_those_of_each_path_alone(
    path_by_path, kind, paths_per_pass, questions
):
    model, asked, paths, expected = path_by_path(kind, questions)
    routed = RoutedModel(copy.deepcopy(model))
    batch = ChoiceBatch(routed, asked, 1.0, paths_per_pass=paths_per_pass)
    assert_sums(expected, batch.logprobs(along(paths)))


def test_the_beginnings_of_a_pass_are_run_once(tiny_llama):
    batch = ChoiceBatch(RoutedModel(tiny_llama()), QUESTIONS[:2], 1.0)
    batch.logprobs(along(PATHS))
    beginnings = {path[:length] for path in PATHS for length in range(1, len(path) + 1)}
    assert batch.states.executions_run == 2 * len(beginnings) < 2 * sum(map(len, PATHS))


def test_along_paths_the_policy_in_force_and_the_last_route_stay(tiny_llama):
    routed = RoutedModel(tiny_llama())
    batch = ChoiceBatch(routed, QUESTIONS[:2], 1.0)
    with routed.fixed(PATH):
        routed.model(torch.tensor([[5, 6]]))
        found = batch.logprobs(along([PATHS[0]]))
    assert routed.last_route.tolist() == [list(PATH)]
    assert_sums(found, batch.routed_scores(FullPolicy())[0])
