"""Scores of paths against each path and question run alone."""

import math

import pytest

from drllm.errors import ModelError
from drllm.model.prompts import encode, encode_continuation
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.search.evaluator import tokenize_prompt
from drllm.tasks.examples import Prompt, with_options
from drllm.tasks.prompt_formats import GAP
from drllm.tasks.registry import get_task
from drllm.tuning import path_scorer
from drllm.tuning.objectives import GOLD, KL, LOSS
from drllm.tuning.path_scorer import (
    grade_answers,
    log_share,
    make_items,
    make_text_items,
    score_paths,
)
from slow_way import ListedModel, kls_alone

PATHS = [
    StaticPath(range(6)),
    StaticPath([0, 2, 3, 4, 5]),
    StaticPath([0, 1, 3, 4, 5]),
    StaticPath([0, 1, 2, 1, 2, 3, 4, 5]),
]
TOLERANCE = 1e-4


def prompts(task, num=6):
    chosen = get_task(task)
    return [chosen.prompt(each, chosen.rewards[0]) for each in chosen.examples("select")[:num]]


@pytest.fixture(scope="module")
def asked():
    return prompts("builtin_facts")


def judged(routed, items, objective):
    return score_paths(routed, items, PATHS, objective, 1.0)


@pytest.fixture(scope="module")
def slow(tiny_llama):
    model = tiny_llama(max_position_embeddings=1024)
    return [ListedModel(model, path=path.layers) for path in PATHS]


def test_the_gold_log_probability_and_the_choice_are_those_of_each_path_alone(routed, asked, slow):
    found = judged(routed, make_items(routed, asked, GOLD), GOLD)
    for path, values, right in zip(slow, found.objective, found.right, strict=True):
        for prompt, value, is_right in zip(asked, values, right, strict=True):
            prompt_tokens = tokenize_prompt(routed, prompt)
            sums = path.sums(prompt_tokens.tokens, prompt_tokens.continuations)
            assert value == pytest.approx(log_share(sums, prompt.gold), abs=TOLERANCE)
            assert is_right == (sums.index(max(sums)) == prompt.gold)


def test_options_that_fill_a_gap_are_scored_by_what_follows_as_each_sentence_alone(routed, slow):
    sentences = ["She thanked _ for the tea.", "Ann hid it from Eve, so  _ found nothing."]
    names = ("Ann", "Eve and Bo")
    asked = [GAP.prompts(with_options(each, names, 1), "loglikelihood")[0] for each in sentences]
    found = judged(routed, make_items(routed, asked, GOLD), GOLD)
    for path, values, right in zip(slow, found.objective, found.right, strict=True):
        for sentence, value, is_right in zip(sentences, values, right, strict=True):
            before, _, after = sentence.partition("_")
            sums = []
            for name in names:
                context = encode(routed.tokenizer, before + name)
                rest = encode_continuation(routed.tokenizer, before + name, after)
                sums += path.sums(context, [rest])
            assert value == pytest.approx(log_share(sums, 1), abs=TOLERANCE)
            assert is_right == (sums[1] > sums[0])


def test_the_loss_of_right_answers_is_that_of_each_path_alone(routed, slow):
    asked = prompts("builtin_arithmetic", 4)
    found = judged(routed, make_items(routed, asked, LOSS), LOSS)
    for path, values in zip(slow, found.objective, strict=True):
        for prompt, value in zip(asked, values, strict=True):
            prompt_tokens = tokenize_prompt(routed, prompt)
            [tokens] = prompt_tokens.continuations
            each = path.each(prompt_tokens.tokens, tokens)
            assert value == pytest.approx(sum(each) / len(each), abs=TOLERANCE)


def test_a_text_is_read_whole_but_its_first_token(routed, asked, slow):
    items = make_text_items(routed, asked)
    found = judged(routed, items, LOSS)
    prompt_tokens = tokenize_prompt(routed, asked[0])
    tokens = [*prompt_tokens.tokens, *prompt_tokens.continuations[asked[0].gold]]
    each = slow[1].each(tokens[:1], tokens[1:])
    assert found.objective[1][0] == pytest.approx(sum(each) / len(each), abs=TOLERANCE)


def test_the_kl_is_that_of_the_prompts_tokens_and_needs_no_answer(routed, asked, tiny_llama):
    found = judged(routed, make_items(routed, asked, KL), KL)
    assert found.objective[0] == [0.0] * len(asked)
    contexts = [tokenize_prompt(routed, prompt).tokens for prompt in asked]
    pairs = [(row, (1, 0, 1, 1, 1, 1)) for row in range(len(asked))]
    expected = kls_alone(tiny_llama(max_position_embeddings=1024), contexts, pairs)
    assert found.objective[1] == pytest.approx([-kl for kl in expected], abs=TOLERANCE)


def test_prompts_without_answers_score_as_the_prompts_of_questions_do(routed, asked):
    alone = [Prompt(text=p.text, reward="loglikelihood", answer="", chat=p.chat) for p in asked]
    found, expected = (judged(routed, make_items(routed, each, KL), KL) for each in (alone, asked))
    assert found.objective == expected.objective


def test_questions_asked_in_two_goes_score_as_in_one(routed, asked):
    items = make_items(routed, asked, GOLD)
    whole, first, rest = (judged(routed, each, GOLD) for each in (items, items[:2], items[2:]))
    for path in range(len(PATHS)):
        joined = first.objective[path] + rest.objective[path]
        assert joined == pytest.approx(whole.objective[path], abs=TOLERANCE)


def test_a_value_that_is_not_finite_is_the_worst_there_is(routed, asked, monkeypatch):
    monkeypatch.setattr(path_scorer, "_judge_outcome", lambda *_: (-math.inf, False))
    items = make_items(routed, asked[:1], GOLD)
    assert score_paths(routed, items, PATHS[1:2], GOLD, 1.0).objective == [[-100.0]]
    with pytest.raises(ModelError, match="--dtype float32"):
        score_paths(routed, items, PATHS[:1], GOLD, 1.0)


def test_answers_are_generated_along_the_path_and_graded(tiny_llama, tiny_tokenizer):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    path = PATHS[2]
    slow = ListedModel(tiny_llama(), path=path.layers)
    prompt = Prompt(text="abc", reward="exact", answer="x", max_new_tokens=4)
    tokens = tokenize_prompt(routed, prompt).tokens
    says = tiny_tokenizer.decode(slow.greedy(tokens, 4), skip_special_tokens=True)
    right = Prompt(text="abc", reward="exact", answer=says.strip() or "?", max_new_tokens=4)
    assert grade_answers(routed, path, [right, prompt])[1] == 0.0
    if says.strip():
        assert grade_answers(routed, path, [right]) == [1.0]
