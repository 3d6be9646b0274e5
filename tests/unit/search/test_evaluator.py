"""Outcomes against asking the plain model one path, one question, one choice at a time."""

import dataclasses
import itertools
from collections import Counter
from statistics import mean

import pytest
import torch

import slow_way
from drllm.errors import ModelError
from drllm.model.prompts import encode, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import LayerCall
from drllm.models.scoring import answers
from drllm.models.scoring.score import Outcome
from drllm.search.evaluator import Evaluator, gold_text, tokenize_prompt
from drllm.tasks.examples import Prompt
from drllm.tasks.rewards import grade
from slow_way import FULL, ListedModel, kls_alone

KINDS = ("llama", "mistral")
"""Choices are packed behind one context, or don't fit the window and stand in rows of their own."""

MARGIN_TOLERANCE = 1e-4
"""Nats; the design's figure for records of equal runs. 1e-5 was measured here."""

CHOICES = [
    Prompt(
        text=f"Question: which is {word}?\nAnswer:",
        reward="loglikelihood",
        answer=options[gold],
        continuations=tuple(f" {option}" for option in options),
        gold=gold,
    )
    for word, options, gold in [
        ("red", ["a cat", "rust", "snow"], 1),
        ("tall", ["a tower", "a pin"], 0),
        ("wet", ["the sea", "sand", "dust", "ash"], 0),
    ]
]
CHAT_TEMPLATE = "user: {{ messages[0]['content'] }}\\nassistant: "
QUESTIONS = [("Say something:", False), ("And now:", True), ("At last", False)]
NUM_NEW = 6


def some_pairs(num, seed=0):
    """Each prompt's full path, then others."""
    return [*((place, FULL) for place in range(3)), *slow_way.some_pairs(num - 3, seed)]


def encoded(tokenizer, text, *continuations):
    """Return the context's tokens, and those that each continuation adds."""
    context = encode(tokenizer, text)
    return context, [encode(tokenizer, text + each)[len(context) :] for each in continuations]


@pytest.mark.parametrize("kind", KINDS)
def test_choices_give_the_reward_and_margin_of_plain_scoring(tiny_model, tiny_tokenizer, kind):
    model = tiny_model(kind)
    pairs, expected = some_pairs(24), []
    for place, decisions in pairs:
        prompt = CHOICES[place]
        asked = encoded(tiny_tokenizer, prompt.text, *prompt.continuations)
        sums = ListedModel(model, decisions).sums(*asked)
        best = sums.index(max(sums))
        others = [value for index, value in enumerate(sums) if index != prompt.gold]
        expected.append((float(best == prompt.gold), sums[prompt.gold] - max(others)))
    assert {reward for reward, _ in expected} == {0.0, 1.0}, "the sample must hold both verdicts"
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    for outcome, (reward, margin) in zip(
        Evaluator(routed, CHOICES, 1.0).evaluate(pairs), expected, strict=True
    ):
        assert outcome.reward == reward
        assert outcome.margin == pytest.approx(margin, abs=MARGIN_TOLERANCE)


def slow_answer(model, decisions, tokenizer, prompt):
    row = encode(tokenizer, render(tokenizer, prompt.text, chat=prompt.chat))
    new = ListedModel(model, decisions).greedy(row, prompt.max_new_tokens)
    end = model.generation_config.eos_token_id
    said = itertools.takewhile(lambda token: token != end, new)
    return tokenizer.decode([*said], skip_special_tokens=True)


def asked_and_answered(model, tokenizer, pairs):
    """Ask each pair's question the slow way, and let the gold answer be what one path says."""
    prompts = [
        Prompt(text=text, chat=chat, reward="exact", answer="", max_new_tokens=NUM_NEW)
        for text, chat in QUESTIONS
    ]
    texts = [slow_answer(model, d, tokenizer, prompts[place]) for place, d in pairs]
    for place, prompt in enumerate(prompts):
        said = [t for (p, _), t in zip(pairs, texts, strict=True) if p == place and t.strip()]
        prompts[place] = dataclasses.replace(prompt, answer=max(said, key=said.count))
    return prompts, texts


def answered(tiny_model, tokenizer, kind):
    """Return a model, pairs, what `asked_and_answered` gives, and an evaluator of it."""
    model, pairs = tiny_model(kind), some_pairs(40, seed=1)
    prompts, texts = asked_and_answered(model, tokenizer, pairs)
    routed = RoutedModel(model, tokenizer=tokenizer)
    return model, pairs, prompts, texts, Evaluator(routed, prompts, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_get_the_grade_of_plain_generation_and_margins_against_wrong_ones(
    tiny_model, tiny_tokenizer, kind
):
    model, pairs, prompts, texts, evaluator = answered(tiny_model, tiny_tokenizer, kind)
    outcomes = evaluator.with_margins(pairs, evaluator.evaluate(pairs))
    evaluator.routed.detach()
    for (place, _), text, outcome in zip(pairs, texts, outcomes, strict=True):
        assert outcome.reward == grade(prompts[place], text)
        assert text.startswith(outcome.answer), "an answer is a beginning of the plain one"
    wrong: dict[int, Counter] = {place: Counter() for place in range(len(prompts))}
    for (place, _), outcome in zip(pairs, outcomes, strict=True):
        if outcome.reward < 1 and outcome.tokens:
            wrong[place][outcome.tokens] += 1
    seen = set()
    for (place, decisions), outcome in zip(pairs, outcomes, strict=True):
        plain = ListedModel(model, decisions)
        text = render(tiny_tokenizer, prompts[place].text, chat=prompts[place].chat)
        gold = gold_text(prompts[place], tiny_tokenizer)
        context, tokens = encoded(tiny_tokenizer, text, gold)
        expected = plain.sums(context, tokens)[0] / len(gold)
        if outcome.reward < 1:
            expected -= outcome.logprob
        else:
            common = wrong[place].most_common(4)
            expected -= max(mean(plain.each(context, tokens)) for tokens, _ in common)
        assert expected == pytest.approx(outcome.margin, abs=MARGIN_TOLERANCE)
        seen.add(outcome.reward)
    assert seen == {0.0, 1.0}, "the sample must hold both verdicts"


@pytest.mark.parametrize("kind", ["llama", pytest.param("mistral", marks=pytest.mark.thorough)])
def test_margins_of_wrong_paths_may_be_taken_before_the_others_are_known(
    tiny_model, tiny_tokenizer, kind
):
    _, pairs, _, _, evaluator = answered(tiny_model, tiny_tokenizer, kind)
    early = []
    for start in range(0, len(pairs), 10):
        part = pairs[start : start + 10]
        early += evaluator.with_margins(part, evaluator.evaluate(part), wrong_only=True)
    assert {outcome.margin is None for outcome in early if outcome.reward < 1} == {False}
    assert {outcome.margin is None for outcome in early if outcome.reward >= 1} == {True}
    evaluator.forget()
    expected = evaluator.with_margins(pairs, evaluator.evaluate(pairs))
    found = [outcome.margin for outcome in evaluator.with_margins(pairs, early)]
    assert found == pytest.approx([outcome.margin for outcome in expected], abs=MARGIN_TOLERANCE)


@pytest.mark.parametrize("max_idle_steps", [0.0, 0.3, 100.0])
def test_answers_are_the_same_however_long_answered_rows_are_run_on_with(
    tiny_llama, tiny_tokenizer, monkeypatch, max_idle_steps
):
    limits = (1, 3, 9)
    prompts = [
        Prompt(text=f"Say {limit}:", reward="boxed", answer="1", max_new_tokens=limit)
        for limit in limits
    ]
    model = tiny_llama(eos_token_id=None)
    pairs = some_pairs(12, seed=3)
    expected = [
        ListedModel(model, decisions).greedy(
            encode(tiny_tokenizer, prompts[place].text), limits[place]
        )
        for place, decisions in pairs
    ]
    monkeypatch.setattr(answers, "MAX_IDLE_STEPS", max_idle_steps)
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    found = Evaluator(routed, prompts, 1.0).evaluate(pairs)
    assert [[*outcome.tokens] for outcome in found] == [[*tokens] for tokens in expected]


def test_an_answered_row_that_is_run_on_with_never_goes_beyond_the_context(
    tiny_model, tiny_tokenizer, monkeypatch
):
    """GPT-2 has an embedding for each of its positions, and no more."""
    model = tiny_model("gpt2")
    context = model.config.n_positions
    long = "a" * (context - 12)  # a token each
    prompts = [
        Prompt(text=text, reward="boxed", answer="1", max_new_tokens=limit)
        for text, limit in ((long, 2), ("Say:", 20))
    ]
    assert context - 20 < len(encode(tiny_tokenizer, long)) <= context - 2
    monkeypatch.setattr(answers, "MAX_IDLE_STEPS", 100.0)
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    found = Evaluator(routed, prompts, 1.0).evaluate([(0, FULL), (1, FULL)])
    routed.detach()
    expected = [
        ListedModel(model, FULL).greedy(encode(tiny_tokenizer, p.text), p.max_new_tokens)
        for p in prompts
    ]
    assert [[*outcome.tokens] for outcome in found] == [[*tokens] for tokens in expected]


@pytest.mark.parametrize(("template", "expected"), [(None, " 42"), (CHAT_TEMPLATE, "42")])
@pytest.mark.parametrize("reward", ["boxed", "exact"])
def test_a_gold_answer_is_glued_to_the_prompt_only_as_a_turn_of_the_chat_template(
    tiny_llama, tiny_tokenizer, monkeypatch, template, expected, reward
):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    prompt = Prompt(text="Think.", reward=reward, answer="42", chat=True)
    [gold] = tokenize_prompt(routed, prompt).continuations
    if reward == "boxed":
        expected = expected.replace("42", r"\boxed{42}")
    assert tiny_tokenizer.decode(gold) == expected


@pytest.mark.parametrize("chat", [True, False])
def test_the_margins_of_a_question_do_not_depend_on_a_question_without_a_gold_answer(
    tiny_llama, tiny_tokenizer, chat
):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    with_gold, without_gold = (
        Prompt(text=text, reward="exact", answer=answer, chat=chat, max_new_tokens=3)
        for text, answer in (("What is ice?", "water"), ("Name a metal.", ""))
    )
    found = []
    for prompts in ([with_gold], [with_gold, without_gold]):
        evaluator = Evaluator(routed, prompts, 1.0)
        pairs = [(place, FULL) for place in range(len(prompts))]
        found.append(evaluator.with_margins(pairs, evaluator.evaluate(pairs)))
    [alone], [beside, other] = found
    assert alone.margin == pytest.approx(beside.margin, abs=MARGIN_TOLERANCE)
    assert other.margin is None


def test_a_right_answer_that_nobody_got_wrong_has_no_margin(tiny_llama, tiny_tokenizer):
    prompt = Prompt(text="x", reward="exact", answer="y", max_new_tokens=4)
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    evaluator = Evaluator(routed, [prompt], 1.0)
    pairs = [(0, FULL)]
    [outcome] = evaluator.evaluate(pairs)
    [right] = evaluator.with_margins(pairs, [dataclasses.replace(outcome, reward=1.0)])
    assert right.margin is None


def test_a_question_s_limit_of_tokens_is_its_own(tiny_llama, tiny_tokenizer):
    prompts = [
        Prompt(text="Say:", reward="boxed", answer="1", max_new_tokens=limit) for limit in (3, 9)
    ]
    model = tiny_llama(eos_token_id=None)
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    outcomes = Evaluator(routed, prompts, 1.0).evaluate([(0, FULL), (1, FULL)])
    assert [len(outcome.tokens) for outcome in outcomes] == [3, 9]


def test_a_path_that_overflows_is_wrong_but_a_base_model_that_does_is_an_error(
    tiny_llama, tiny_tokenizer
):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    for bad in (float("nan"), float("inf"), float("-inf")):
        evaluator, scores = Evaluator(routed, CHOICES, 1.0), Outcome((-1.0, bad, -2.0))
        evaluator._scorer.score = lambda pairs, kl, scores=scores: [scores for _ in pairs]
        [outcome] = evaluator.evaluate([(0, (1, 2, 1, 1, 1, 1))])
        assert (outcome.reward, outcome.margin) == (0.0, None)
        with pytest.raises(ModelError, match="--dtype float32"):
            evaluator.evaluate([(0, FULL)])


def test_outcomes_carry_kl_when_it_is_asked_for(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    pairs = [(0, (1, 1, 0, 1, 1, 2)), (1, FULL), (2, (1, 0, 1, 1, 1, 1))]
    expected = kls_alone(model, [encode(tiny_tokenizer, each.text) for each in CHOICES], pairs)
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    generated = [dataclasses.replace(p, reward="exact", continuations=()) for p in CHOICES]
    for prompts in (CHOICES, generated):
        evaluator = Evaluator(routed, prompts, 1.0, kl=True)
        outcomes = evaluator.evaluate(pairs)
        assert expected == pytest.approx([o.kl for o in outcomes], abs=2e-5)
        completed = evaluator.with_margins(pairs, outcomes)
        assert [o.kl for o in outcomes] == [o.kl for o in completed]


def test_outcomes_are_the_same_after_memory_ran_out(
    tiny_llama, tiny_tokenizer, caplog, monkeypatch
):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    pairs = some_pairs(12, seed=2)
    asked = [Prompt(text=t, reward="exact", answer="a", max_new_tokens=4) for t, _ in QUESTIONS]

    def evaluated():
        outcomes = []
        for prompts in (CHOICES, asked):
            evaluator = Evaluator(routed, prompts, 1.0, kl=True, paths_per_pass=12)
            outcomes += evaluator.with_margins(pairs, evaluator.evaluate(pairs))
        return outcomes

    expected = evaluated()
    run = LayerCall.run

    def run_out(call, hidden, rows=None, **step):
        if len(hidden) > 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return run(call, hidden, rows, **step)

    monkeypatch.setattr(LayerCall, "run", run_out)
    outcomes = evaluated()
    assert "out of memory on cpu with 12 paths in a pass; continuing with 6" in caplog.text
    for first, second in zip(expected, outcomes, strict=True):
        assert first.reward == second.reward
        assert first.margin == pytest.approx(second.margin, abs=MARGIN_TOLERANCE)
        assert first.kl == pytest.approx(second.kl, abs=2e-5)
        assert first.tokens == second.tokens
