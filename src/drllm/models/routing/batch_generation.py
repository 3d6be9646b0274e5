"""Answer many prompts in batches, for `RoutedModel.generate_many` and the command line.

All prompts are routed first. Then prompts with equal plans are decoded together. A decoding step
takes as long as reading the weights, so a skipped layer saves time only if every row of the batch
skips it. Each prompt passes through the model twice, once to be routed and once to be answered. K
and V of the first pass aren't kept, since this would take memory for all prompts at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drllm.errors import ConfigError
from drllm.model.prompts import Prompt, context_length, encode, pad_left, render
from drllm.models.routing.core import Routing
from drllm.models.routing.depth_control import route_prompts
from drllm.models.routing.generate import end_tokens, make_option_lookup
from drllm.models.routing.policies import FixedPolicy, FullPolicy, PathPolicy, Policy, PromptView
from drllm.paths import Decisions

BATCH_SIZE = 16

_FROM_PROMPTS = "it is made from the prompts"
_FOR_ONE_BATCH = "it serves one batch, and there are several"

REFUSED_OPTIONS = {
    "inputs": _FROM_PROMPTS,
    "input_ids": _FROM_PROMPTS,
    "inputs_embeds": _FROM_PROMPTS,
    "attention_mask": _FROM_PROMPTS,
    "position_ids": _FROM_PROMPTS,
    "pad_token_id": _FROM_PROMPTS,
    "past_key_values": _FOR_ONE_BATCH,
    "cache": _FOR_ONE_BATCH,
    "streamer": _FOR_ONE_BATCH,
    "return_dict_in_generate": "answers are returned",
    "generation_config": "give its settings by name",
    "max_length": "it counts padding; give max_new_tokens",
    "min_length": "it counts padding; give min_new_tokens",
}
"""Options of `generate` that can't be given for many prompts, and why."""

LOOKS_BACK = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "logits_processor")
"""Options that read earlier tokens, padding included. With them, all prompts of a batch must have
the same length."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """The answer to a prompt.

    Attributes:
        prompt: The prompt, unchanged.
        text: The answer without special tokens.
        tokens: The answer's tokens, up to and including the end-of-sequence token if it has one.
        route: The decisions for the prompt, `[L]`; along a static path, how often each layer ran.
    """

    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    route: Decisions


def generate_many(
    routed: Routing,
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
    """Answer many prompts, and decode prompts with equal plans together.

    All prompts are routed first, and then put into batches that run as few layers as possible.
    Nothing is routed first if the prompts fit in one batch, or if the policy doesn't read them.

    In float32 the answers of greedy decoding and beam search equal those that `routed.generate`
    gives for each prompt alone. Samples come from torch's generator and depend on the batches: the
    same seed, prompts and `batch_size` give the same answers.

    Args:
        routed: The model, made with its tokenizer. Its current policy decides.
        prompts: Texts, or conversations as lists of messages. An iterator is read to its end.
        batch_size: Maximum prompts in a batch.
        max_new_tokens: Maximum tokens of an answer.
        chat: Put texts into the user's turn of the tokenizer's chat template, if it has one.
        route_first: False skips the first pass and batches prompts of similar length. This is
            faster if answers are short or a prefill is expensive (on a CPU).
        do_sample: Sample tokens instead of taking the likeliest.
        on_progress: Called with (prompts answered, all prompts) at the start and after each batch.
        options: Other options of `model.generate`, except `REFUSED_OPTIONS`. With `stop_strings` or
            `stopping_criteria` an answer's tokens may end with one more end-of-sequence token.

    Returns:
        The answers in the order of the prompts, `num_return_sequences` (default 1) per prompt.

    Raises:
        ConfigError: A prompt has no tokens or doesn't fit the model's context, a conversation
            can't be rendered, the model has no tokenizer, or an option can't be given.

    Source: ours.

    Example:
        >>> generate_many(routed, ["Name a metal.", "What is ice?"])  # doctest: +SKIP
        [GeneratedAnswer(prompt='Name a metal.', ...), GeneratedAnswer(prompt='What is ice?', ...)]
    """
    option = make_option_lookup(routed.model, options)
    ends = end_tokens(option("eos_token_id"))
    prompts = _check_prompts(prompts)
    _check_options(options, option, ends, batch_size)
    rows = [
        prompt_tokens(routed, prompt, chat=chat, max_new_tokens=max_new_tokens)
        for prompt in prompts
    ]
    if on_progress is not None:
        on_progress(0, len(rows))
    if option("stop_strings"):
        options.setdefault("tokenizer", routed.tokenizer)
    options |= {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    allows_padding = not any(option(name) for name in LOOKS_BACK)
    answers: dict[int, list[GeneratedAnswer]] = {}  # by the index of the prompt
    for batch in _make_batches(routed, rows, batch_size, allows_padding, route_first):
        batch_prompts = [prompts[place] for place in batch.places]
        batch_rows = [rows[place] for place in batch.places]
        with routed.using(batch.policy):
            batch_answers = _answer_batch(routed, batch_prompts, batch_rows, ends, options)
        answers.update(zip(batch.places, batch_answers, strict=True))
        if on_progress is not None:
            on_progress(len(answers), len(rows))
    in_order: list[GeneratedAnswer] = []
    for place in range(len(rows)):
        in_order += answers[place]
    return in_order


def _check_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts as a list; refuse a single text."""
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is the text {prompts!r}; give a list of prompts")
    return list(prompts)


def _check_options(
    options: Mapping[str, Any], option: Callable[[str], Any], ends: Sequence[int], batch_size: int
) -> None:
    """Refuse options that can't be given for many prompts."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give a whole number of at least 1")
    for name, why in REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise ConfigError(f"{name} can't be given for many prompts: {why}")
    for name in ("stop_strings", "stopping_criteria"):
        if option(name) and not ends and batch_size > 1:
            raise ConfigError(
                f"{name} needs an end-of-sequence token to fill up answers that end early; give "
                f"eos_token_id, or batch_size=1"
            )


def _answer_batch(
    routed: Routing,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    ends: Sequence[int],
    options: Mapping[str, Any],
) -> list[list[GeneratedAnswer]]:
    """Answer one batch, and return the answers to each prompt.

    Args:
        routed: The model. Its current policy decides.
        prompts: The prompts of the batch.
        rows: The tokens of each prompt.
        ends: The tokens that end an answer.
        options: Options of `generate`.
    """
    ids, mask = pad_left(rows, routed.model.device)
    # Older transformers apply the repetition penalty to padding too. So the padding repeats the
    # first token of the prompt, which is penalised anyway.
    first = ids.gather(1, mask.argmax(dim=1, keepdim=True))
    ids = torch.where(mask.bool(), ids, first)
    output = routed.generate(
        input_ids=ids,
        attention_mask=mask,
        pad_token_id=ends[0] if ends else None,
        return_dict_in_generate=False,
        **options,
    )
    routes = routed.last_route.tolist()  # a row for each beam or answer
    num_copies = len(routes) // len(rows)
    outputs = output[:, ids.shape[1] :].tolist()
    num_answers = len(outputs) // len(rows)
    answers: list[list[GeneratedAnswer]] = []
    for number, prompt in enumerate(prompts):
        route = tuple(routes[number * num_copies])
        prompt_answers = []
        for row in outputs[number * num_answers : (number + 1) * num_answers]:
            tokens = _cut_at_end(row, ends)
            text = routed.tokenizer.decode(tokens, skip_special_tokens=True)
            prompt_answers.append(GeneratedAnswer(prompt, text, tuple(tokens), route))
        answers.append(prompt_answers)
    return answers


def _cut_at_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens of an answer up to and including its first end token."""
    for length, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:length]
    return tokens


def prompt_tokens(routed: Routing, prompt: Prompt, *, chat: bool, max_new_tokens: int) -> list[int]:
    """Return the tokens of a prompt. Refuse it if it and its answer don't fit the context."""
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
            f"the prompt has {len(tokens)} tokens and --max-new-tokens is {max_new_tokens}, but "
            f"the model's context holds {context}; shorten the prompt or lower --max-new-tokens"
        )
    return tokens


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts that are answered together, and the policy that decides for them."""

    places: list[int]  # the prompts' indices in the list of all prompts
    policy: Policy


def _make_batches(
    routed: Routing,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    allows_padding: bool,
    route_first: bool,
) -> Iterator[_Batch]:
    """Yield the batches. If padding isn't allowed, all prompts of a batch have the same length."""
    plans = _find_plans(routed, rows, batch_size, route_first)
    by_length: dict[int, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        length = 0 if allows_padding else len(rows[place])  # 0: all lengths together
        by_length.setdefault(length, []).append(place)
    for places in by_length.values():
        if plans is None:
            for start in range(0, len(places), batch_size):
                yield _Batch(places[start : start + batch_size], routed.policy)
            continue
        by_plan = sorted(places, key=plans.__getitem__)
        for part in _split_by_plan(by_plan, plans, batch_size):
            decisions = [plans[place] for place in part]
            yield _Batch(part, FixedPolicy(decisions, routed.num_layers))


def _find_plans(
    routed: Routing, rows: Sequence[Sequence[int]], batch_size: int, route_first: bool
) -> list[Decisions] | None:
    """Return the decisions for each prompt.

    None means that the batches don't depend on plans: all prompts run one static path, they
    fit in one batch, or the caller wants no first pass.
    """
    policy = routed.policy
    if type(policy) in (FullPolicy, FixedPolicy):  # these policies read nothing
        view = PromptView(torch.empty(len(rows), 0, 0), torch.empty(len(rows), 0).bool())
        by_layer = [policy.decide(layer, view) for layer in range(routed.num_layers)]
        return [tuple(map(int, decisions)) for decisions in zip(*by_layer, strict=True)]
    if isinstance(policy, PathPolicy):
        return None
    if not route_first or len(rows) <= batch_size:
        return None
    routes = route_prompts(routed, policy, rows, batch_size=batch_size)
    return [tuple(route) for route in routes.tolist()]


def _split_by_plan(
    places: Sequence[int], plans: Sequence[Decisions], batch_size: int
) -> Iterator[list[int]]:
    """Split a list of prompts into batches that run the fewest layers in total.

    A batch runs a layer as often as the row that runs it most. Among splits of equal cost, the
    split with the fewest batches of mixed plans wins. In the list, prompts with equal plans must
    be neighbours.

    Source: ours; dynamic programming over where the last batch of the first n prompts starts.
    """
    costs = [(0, 0)]  # executions and mixed batches of the first n prompts
    starts = [0]  # where the last batch of the first n prompts starts
    for end in range(1, len(places) + 1):
        last = plans[places[end - 1]]
        runs: Sequence[int] = last  # executions of each layer in a batch from `start` to `end`
        splits = []
        for start in range(end - 1, max(end - batch_size, 0) - 1, -1):
            first = plans[places[start]]
            runs = [max(pair) for pair in zip(runs, first, strict=True)]
            executions, num_mixed = costs[start]
            if first != last:  # equal plans are neighbours, so the batch is mixed
                num_mixed += 1
            splits.append((executions + sum(runs), num_mixed, start))
        executions, num_mixed, start = min(splits)
        costs.append((executions, num_mixed))
        starts.append(start)
    cuts = [len(places)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    cuts.reverse()
    for start, end in itertools.pairwise(cuts):
        yield list(places[start:end])
