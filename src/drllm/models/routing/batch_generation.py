"""Answer many prompts: route them all first, then decode those with equal plans together.

In decode a batch is bound by reading weights: a layer saves time only where every row of the batch
skips it. Prompts pass the model twice, once to be routed and once to be answered: keeping the first
pass's K/V would take memory for all prompts at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drllm.errors import ConfigError
from drllm.models.base.prompts import Prompt, context_length, encode, left_padded, render
from drllm.models.routers.depth_control import route_prompts
from drllm.models.routing.generate import end_tokens, options_of
from drllm.models.routing.policies import FixedPolicy, FullPolicy, PathPolicy, Policy, PromptView
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import Decisions

BATCH_SIZE = 16

REFUSED = {
    **dict.fromkeys(
        ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "pad_token_id"),
        "it is made from the prompts",
    ),
    **dict.fromkeys(
        ("past_key_values", "cache", "streamer"), "it serves one batch, and there are several"
    ),
    "return_dict_in_generate": "answers are returned",
    "generation_config": "give its settings by name",
    "max_length": "it counts padding; give max_new_tokens",
    "min_length": "it counts padding; give min_new_tokens",
}
"""Options of `generate` that can't be given for many prompts, and why."""

LOOKS_BACK = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "logits_processor")
"""Options under which padding would be read: their batches hold prompts of one length only."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """The answer to a prompt.

    Attributes:
        prompt: The prompt, unchanged.
        text: Without special tokens.
        tokens: Up to and including the end-of-sequence token if there is one.
        route: The decisions for the prompt, `[L]`; along a static path, how often each layer ran.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    route: Decisions


def generate_many(
    routed: RoutedModel,
    prompts: Iterable[Prompt],
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = 64,
    chat: bool = True,
    route_first: bool = True,
    do_sample: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[GeneratedAnswer]:
    """Answer many prompts, those with equal plans together.

    All prompts are routed first, and then batched so that the fewest executions are run. Prompts
    that fit in one batch, and plans that are known, aren't routed first.

    In float32 a greedy answer, or one of beam search, is what `routed.generate` gives for the
    prompt alone. Samples come from torch's generator and depend on the batches: the same seed,
    prompts and `batch_size` give the same answers.

    Args:
        routed: The model, made with its tokenizer; the policy in force decides.
        prompts: Texts, or conversations as lists of messages; an iterator is read to its end.
        batch_size: Maximum prompts in a batch.
        max_new_tokens: Maximum tokens of an answer.
        chat: Put texts into the user's turn of the tokenizer's chat template, where it has one.
        route_first: False leaves the first pass out and batches prompts of similar length, which is
            faster where answers are short or prefill is expensive (on a CPU).
        do_sample: Sample tokens instead of taking the likeliest.
        on_progress: Called with (prompts answered, prompts in all) at the start and after each
            batch.
        options: Whatever else `model.generate` takes, except `REFUSED`. With `stop_strings` or
            `stopping_criteria` an answer's tokens may end with one more end-of-sequence token.

    Returns:
        The answers in the order of the prompts, `num_return_sequences` (default 1) for each.

    Raises:
        ConfigError: A prompt without tokens or too long for the model's context, a conversation
            that can't be rendered, a model without tokenizer, or an option that can't be given.

    Source: ours.

    Example:
        >>> generate_many(routed, ["Name a metal.", "What is ice?"])  # doctest: +SKIP
        [GeneratedAnswer(prompt='Name a metal.', ...), GeneratedAnswer(prompt='What is ice?', ...)]
    """
    option = options_of(routed.model, options)
    ends = end_tokens(option("eos_token_id"))
    prompts = _check_prompts(prompts)
    _check_options(options, option, ends, batch_size)
    limits: dict[str, Any] = {"chat": chat, "max_new_tokens": max_new_tokens}
    rows = [prompt_tokens(routed, prompt, **limits) for prompt in prompts]
    if on_progress is not None:
        on_progress(0, len(rows))
    if option("stop_strings"):
        options.setdefault("tokenizer", routed.tokenizer)
    options |= {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    takes_padding = not any(option(name) for name in LOOKS_BACK)
    num_answers = int(option("num_return_sequences") or 1)
    answers: dict[int, list[GeneratedAnswer]] = {}
    for batch in _make_batches(routed, rows, batch_size, takes_padding, route_first):
        batch_rows = [rows[place] for place in batch.places]
        tokens, routes = _generate_batch(routed, batch_rows, batch.policy, ends, options)
        for number, place in enumerate(batch.places):
            answers[place] = []
            for answer in tokens[number * num_answers : (number + 1) * num_answers]:
                text = routed.tokenizer.decode(answer, skip_special_tokens=True)
                answers[place].append(
                    GeneratedAnswer(prompts[place], text, tuple(answer), routes[number])
                )
        if on_progress is not None:
            on_progress(len(answers), len(rows))
    in_order: list[GeneratedAnswer] = []
    for place in range(len(rows)):
        in_order += answers[place]
    return in_order


def _check_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts as a list; a text in their place is a ConfigError."""
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is the text {prompts!r}; give a list of prompts")
    return list(prompts)


def _check_options(
    options: Mapping[str, Any], option: Callable[[str], Any], ends: Sequence[int], batch_size: int
) -> None:
    """Refuse options that can't be given for many prompts."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give a whole number of at least 1")
    for name, why in REFUSED.items():
        if options.get(name) is not None:
            raise ConfigError(f"{name} can't be given for many prompts: {why}")
    for name in ("stop_strings", "stopping_criteria"):
        if option(name) and not ends and batch_size > 1:
            raise ConfigError(
                f"{name} needs an end-of-sequence token to fill up answers that end early; give "
                f"eos_token_id, or batch_size=1"
            )


def _generate_batch(
    routed: RoutedModel,
    rows: Sequence[Sequence[int]],
    policy: Policy,
    ends: Sequence[int],
    options: Mapping[str, Any],
) -> tuple[list[list[int]], list[Decisions]]:
    """Return the tokens of the answers, all of a prompt side by side, and each prompt's route."""
    ids, mask = left_padded(rows, routed.model.device)
    # For older transformers' repetition penalty padding counts as text, so it repeats the token
    # that the prompt starts with.
    first = ids.gather(1, mask.argmax(dim=1, keepdim=True))
    ids = torch.where(mask.bool(), ids, first)
    with routed.using(policy):
        output = routed.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=ends[0] if ends else None,
            return_dict_in_generate=False,
            **options,
        )
    answers = [_cut_at_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    routes = routed.last_route.tolist()  # a row for each beam or answer
    copies = len(routes) // len(rows)
    return answers, [tuple(route) for route in routes[::copies]]


def _cut_at_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return an answer up to its first end token: with such it is filled up to the longest one."""
    for length, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:length]
    return tokens


def prompt_tokens(
    routed: RoutedModel, prompt: Prompt, *, chat: bool, max_new_tokens: int
) -> list[int]:
    """Return the tokens of a prompt, after checking that the context holds it and its answer."""
    if routed.tokenizer is None:
        raise ConfigError("prompts are texts; give RoutedModel its tokenizer")
    if not prompt and not isinstance(prompt, str):
        raise ConfigError("a conversation has no messages; give at least one")
    tokens = encode(routed.tokenizer, render(routed.tokenizer, prompt, chat=chat))
    context = context_length(routed.model)
    if not tokens:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; give a text")
    if context is not None and len(tokens) + max_new_tokens > context:
        raise ConfigError(
            f"the prompt has {len(tokens)} tokens and --max-new-tokens is {max_new_tokens}, the "
            f"model's context holds {context}; shorten the prompt or lower --max-new-tokens"
        )
    return tokens


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts that are answered together, by their places, and what decides on them."""

    places: list[int]
    policy: Policy


def _make_batches(
    routed: RoutedModel,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    takes_padding: bool,
    route_first: bool,
) -> Iterator[_Batch]:
    """Yield the batches; those of prompts with a padding are of one length where none is taken."""
    plans = _plans_of(routed, rows, batch_size, route_first)
    by_length: dict[int, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        length = 0 if takes_padding else len(rows[place])
        by_length.setdefault(length, []).append(place)
    for places in by_length.values():
        if plans is None:
            for start in range(0, len(places), batch_size):
                yield _Batch(places[start : start + batch_size], routed.policy)
            continue
        alike = sorted(places, key=plans.__getitem__)
        for part in _cut(alike, plans, batch_size):
            decisions = [plans[place] for place in part]
            yield _Batch(part, FixedPolicy(decisions, routed.num_layers))


def _plans_of(
    routed: RoutedModel, rows: Sequence[Sequence[int]], batch_size: int, route_first: bool
) -> list[Decisions] | None:
    """Return the decisions of each prompt, which are found out first where that pays; else None."""
    policy = routed.policy
    if type(policy) in (FullPolicy, FixedPolicy):  # these read nothing
        view = PromptView(torch.empty(len(rows), 0, 0), torch.empty(len(rows), 0).bool())
        by_layer = [policy.decide(layer, view) for layer in range(routed.num_layers)]
        return [tuple(map(int, decisions)) for decisions in zip(*by_layer, strict=True)]
    if isinstance(policy, PathPolicy) or not route_first or len(rows) <= batch_size:
        return None  # a static path is one plan for all, which decisions can't express
    routes = route_prompts(routed, policy, rows, batch_size=batch_size)
    return [tuple(route) for route in routes.tolist()]


def _cut(places: Sequence[int], plans: Sequence[Decisions], batch_size: int) -> Iterator[list[int]]:
    """Cut a list of prompts into batches so that the fewest executions are run.

    A batch runs a layer as often as the row that runs it most. Of several ways, the one with the
    fewest batches of different plans is taken. Prompts of one plan must stand side by side.

    Source: ours; dynamic programming over where the last batch of the first n prompts starts.
    """
    costs = [(0, 0)]  # of the first n prompts: executions and mixed batches
    starts = [0]  # where the last batch of the first n prompts starts
    for end in range(1, len(places) + 1):
        last = plans[places[end - 1]]
        runs: Sequence[int] = last  # executions of each layer in a batch from `start` to `end`
        ways = []
        for start in range(end - 1, max(end - batch_size, 0) - 1, -1):
            first = plans[places[start]]
            runs = [max(pair) for pair in zip(runs, first, strict=True)]
            executions, num_mixed = costs[start]
            ways.append((executions + sum(runs), num_mixed + (first != last), start))
        executions, num_mixed, start = min(ways)
        costs.append((executions, num_mixed))
        starts.append(start)
    cuts = [len(places)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    for start, end in itertools.pairwise(reversed(cuts)):
        yield list(places[start:end])
