"""Choices that can't be packed, in rows of their own, against packed ones and each alone."""

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import drllm
from drllm.config import SearchConfig
from drllm.errors import RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy, RouterPolicy
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request
from drllm.tasks.registry import get_task
from slow_way import (
    FULL,
    Opaque,
    assert_sums,
    kls_alone,
    never,
    prefixes,
    said_to_slide,
    some_pairs,
    sums_alone,
    tiny_routers,
)

KL_TOLERANCE = 2e-5
"""Nats a token; as where choices are packed. 4e-6 was measured."""

SLIDING = ("mistral", "gemma3_text", "gpt_neo", "llama4_text")
"""Layers that see 8 tokens: all of them; two of three; every other one, by column; in chunks."""

QUESTIONS = [
    Request([60, 61, 62, 63, 64, 65, 5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]),
    Request([20, 21], [[30, 31, 32, 33], [34], [35], [36, 37]]),
    Request([40, 41, 42, 43, 44, 45, 46, 47, 48], [[50], [52], [53]]),  # none of them is read
]
NUM_ROWS = [3, 4, 1]


CONTEXTS = [question.context for question in QUESTIONS]


def alone(model, pairs):
    return sums_alone(model, QUESTIONS, pairs)


def along(route):
    """Return the pairs of a route for each question."""
    return [(place, tuple(row)) for place, row in enumerate(route.tolist())]


@pytest.fixture(params=SLIDING)
def sliding(request, tiny_model):
    """A model that slides, unless the installed transformers gets its padded rows wrong itself."""
    model = tiny_model(request.param)
    tokens = torch.arange(5, 19)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(tokens).logits[0]
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[0, 3:]
    if not torch.allclose(alone, beside, atol=1e-3):
        pytest.skip(f"transformers {transformers.__version__}: the plain model isn't itself padded")
    return model


def test_choices_longer_than_a_window_equal_each_path_alone(sliding):
    pairs = some_pairs(12)
    expected = alone(sliding, pairs)
    full = alone(sliding, [(place, FULL) for place in range(3)])
    batch = ChoiceBatch(RoutedModel(sliding), QUESTIONS, 1.0)
    assert_sums(expected, batch.logprobs(pairs[:8]) + batch.logprobs(pairs[8:]))
    assert_sums(full, batch.routed_scores(FixedPolicy(FULL, 6))[0])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_choices_that_fit_the_context_one_by_one_equal_each_path_alone(kind, tiny_model):
    """Some models keep a mask of the context's size, which together they would exceed."""
    question = Request([5, 6, 7, 8, 9], [[10, 11, 12], [13, 14, 15], [16, 17, 18]])
    windows = {"window_size": 64} if kind == "gpt_neo" else {}
    model = tiny_model(kind, attention="eager", max_position_embeddings=8, **windows)
    paths = [decisions for _, decisions in some_pairs(6)]
    pairs = [(0, path) for path in paths]
    expected = sums_alone(model, [question], pairs)
    assert_sums(expected, ChoiceBatch(RoutedModel(model), [question], 1.0).logprobs(pairs))


def test_paths_of_a_row_of_its_own_share_their_states(tiny_model):
    batch = ChoiceBatch(RoutedModel(tiny_model("mistral")), QUESTIONS, 1.0)
    pairs = some_pairs(20)
    for pair in pairs:
        batch.logprobs([pair])
    assert sum(NUM_ROWS[place] for place, _ in prefixes(pairs)) == batch.states.executions_run


FITS, TOO_LONG = Request([5, 6, 7, 8], [[1, 2, 3], [4, 5, 6]]), QUESTIONS[0]  # 8 tokens


@pytest.mark.parametrize(
    ("window", "questions", "num_rows"),
    [(8, [FITS], 1), (8, [FITS, TOO_LONG], 2), (0, [FITS, TOO_LONG], 1)],  # 0: it doesn't slide
)
def test_one_question_longer_than_a_window_sets_the_rows_of_all_apart(
    tiny_llama, window, questions, num_rows
):
    model = tiny_llama()
    model.config.sliding_window = window
    batch = ChoiceBatch(RoutedModel(model), questions, 1.0)
    batch.logprobs([(0, FULL)])
    assert 6 * num_rows == batch.states.executions_run


@pytest.fixture(scope="module")
def of_mistral(tiny_model):
    """A sliding model, some paths, and the KL and scores of each path alone."""
    model, pairs = tiny_model("mistral"), [*some_pairs(10, seed=1), (1, FULL)]
    return model, pairs, kls_alone(model, CONTEXTS, pairs), alone(model, pairs)


@pytest.mark.parametrize("num_paths", [None, 1, 4])
@pytest.mark.parametrize("gb", [1.0, 10e-6])  # 10 kB hold the distributions of one row at most
def test_kl_is_measured_on_one_row_of_a_question(of_mistral, num_paths, gb):
    model, pairs, expected, sums = of_mistral
    model = copy.deepcopy(model)
    assert min(expected[:-1]) > 0.01, "the paths must do some KL"
    batch = ChoiceBatch(RoutedModel(model), QUESTIONS, gb, paths_per_pass=num_paths)
    scores = batch.scores(pairs, kl=True)
    assert expected == pytest.approx([s.kl for s in scores], abs=KL_TOLERANCE)
    assert_sums(sums, scores)
    if gb == 1.0:  # the full path beside others runs on the measured row alone
        run = sum(NUM_ROWS[place] for place, _ in prefixes(pairs))
        measured_too = {(place, FULL) for place, _ in pairs} - {(1, FULL)}
        added = prefixes([*pairs, *measured_too]) - prefixes(pairs)
        assert run + len(added) == batch.states.executions_run


def test_routers_take_the_routes_that_they_take_where_choices_are_packed(tiny_llama):
    routed = RoutedModel(tiny_llama())
    policy = RouterPolicy(tiny_routers(seed=2))
    packed, packed_route = ChoiceBatch(routed, QUESTIONS, 1.0).routed_scores(policy)
    said_to_slide(routed.model)
    apart, route = ChoiceBatch(routed, QUESTIONS, 1.0).routed_scores(policy)
    assert {0, 1, 2} == set(route.flatten().tolist()), "the sample must be a test"
    assert len(set(map(tuple, route.tolist()))) == len(QUESTIONS), "the sample must be a test"
    assert packed_route.tolist() == route.tolist() == routed.last_route.tolist()
    assert_sums(packed, apart)


def test_routes_of_rows_apart_score_as_those_paths_do_alone(sliding):
    routed = RoutedModel(sliding, tiny_routers(seed=2))
    batch = ChoiceBatch(routed, QUESTIONS, 1.0)
    found, route = batch.routed_scores(RouterPolicy(routed.routers))
    # The routers read the context: the route of a question without choices is the same.
    for question, decisions in zip(QUESTIONS, route.tolist(), strict=True):
        with torch.no_grad():
            routed.model(torch.tensor([question.context]), use_cache=False)
        assert [decisions] == routed.last_route.tolist()
    routed.detach()
    assert_sums(alone(sliding, along(route)), found)


def test_continuations_of_answered_prompts_equal_each_path_alone(tiny_model, tiny_tokenizer):
    model = tiny_model("mistral")
    pairs = some_pairs(12, seed=5)
    expected = alone(model, pairs)
    answers = AnswerBatch(RoutedModel(model), tiny_tokenizer, CONTEXTS, 1.0)
    answers.answers(pairs[:8], [2] * 8, never)
    batch = ChoiceBatch(answers.routed, QUESTIONS, 1.0, contexts=answers.rows)
    assert_sums(expected, batch.logprobs(pairs))


def lengths_only(module, query, key, value, attention_mask, sliding_window=None, **options):
    """Attention that is told which tokens are real and makes out the rest, as flash attention."""
    T = query.shape[2]
    assert key.shape[2] == T
    assert attention_mask is None or attention_mask.dim() == 2, "no other mask can be taken"
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & (distance < (sliding_window or T))
    if attention_mask is not None:  # padding sees itself alone
        seen = seen & attention_mask[:, None, None].bool() | torch.eye(T, dtype=torch.bool)
    seen = seen.expand(len(query), 1, T, T)
    return sdpa_attention_forward(module, query, key, value, seen, **options)


def real_tokens(*_args, attention_mask=None, **_options):
    return attention_mask


@pytest.fixture
def register(monkeypatch):
    """A function that registers an attention implementation, and what makes its masks."""

    def add(name, make_mask):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, lengths_only)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, make_mask)
        return name

    return add


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_attention_that_takes_no_mask_for_packing_scores_rows_apart(tiny_model, register, kind):
    attention = register("lengths_only", real_tokens)
    model = tiny_model(kind, attention="sdpa")
    pairs = some_pairs(12, seed=2)
    expected = alone(model, pairs)
    routed = RoutedModel(tiny_model(kind, attention=attention))
    batch = ChoiceBatch(routed, QUESTIONS, 1.0)
    assert_sums(expected, batch.logprobs(pairs))
    found, route = batch.routed_scores(RouterPolicy(tiny_routers(seed=2)))
    assert_sums(alone(model, along(route)), found)


def test_attention_whose_masks_cannot_be_cut_is_refused(tiny_llama, tiny_tokenizer, register):
    routed = RoutedModel(tiny_llama())
    routed.model.config._attn_implementation = register("opaque", lambda *_, **_options: Opaque())
    choices = ChoiceBatch(routed, QUESTIONS, 1.0)
    answers = AnswerBatch(routed, tiny_tokenizer, CONTEXTS, 1.0)
    pairs = [(0, (1, 1, 0, 1, 1, 1))]
    with pytest.raises(RoutingError, match="Opaque, which can't be cut by rows"):
        choices.logprobs(pairs)
    with pytest.raises(RoutingError, match="Opaque, which can't be cut by rows"):
        answers.answers(pairs, [2], lambda *_: 0.0)


def test_a_search_finds_the_same_where_choices_stand_in_rows_of_their_own(
    tiny_llama, tiny_tokenizer, assert_same_run
):
    task = get_task("builtin_facts")
    examples = task.examples("search")[:12]
    config = SearchConfig(num_simulations=8)
    routed = RoutedModel(tiny_llama(max_position_embeddings=1024), tokenizer=tiny_tokenizer)
    packed = drllm.search_paths(routed, examples, config)
    said_to_slide(routed.model)
    apart = drllm.search_paths(routed, examples, config)
    assert_same_run(packed, apart)
    retested = [path for record in apart for path in record.paths if path.retest is not None]
    assert retested, "the sample must hold candidates"


def test_choices_of_a_model_that_counts_columns_are_not_packed(tiny_model):
    """ALiBi has no positions to say that each continuation goes on where the prompt ends."""
    model = tiny_model("mpt")
    full = alone(model, [(place, FULL) for place in range(3)])
    batch = ChoiceBatch(RoutedModel(model), QUESTIONS, 1.0)
    found, _ = batch.routed_scores(FixedPolicy(FULL, 6))
    assert_sums(full, found)
