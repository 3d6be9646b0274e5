"""Many prompts: route them all first, then decode those with equal plans together.

In decode a batch is bound by reading weights: a layer saves time only where every row of the batch
skips it. Prompts pass the model twice, once to be routed and once to be answered: keeping the first
pass's K/V would take memory for all prompts at once.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a prompt.

    Attributes:
        prompt: As it was given.
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
    prompts: Sequence[Prompt],
    *,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = 64,
    chat: bool = True,
    route_first: bool = True,
    do_sample: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answer many prompts, those with equal plans together.

    All prompts are routed first, and then batched so that the fewest executions are run. Prompts
    that fit in one batch, and plans that are known, aren't routed first.

    In float32 a greedy answer, or one of beam search, is what `routed.generate` gives for the
    prompt alone. Samples come from torch's generator and depend on the batches: the same seed,
    prompts and `batch_size` give the same answers.

    Args:
        routed: The model, made with its tokenizer; the policy in force decides.
        prompts: Texts, or conversations as lists of messages.
        batch_size: Maximum prompts in a batch.
        max_new_tokens: Maximum tokens of an answer.
        chat: Put texts into the user's turn of the tokenizer's chat template, where it has one.
        route_first: False leaves the first pass out and batches prompts of similar length, which is
            faster where answers are short or prefill is expensive (on a CPU).
        do_sample: Sample tokens instead of taking the likeliest.
        on_progress: Is told (prompts answered, prompts in all) at the start and after each batch.
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
        [Answer(prompt='Name a metal.', ...), Answer(prompt='What is ice?', ...)]
    """
    option = options_of(routed.model, options)
    ends = end_tokens(option("eos_token_id"))
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is the text {prompts!r}; give a list of prompts")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give a value of at least 1")
    for name, why in REFUSED.items():
        if options.get(name) is not None:
            raise ConfigError(f"{name} can't be given for many prompts: {why}")
    for name in ("stop_strings", "stopping_criteria"):
        if option(name) and not ends and batch_size > 1:
            raise ConfigError(
                f"{name} needs an end-of-sequence token to fill up answers that end early; give "
                f"eos_token_id, or batch_size=1"
            )
    read = partial(prompt_tokens, routed, chat=chat, max_new_tokens=max_new_tokens)
    rows = [read(prompt) for prompt in prompts]
    told = on_progress or (lambda _done, _all: None)
    told(0, len(rows))
    if option("stop_strings"):
        options.setdefault("tokenizer", routed.tokenizer)
    padded = not any(map(option, LOOKS_BACK))
    copies = int(option("num_return_sequences") or 1)
    answers: dict[int, list[Answer]] = {}
    for batch, policy in _batches(routed, rows, batch_size, padded, route_first):
        ids, mask = left_padded([rows[place] for place in batch], routed.model.device)
        # To older transformers' repetition penalty padding was said, too; what the prompt starts
        # with was said anyway.
        ids = torch.where(mask.bool(), ids, ids.gather(1, mask.argmax(dim=1, keepdim=True)))
        with routed.using(policy):
            output = routed.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                pad_token_id=ends[0] if ends else None,
                return_dict_in_generate=False,
                **options,
            )
        routes = routed.last_route.tolist()  # a row for each beam or answer
        each = len(routes) // len(batch)
        said = []
        for row in output[:, ids.shape[1] :].tolist():
            # What fills a row up to the longest of its batch are end tokens.
            length = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
            said.append(row[:length])
        for number, place in enumerate(batch):
            answers[place] = [
                Answer(
                    prompt=prompts[place],
                    text=routed.tokenizer.decode(tokens, skip_special_tokens=True),
                    tokens=tuple(tokens),
                    route=tuple(routes[number * each]),
                )
                for tokens in said[number * copies : (number + 1) * copies]
            ]
        told(len(answers), len(rows))
    return [answer for place in range(len(rows)) for answer in answers[place]]


def prompt_tokens(
    routed: RoutedModel, prompt: Prompt, *, chat: bool, max_new_tokens: int
) -> list[int]:
    """Return the tokens of a prompt, after checking that the context holds it and its answer."""
    if routed.tokenizer is None:
        raise ConfigError("prompts are texts; give RoutedModel its tokenizer")
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


def _batches(
    routed: RoutedModel,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    padded: bool,
    route_first: bool,
) -> Iterator[tuple[list[int], Policy]]:
    """Yield the places of prompts that are answered together, and what decides on them."""
    plans: list[Decisions] | None = None
    if type(routed.policy) in (FullPolicy, FixedPolicy):  # these would read nothing
        view = PromptView(torch.empty(len(rows), 0, 0), torch.empty(len(rows), 0).bool())
        columns = [routed.policy.decide(layer, view) for layer in range(routed.num_layers)]
        plans = [tuple(map(int, plan)) for plan in zip(*columns, strict=True)]
    elif isinstance(routed.policy, PathPolicy):
        pass  # one plan for all, which decisions can't express
    elif route_first and len(rows) > batch_size:
        routes = route_prompts(routed, routed.policy, rows, batch_size=batch_size)
        plans = [tuple(route) for route in routes.tolist()]
    groups: dict[int, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        groups.setdefault(0 if padded else len(rows[place]), []).append(place)
    for places in groups.values():
        if plans is None:
            for start in range(0, len(places), batch_size):
                yield places[start : start + batch_size], routed.policy
        else:
            for batch in _cut(sorted(places, key=plans.__getitem__), plans, batch_size):
                yield batch, FixedPolicy([plans[place] for place in batch], routed.num_layers)


def _cut(places: Sequence[int], plans: Sequence[Decisions], batch_size: int) -> Iterator[list[int]]:
    """Cut a list of prompts into batches so that the fewest executions are run.

    A batch runs a layer as often as the row that runs it most. Of several ways, the one with the
    fewest batches of different plans is taken. Prompts of one plan must stand side by side.

    Source: ours; dynamic programming over where the last batch of the first n prompts starts.
    """
    costs, starts = [(0, 0)], [0]  # of the first n prompts: executions and mixed batches
    for end in range(1, len(places) + 1):
        last = plans[places[end - 1]]
        runs: Sequence[int] = last
        ways = []
        for start in range(end - 1, max(end - batch_size, 0) - 1, -1):
            first = plans[places[start]]
            runs = [max(pair) for pair in zip(runs, first, strict=True)]
            executions, mixed = costs[start]
            ways.append((executions + sum(runs), mixed + (first != last), start))
        executions, mixed, start = min(ways)
        costs.append((executions, mixed))
        starts.append(start)
    cuts = [len(places)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    for start, end in itertools.pairwise(reversed(cuts)):
        yield list(places[start:end])
