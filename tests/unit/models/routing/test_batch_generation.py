"""Many prompts at once against the same prompts one by one."""

import itertools
import random
import string
from collections import Counter

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, StopStringCriteria

from drllm.errors import ConfigError, RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import (
    REFUSED_OPTIONS,
    _split_by_plan,
    generate_many,
    prompt_tokens,
)
from drllm.models.routing.policies import Policy
from drllm.paths import StaticPath
from slow_way import tiny_routers

ENDS = list(range(2, 22))
"""Tokens that end an answer; many, so that answers end at different times."""


DRAWN = random.Random(0)
PROMPTS = [
    "".join(DRAWN.choices(string.ascii_letters + string.digits, k=DRAWN.choice([2, 3, 5, 8, 13])))
    for _ in range(24)
]


@pytest.fixture
def routed(tiny_llama, tiny_tokenizer):
    routers = tiny_routers()  # that send prompts along several plans, some of which many share
    bias = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    routers.decision_bias.data.copy_(3 * bias)
    return RoutedModel(tiny_llama(), routers, tokenizer=tiny_tokenizer)


def alone(routed, prompt, **options):
    """Answer one prompt by itself; return its answers' tokens and its route."""
    ids = torch.tensor([routed.tokenizer(prompt)["input_ids"]])
    options = {"do_sample": False, "pad_token_id": 2, **options}
    output = routed.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return output[:, ids.shape[1] :].tolist(), routed.last_route[0].tolist()


def test_along_a_path_every_answer_is_what_the_prompt_gives_alone(tiny_llama, tiny_tokenizer):
    path = StaticPath([0, 1, 2, 3, 2, 3, 4, 5])
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    options = {"max_new_tokens": 6, "eos_token_id": ENDS}
    with routed.fixed(path):
        expected = [alone(routed, prompt, **options) for prompt in PROMPTS]
        seen = Counted(routed)
        answers = generate_many(routed, PROMPTS, chat=False, batch_size=5, **options)
    assert [([list(a.tokens)], list(a.route)) for a in answers] == expected
    assert answers[0].route == (1, 1, 2, 2, 1, 1)
    assert seen.prompts == [5, 5, 5, 5, 4], "a path reads nothing, so no pass goes before"


class Counted:
    """Counts the rows of each forward pass of a model, prompts and steps apart."""

    def __init__(self, routed):
        self.prompts: list[int] = []
        self.steps: list[int] = []
        routed.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module, _args, kwargs):
        rows, tokens = kwargs["input_ids"].shape
        (self.steps if tokens == 1 else self.prompts).append(rows)


def test_the_prompts_of_these_tests_share_plans_across_lengths(routed):
    answers = generate_many(routed, PROMPTS, max_new_tokens=1, chat=False)
    plans = Counter(answer.route for answer in answers)
    assert len(plans) >= 8
    most, shared = plans.most_common(1)[0]
    assert shared >= 4
    assert len({len(answer.prompt) for answer in answers if answer.route == most}) >= 2


def test_every_answer_is_what_the_prompt_gives_alone(routed):
    options = {"max_new_tokens": 12, "eos_token_id": ENDS}
    expected = [alone(routed, prompt, **options) for prompt in PROMPTS]
    assert len({len(tokens) for [tokens], _ in expected}) >= 6, "answers end at different times"
    decoded = [routed.tokenizer.decode(t, skip_special_tokens=True) for [t], _ in expected]
    for batch_size, route_first in ((1, True), (5, True), (5, False), (24, True)):
        how = {"batch_size": batch_size, "route_first": route_first, **options}
        answers = generate_many(routed, PROMPTS, chat=False, **how)
        assert [answer.prompt for answer in answers] == PROMPTS
        assert [([list(a.tokens)], list(a.route)) for a in answers] == expected
        assert [answer.text for answer in answers] == decoded


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        # These look back at what was said. Tokens 0 (of padding) and 85 (q, of the prompts) are
        # made likely, so that a token too much in the past shows.
        {"repetition_penalty": 1.8, "sequence_bias": {(0,): 3.0}},
        {"no_repeat_ngram_size": 2, "sequence_bias": {(85,): 9.0}},
        {"logits_processor": [NoRepeatNGramLogitsProcessor(2)], "sequence_bias": {(85,): 9.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_in_a_batch_what_they_do_for_one_prompt(routed, options):
    prompts = ["q" + prompt for prompt in PROMPTS[:7]]
    assert routed.tokenizer("q")["input_ids"] == [85]
    options = {"max_new_tokens": 8, "eos_token_id": ENDS, **options}
    with routed.fixed([1, 0, 1, 1, 2, 1]):
        answers = generate_many(routed, prompts, chat=False, **options)
        expected = [alone(routed, prompt, **options)[0][0] for prompt in prompts]
    assert [list(answer.tokens) for answer in answers] == expected


def test_beams_give_what_they_give_alone(routed):
    options = {"max_new_tokens": 8, "eos_token_id": ENDS}
    options |= {"num_beams": 3, "num_return_sequences": 2}
    expected = [alone(routed, prompt, **options) for prompt in PROMPTS[:8]]
    answers = generate_many(routed, PROMPTS[:8], batch_size=4, chat=False, **options)
    assert [answer.prompt for answer in answers] == [p for p in PROMPTS[:8] for _ in range(2)]
    for place, (rows, route) in enumerate(expected):
        pair = answers[2 * place : 2 * place + 2]
        filled = [list(a.tokens) + [2] * (len(rows[0]) - len(a.tokens)) for a in pair]
        assert filled == rows
        assert [list(answer.route) for answer in pair] == [route, route]


def test_the_same_seed_draws_the_same_answers_and_another_seed_others(routed):
    def draw(seed):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0}
        return [a.tokens for a in generate_many(routed, PROMPTS[:4], chat=False, **options)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_all_prompts_are_routed_first_and_then_decoded_in_the_cheapest_batches(routed):
    routes = [a.route for a in generate_many(routed, PROMPTS, max_new_tokens=1, chat=False)]
    batches = list(_split_by_plan(sorted(range(24), key=routes.__getitem__), routes, 4))
    counted = Counted(routed)
    generate_many(routed, PROMPTS, batch_size=4, max_new_tokens=3, min_new_tokens=3, chat=False)
    assert counted.prompts[:6] == [4] * 6  # routed first, whatever their plans
    assert counted.prompts[6:] == [len(batch) for batch in batches]
    assert counted.steps == [len(batch) for batch in batches for _ in range(2)]


@pytest.mark.parametrize("options", [{"batch_size": 24}, {"batch_size": 5, "route_first": False}])
def test_prompts_pass_once_where_there_is_one_batch_or_nothing_is_routed_first(routed, options):
    counted = Counted(routed)
    generate_many(routed, PROMPTS, max_new_tokens=1, chat=False, **options)
    assert sum(counted.prompts) == 24
    assert len(counted.prompts) == -(-24 // options["batch_size"])


def cost_of(batches, plans):
    """Executions of batches, each of which runs a layer as often as any row of it."""
    return sum(
        max(plans[place][layer] for place in batch)
        for batch in batches
        for layer in range(len(plans[0]))
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_other_way_of_cutting_runs_fewer_executions(seed):
    rng = random.Random(seed)
    kinds = [tuple(rng.choices([0, 1, 2], k=4)) for _ in range(rng.randint(1, 5))]
    plans = sorted(rng.choices(kinds, k=rng.randint(1, 9)))
    batch_size, places = rng.randint(1, 5), list(range(len(plans)))
    batches = list(_split_by_plan(places, plans, batch_size))
    assert [place for batch in batches for place in batch] == places
    assert max(map(len, batches)) <= batch_size
    inner = range(1, len(plans))
    every = (
        [places[start:end] for start, end in itertools.pairwise([0, *cuts, len(plans)])]
        for count in range(len(plans))
        for cuts in itertools.combinations(inner, count)
    )
    allowed = [way for way in every if max(map(len, way)) <= batch_size]
    assert cost_of(batches, plans) == min(cost_of(way, plans) for way in allowed)


def test_prompts_of_one_plan_fill_batches_and_the_rest_shares_them():
    plans = [(1, 1)] * 5 + [(1, 2)] * 4 + [(2, 1)] * 1
    assert list(map(len, _split_by_plan(range(10), plans, 5))) == [5, 5]
    plans = [(1, 1)] * 3 + [(2, 2)] * 3  # filling up the first batch would make it run like (2, 2)
    assert list(map(len, _split_by_plan(range(6), plans, 4))) == [3, 3]


@pytest.mark.parametrize("policy", ["full", "one plan", "a plan each"])
def test_plans_that_are_known_are_not_asked_for(policy, tiny_llama, tiny_tokenizer):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    two = [[1, 1, 0, 1, 1, 1], [1, 2, 1, 1, 0, 1]]
    plans = {"full": [1] * 6, "one plan": two[0], "a plan each": [two[0], two[1], two[0], two[1]]}
    counted = Counted(routed)
    prompts = PROMPTS[:4]
    with routed.fixed(plans[policy]):
        answers = generate_many(routed, prompts, max_new_tokens=4, chat=False)
        assert sum(counted.prompts) == len(prompts)
    rows = plans[policy] if policy == "a plan each" else [plans[policy]] * 4
    assert [list(answer.route) for answer in answers] == rows
    for answer, plan in zip(answers, rows, strict=True):
        with routed.fixed(plan):
            [tokens], _ = alone(routed, answer.prompt, max_new_tokens=4)
        assert list(answer.tokens) == tokens


def test_plans_for_another_number_of_prompts_are_refused(routed):
    with routed.fixed([[1] * 6] * 3), pytest.raises(RoutingError, match="for 3 prompts were given"):
        generate_many(routed, PROMPTS[:4], chat=False)


class Drawn(Policy):
    """Decides at random, anew each time it is asked."""

    generator = torch.Generator().manual_seed(0)

    def decide(self, layer, prompts):
        return torch.randint(3, (prompts.num_rows,), generator=self.generator)


def test_decisions_that_are_drawn_are_drawn_once_and_reported(routed):
    with routed.using(Drawn()):
        answers = generate_many(routed, PROMPTS[:6], max_new_tokens=5, chat=False)
    assert len({answer.route for answer in answers}) > 1
    for answer in answers:
        with routed.fixed(answer.route):
            [tokens], _ = alone(routed, answer.prompt, max_new_tokens=5)
        assert list(answer.tokens) == tokens


def test_texts_and_conversations_are_read_through_the_chat_template(routed):
    talk = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "ef"},
    ]
    rendered = ["user: ab\nassistant: ", "user: ab\nassistant: cd\nuser: ef\nassistant: "]
    answers = generate_many(routed, ["ab", talk], max_new_tokens=6)
    plain = generate_many(routed, rendered, max_new_tokens=6, chat=False)
    assert [(a.tokens, a.route) for a in answers] == [(a.tokens, a.route) for a in plain]
    assert [answer.prompt for answer in answers] == ["ab", talk]


def test_no_prompts_have_no_answers(routed):
    assert generate_many(routed, []) == []


def test_progress_is_told_from_no_prompt_to_all(routed):
    told = []
    options = {"max_new_tokens": 1, "chat": False}
    generate_many(routed, PROMPTS, on_progress=lambda *counts: told.append(counts), **options)
    assert told[0] == (0, 24)
    assert told[-1] == (24, 24)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("option", ["stop_strings", "stopping_criteria"])
def test_a_stop_string_ends_each_answer_for_itself(routed, option):
    vowels = list("aeiou")
    criteria = StopStringCriteria(routed.tokenizer, vowels)
    given = {"stop_strings": vowels} if option == "stop_strings" else {option: [criteria]}
    stop = {"max_new_tokens": 12, "stop_strings": vowels, "tokenizer": routed.tokenizer}
    said = [alone(routed, prompt, **stop)[0][0] for prompt in PROMPTS[:8]]
    expected = [routed.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
    assert len({len(text) for text in expected}) >= 3
    answers = generate_many(routed, PROMPTS[:8], max_new_tokens=12, chat=False, **given)
    assert [answer.text for answer in answers] == expected


@pytest.mark.parametrize("name", sorted(REFUSED_OPTIONS))
def test_options_that_several_batches_cannot_share_are_refused(routed, name):
    with pytest.raises(ConfigError, match=f"{name} can't be given for many prompts: "):
        generate_many(routed, PROMPTS[:2], **{name: object()})


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("abc", {}, "prompts is the text 'abc'; give a list"),
        (["abc"], {"batch_size": 0}, "batch_size is 0; give a whole number of at least 1"),
        ([""], {"chat": False}, "the prompt '' has no tokens"),
        (["a" * 500], {}, "the prompt has 518 tokens and --max-new-tokens is 64.* holds 512"),
        ([[{"role": "user", "content": "a"}]], {"chat": False}, "chat is turned off; give a text"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(routed, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate_many(routed, prompts, **options)


def test_stop_strings_without_an_end_token_are_refused_in_batches(routed):
    routed.model.generation_config.eos_token_id = None
    options = {"stop_strings": ["a"]}
    with pytest.raises(ConfigError, match="stop_strings needs an end-of-sequence token"):
        generate_many(routed, PROMPTS[:2], chat=False, **options)
    [answer, _] = generate_many(routed, PROMPTS[:2], batch_size=1, chat=False, **options)
    assert answer.text.endswith("a") or len(answer.tokens) == 64


def test_a_conversation_that_the_template_refuses_is_refused_with_its_reason(routed):
    template = "{{ raise_exception('roles must alternate') }}"
    routed.tokenizer.chat_template, before = template, routed.tokenizer.chat_template
    try:
        with pytest.raises(ConfigError, match="refuses the prompt: roles must alternate"):
            generate_many(routed, [[{"role": "user", "content": "a"}]])
    finally:
        routed.tokenizer.chat_template = before


def test_a_model_without_its_tokenizer_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="give RoutedModel its tokenizer"):
        prompt_tokens(RoutedModel(tiny_llama()), "a", chat=False, max_new_tokens=1)


def test_prompts_may_come_from_an_iterator(tiny_llama, tiny_tokenizer):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    options = {"chat": False, "max_new_tokens": 3}
    found = generate_many(routed, (prompt for prompt in PROMPTS[:3]), **options)
    assert found == generate_many(routed, PROMPTS[:3], **options)
    assert [answer.prompt for answer in found] == PROMPTS[:3]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a"], {"batch_size": 1.5}, "batch_size is 1.5; give a whole number"),
        ([[]], {}, "a conversation has no messages"),
        (["a", ()], {}, "a conversation has no messages"),
    ],
)
def test_what_can_not_be_answered_is_refused_in_one_line(
    tiny_llama, tiny_tokenizer, prompts, options, message
):
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match=message) as caught:
        generate_many(routed, prompts, **options)
    assert "\n" not in str(caught.value)


def test_prompts_are_answered_by_the_base_model_where_routing_is_disabled(routed):
    with routed.fixed([1] * 6):
        expected = routed.generate_many(PROMPTS[:3], max_new_tokens=4)
    with routed.fixed([1, 0, 1, 1, 1, 1]):
        routed.generate_many(PROMPTS[:2], max_new_tokens=2)
    with routed.disabled():
        assert routed.generate_many(PROMPTS[:3], max_new_tokens=4) == expected
    assert [answer.route for answer in expected] == [(1,) * 6] * 3
