"""Every way of generating against the slow way, family by family and plan by plan.

Greedy ways are held to the slow way itself: layers listed in path order, one unpadded row, no
cache. Beam search and sampling are held to transformers' own `generate` on such a plain model. What
a version of transformers can't do with a plain model either is skipped, and says so.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import slow_way
from drllm.model.prompts import pad_left
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.kv_cache import cache_argument
from slow_way import FOREIGN_ERRORS, FULL

TELLING_ONLY = True  # read by conftest: the other families run in `make test-all`
NUM_NEW = 8
END = 2
GREEDY = {"max_new_tokens": NUM_NEW, "suppress_tokens": [END], "do_sample": False}
"""The end token is kept from being said by the one way that every version takes with drafts too."""
BF16_GAP = 0.15
"""Logits between the two likeliest tokens, of standard deviation about 1.4, that bfloat16 may take
for equal."""


answers = partial(slow_way.answers, **GREEDY)


def on_a_cache(make):
    """Return the way of generating on a cache of the user's."""
    return lambda model, prompts: answers(model, prompts, **{cache_argument(model): make(model)})


class Collecting(BaseStreamer):
    """Keeps the tokens that are streamed."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def by_streaming(model, prompts):
    streamed = []
    for prompt in prompts:
        streamer = Collecting()
        answers(model, [prompt], streamer=streamer)
        assert streamer.ended
        assert prompt == streamer.tokens[: len(prompt)]
        streamed.append(streamer.tokens[len(prompt) :])
    return streamed


BATCHED: dict[str, Callable[..., list[list[int]]]] = {
    "a cache of the user's": on_a_cache(lambda model: DynamicCache(config=model.config)),
    "a lazy cache": on_a_cache(lambda _model: DynamicCache()),
    "a static cache": partial(answers, cache_implementation="static"),
    "no cache": partial(answers, use_cache=False),
    "the prompt in chunks": partial(answers, prefill_chunk_size=3),
}
ALONE: dict[str, Callable[..., list[list[int]]]] = {
    "prompt lookup": partial(answers, prompt_lookup_num_tokens=3),
    "streaming": by_streaming,
    "itself in chunks": partial(answers, prefill_chunk_size=3),
}


def held_to(expected, run, plain):
    """Compare; where that fails, ask whether transformers fails in the same way by itself.

    Args:
        expected: What the slow way gave, by row.
        run: Gives what the routed model does.
        plain: Gives what plain models with the same layers do in the same batch, by row.
    """
    try:
        assert expected == run()
    except FOREIGN_ERRORS as error:
        try:
            right = expected == plain()
            problem = "says something else than it says alone and without a cache"
        except FOREIGN_ERRORS as theirs:
            right, problem = False, f"raises {type(theirs).__name__}: {theirs}"
        if right:
            raise
        pytest.skip(
            f"transformers {transformers.__version__}: the plain model {problem} "
            f"(under routing: {type(error).__name__})"
        )


def on_plain_models(slow, family, plan, answer):
    """Let plain models with the listed layers answer the whole batch; take each plan's own row."""
    answered: dict[tuple[int, ...], list[Any]] = {}
    rows = []
    for row, decisions in enumerate(plan):
        if tuple(decisions) not in answered:
            model = copy.deepcopy(slow.listed(family, decisions, cached=True).model)
            answered[tuple(decisions)] = answer(model)
        rows.append(answered[tuple(decisions)][row])
    return rows


def one_by_one(way, model, prompts, under=lambda row: nullcontext()):
    """Run a way that takes one prompt at a time, each row under its own plan."""
    said = []
    for row, prompt in enumerate(prompts):
        with under(row):
            said += way(model, [prompt])
    return said


@pytest.mark.parametrize("way", BATCHED.values(), ids=BATCHED.keys())
def test_a_batch_says_what_the_slow_way_says_with(slow, routed, prompts, family, plan, way):
    def run():
        with routed.fixed(plan):
            return way(routed.model, prompts)

    held_to(
        slow.greedy(family, plan),
        run,
        lambda: on_plain_models(slow, family, plan, lambda model: way(model, prompts)),
    )


def check_alone(way, slow, routed, prompts, family, plan):
    """Hold a way that takes one prompt at a time to the slow way."""
    held_to(
        slow.greedy(family, plan),
        lambda: one_by_one(way, routed.model, prompts, lambda row: routed.fixed(plan[row])),
        lambda: on_plain_models(slow, family, plan, lambda model: one_by_one(way, model, prompts)),
    )


@pytest.mark.parametrize("way", ALONE.values(), ids=ALONE.keys())
def test_a_prompt_alone_is_answered_as_by_the_slow_way_with(
    slow, routed, prompts, family, plan, way
):
    check_alone(way, slow, routed, prompts, family, plan)


def test_eager_attention_says_what_sdpa_says(slow, prompts, family, plan):
    routed = RoutedModel(slow.untouched(family, attention="eager"))
    with routed.fixed(plan):
        assert slow.greedy(family, plan) == answers(routed.model, prompts)


# --- assisted generation -----------------------------------------------------------------------


def test_a_routed_target_says_the_same_with_a_draft_model(slow, routed, prompts, family, plan):
    draft = slow.untouched(family)  # under most plans it guesses some tokens right, others wrong

    check_alone(partial(answers, assistant_model=draft), slow, routed, prompts, family, plan)


class Overheard:
    """Stands before a draft model's `generate` and keeps what it was asked and what it said."""

    def __init__(self, model):
        self.generate = model.generate
        self.guesses: list[tuple[list[int], list[int]]] = []

    def __call__(self, *args, **kwargs):
        given = kwargs["input_ids"][0].tolist()
        output = self.generate(*args, **kwargs)
        self.guesses.append((given, output.sequences[0, len(given) :].tolist()))
        return output


def test_a_routed_draft_guesses_as_the_slow_way_and_changes_nothing(
    slow, routed, prompts, family, plan
):
    target = slow.untouched(family, seed=1)
    # A draft is given no mask: a padding token among what was said would be taken for padding.
    target.generation_config.pad_token_id = END

    def assist(draft, under=lambda row: nullcontext()):
        """Answer each prompt; return what was said, and whether every guess was the slow way's."""
        overheard = Overheard(draft)
        draft.generate = overheard
        rows = []
        for row, prompt in enumerate(prompts):
            overheard.guesses = []
            with under(row):
                [said] = answers(target, [prompt], assistant_model=draft)
            guessed = [
                [guess] == slow.greedy(family, [plan[row]], [given], len(guess))
                for given, guess in overheard.guesses
            ]
            rows.append((said, len(guessed) > 0 and all(guessed)))
        return rows

    held_to(
        [(said, True) for said in slow.greedy(family, [FULL] * 4, seed=1)],
        lambda: assist(routed.model, lambda row: routed.fixed(plan[row])),
        lambda: on_plain_models(slow, family, plan, assist),
    )


# --- several turns, several caches -------------------------------------------------------------

TURN = [40, 41, 42]


class Chat:
    """A batch of conversations on one cache."""

    def __init__(self, model, prompts):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.ids, self.mask = pad_left(prompts, "cpu")

    def hear(self, tokens):
        """Let every user say something."""
        new = torch.tensor([tokens] * len(self.ids))
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)

    def answer(self, num_new):
        """Let the model answer every row."""
        before = self.ids.shape[1]
        self.ids = self.model.generate(
            input_ids=self.ids,
            attention_mask=self.mask,
            **{**GREEDY, "max_new_tokens": num_new, cache_argument(self.model): self.cache},
        )
        said = self.ids[:, before:]
        self.mask = torch.cat([self.mask, torch.ones_like(said)], dim=1)
        return said.tolist()


def slow_chat(slow, family, plan, prompts):
    """Two turns the slow way: what was said in each, row by row."""
    first = slow.greedy(family, plan, prompts, 4)
    heard = [[*prompt, *said, *TURN] for prompt, said in zip(prompts, first, strict=True)]
    return list(zip(first, slow.greedy(family, plan, heard, 4), strict=True))


def fast_chat(model, prompts, first_turn_under):
    chat = Chat(model, prompts)
    with first_turn_under:
        first = chat.answer(4)
    chat.hear(TURN)
    return list(zip(first, chat.answer(4), strict=True))


def test_a_second_turn_on_the_same_cache_keeps_the_first_ones_route(
    slow, routed, prompts, family, plan
):
    held_to(
        slow_chat(slow, family, plan, prompts),
        lambda: fast_chat(routed.model, prompts, routed.fixed(plan)),
        lambda: on_plain_models(
            slow, family, plan, lambda model: fast_chat(model, prompts, nullcontext())
        ),
    )


def test_interleaved_caches_keep_their_own_routes(slow, routed, prompts, family, plan):
    others = prompts[::-1]
    other_plan = [[1, 1, 0, 2, 1, 0]] * 4

    def run():
        one, other = Chat(routed.model, prompts), Chat(routed.model, others)
        with routed.fixed(plan):
            first = one.answer(4)
        with routed.fixed(other_plan):
            other_first = other.answer(4)
        one.hear(TURN)
        other.hear(TURN)
        rows = list(zip(first, one.answer(4), strict=True))
        return rows + list(zip(other_first, other.answer(4), strict=True))

    def plain():
        rows = []
        for some, plans in ((prompts, plan), (others, other_plan)):
            rows += on_plain_models(
                slow, family, plans, lambda model, some=some: fast_chat(model, some, nullcontext())
            )
        return rows

    expected = slow_chat(slow, family, plan, prompts) + slow_chat(slow, family, other_plan, others)
    held_to(expected, run, plain)


# --- beams and samples, against transformers on the plain model -------------------------------


def alone_on_plain_models(slow, family, plan, prompts, **options):
    """Answers of plain models with the listed layers, one unpadded prompt at a time."""
    said = []
    for decisions, prompt in zip(plan, prompts, strict=True):
        said += answers(slow.listed(family, decisions, cached=True).model, [prompt], **options)
    return said


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}])
def test_beams_of_a_batch_are_those_of_the_plain_model(
    slow, routed, prompts, family, plan, options
):
    with routed.fixed(plan):
        found = answers(routed.model, prompts, **options)
    assert alone_on_plain_models(slow, family, plan, prompts, **options) == found


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}])
def test_samples_with_one_seed_are_those_of_the_plain_model(
    slow, routed, prompts, family, plan, options
):
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, **options}
    for row, (decisions, prompt) in enumerate(zip(plan, prompts, strict=True)):
        torch.manual_seed(row)
        expected = alone_on_plain_models(slow, family, [decisions], [prompt], **options)
        torch.manual_seed(row)
        with routed.fixed(decisions):
            assert expected == answers(routed.model, [prompt], **options)


# --- low precision, against the same batch shape -----------------------------------------------


def scored(model, prompts):
    """Return each row's greedy answer, and the scores that each of its tokens was chosen by."""
    ids, mask = pad_left(prompts, "cpu")
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        output_scores=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    said = output.sequences[:, ids.shape[1] :].tolist()
    return list(zip(said, torch.stack(output.scores, dim=1).float(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_low_precision_differs_only_where_two_tokens_are_as_good_as_equal(
    slow, routed, prompts, family, plan, precision, record_property
):
    """Rows that leave the batch change its shape and with it the last bits of bfloat16."""
    around = nullcontext()
    if precision == "autocast":
        around = torch.autocast("cpu", dtype=torch.bfloat16)
    else:
        routed.model.to(torch.bfloat16)
    with around, routed.fixed(plan):
        found = scored(routed.model, prompts)

    def plain(model):
        if precision == "bf16":
            model.to(torch.bfloat16)
        with around:
            return scored(model, prompts)

    expected = on_plain_models(slow, family, plan, plain)
    for row, ((said, _), (wanted, scores)) in enumerate(zip(found, expected, strict=True)):
        differ = [i for i in range(NUM_NEW) if said[i] != wanted[i]]
        if differ:
            best = scores[differ[0]].topk(2).values
            gap = float(best[0] - best[1])
            record_property("top-two gap", gap)
            assert gap <= BF16_GAP, f"row {row}, token {differ[0]}: the top two are {gap:.4f} apart"
