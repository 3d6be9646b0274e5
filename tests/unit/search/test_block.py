"""Searching a block on a tiny model: what is recorded, and what neighbours don't change."""

from __future__ import annotations

import dataclasses

import pytest

import drllm
from drllm.config import SearchConfig
from drllm.errors import ModelError, TaskError
from drllm.models.base.prompts import render
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import full_decisions
from drllm.search.block import search_block
from drllm.search.evaluator import BlockEvaluator, gold_text
from drllm.tasks.base import get_task


def settings(**values):
    return SearchConfig(num_simulations=8, **values)


def test_a_record_holds_the_full_path_first_and_then_every_simulation(routed, facts):
    records = search_block(routed, facts.examples("search")[:3], facts, settings())
    for record in records:
        assert full_decisions(6) == record.full.decisions
        assert list(range(9)) == [path.simulation for path in record.paths]
        assert len(record.paths) == len({path.decisions for path in record.paths})
        assert all(path.executions == sum(path.decisions) for path in record.paths)


def test_recorded_outcomes_are_those_of_each_path_alone(routed, facts):
    examples = facts.examples("search")[:3]
    for record, example in zip(
        search_block(routed, examples, facts, settings()), examples, strict=True
    ):
        for path in record.paths:
            alone = BlockEvaluator(routed, [facts.prompt(example, "loglikelihood")], 1.0)
            [outcome] = alone.evaluate([(0, path.decisions)])
            assert outcome.reward == path.reward
            assert outcome.margin == pytest.approx(path.margin, abs=1e-4)


def test_neighbours_in_a_block_do_not_change_a_question_s_tree(routed, facts, assert_same_run):
    examples = facts.examples("search")[:4]
    together = search_block(routed, examples, facts, settings())
    alone = [drllm.search_path(routed, example, facts, settings()) for example in examples]
    assert_same_run(together, alone)


def test_another_seed_tries_other_paths(routed, facts):
    examples = facts.examples("search")[:1]
    [first] = search_block(routed, examples, facts, settings(seed=0))
    [second] = search_block(routed, examples, facts, settings(seed=1))
    assert {p.decisions for p in first.paths} != {p.decisions for p in second.paths}


def test_generated_answers_are_searched_and_recorded(routed):
    task = get_task("builtin_arithmetic")
    [record] = search_block(routed, task.examples("search")[:1], task, settings())
    assert record.reward == "boxed"
    assert all(path.answer is not None for path in record.paths)
    assert all(path.margin is not None for path in record.paths if path.reward < 1)


def test_the_prompt_in_the_record_is_what_the_model_read(routed, tiny_tokenizer):
    task = get_task("builtin_arithmetic")
    example = task.examples("search")[0]
    [record] = search_block(routed, [example], task, settings())
    prompt = task.prompt(example, "boxed")
    rendered = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == record.prompt


def test_a_model_without_its_tokenizer_is_refused(tiny_llama, facts):
    bare = RoutedModel(tiny_llama())
    with pytest.raises(TaskError, match="tokenizer"):
        drllm.search_path(bare, facts.examples("search")[0], facts, settings())


def test_several_leaves_a_round_try_as_many_paths(routed, facts):
    examples = facts.examples("search")[:2]
    for record in search_block(routed, examples, facts, settings(leaves_per_round=4)):
        assert len(record.paths) == 9
        assert record.paths[0].simulation == 0


def test_kl_is_recorded_only_where_it_is_wanted(routed, facts):
    examples = facts.examples("search")[:2]
    for record in search_block(routed, examples, facts, settings(kl=True)):
        assert record.full.kl == pytest.approx(0, abs=1e-6)
        assert all(path.kl > 1e-6 for path in record.paths[1:])
    for record in search_block(routed, examples, facts, settings(kl=False)):
        assert {None} == {path.kl for path in record.paths}


def test_paths_a_pass_change_no_record(routed, facts, assert_same_run):
    examples = facts.examples("search")[:3]
    as_many_as_fit = search_block(routed, examples, facts, settings())
    one = search_block(routed, examples, facts, settings(paths_per_pass=1))
    assert_same_run(as_many_as_fit, one)


def test_progress_within_a_block_ends_with_all_of_its_paths(routed, facts):
    calls = []
    examples = facts.examples("search")[:2]
    search_block(routed, examples, facts, settings(), lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert calls[0] == (0.0, 2)  # the full paths are no simulations
    assert calls[-1] == (1.0, 18)


def length(prompt, tokenizer):
    """Return what a prompt needs with the longest of what follows; a character is a token."""
    behind = [*map(len, prompt.continuations)] or [prompt.max_new_tokens, len(gold_text(prompt))]
    return len(render(tokenizer, prompt.text, chat=prompt.chat)) + max(behind)


@pytest.mark.parametrize("name", ["builtin_facts", "builtin_arithmetic"])
def test_a_question_must_fit_the_context_in_every_way_of_asking_it(
    tiny_llama, tiny_tokenizer, name
):
    task = get_task(name)
    example, reward = task.examples("search")[0], task.rewards[0]
    first = length(task.prompt(example, reward), tiny_tokenizer)
    longest = max(length(prompt, tiny_tokenizer) for prompt in task.retests(example, reward))
    assert longest > first, "the sample must hold a longer way"
    for context in (first - 1, longest - 1):
        tight = RoutedModel(tiny_llama(max_position_embeddings=context), tokenizer=tiny_tokenizer)
        with pytest.raises(ModelError, match=rf"tokens, and up to \d+ follow; .* holds {context};"):
            drllm.search_path(tight, example, task, settings())
    enough = RoutedModel(tiny_llama(max_position_embeddings=longest), tokenizer=tiny_tokenizer)
    assert len(drllm.search_path(enough, example, task, settings()).paths) == 9


def test_a_gold_answer_that_is_longer_than_answers_may_be_must_fit_too(
    tiny_llama, tiny_tokenizer, monkeypatch
):
    task = get_task("builtin_arithmetic")
    example = dataclasses.replace(task.examples("search")[0], answer="1" * 60)
    prompt = task.prompt(example, "boxed")
    monkeypatch.setattr(task, "retests", lambda example, reward: ())
    context = length(prompt, tiny_tokenizer) - 1
    tight = RoutedModel(tiny_llama(max_position_embeddings=context), tokenizer=tiny_tokenizer)
    assert prompt.max_new_tokens < len(gold_text(prompt))
    with pytest.raises(ModelError, match="up to 68 follow"):
        drllm.search_path(tight, example, task, settings())
