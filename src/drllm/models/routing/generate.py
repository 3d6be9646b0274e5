"""The override of `generate`. It tells routing where prompts end and which rows are copies.

The model's own `generate` then does the decoding.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from drllm.errors import RoutingError
from drllm.models.routing.driver import RoutingDriver

CONTINUOUS_METHODS = ("generate_batch", "init_continuous_batching")
"""Methods of transformers that generate with continuous batching."""


@dataclass(eq=False)
class GenerateHandle:
    """The override of a model's `generate`.

    The override prevents three mistakes:

    - `generate` without a cache would decide again at every step;
    - the beams of a prompt could get different decisions;
    - routers would read the tokens of a draft as part of the prompt.

    The override is a plain object, so that a model with it can be copied and pickled.
    """

    model: Any
    driver: RoutingDriver

    def put_on(self) -> None:
        """Override the model's methods that generate."""
        self.model.generate = self.generate
        for name in CONTINUOUS_METHODS:
            if hasattr(type(self.model), name):
                setattr(self.model, name, self.refuse_continuous)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, with decisions made once per prompt."""
        option = make_option_lookup(self.model, kwargs, args)
        reads_prompt = self.driver.current_policy.reads_prompt
        _refuse_options(option, reads_prompt)
        # A prompt has a row for each beam or, without beams, for each answer.
        copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        has_drafts = option("assistant_model") is not None or option("prompt_lookup_num_tokens")
        with ExitStack() as stack:
            stack.enter_context(self.driver.generating(copies))
            if has_drafts and reads_prompt and not self.driver.has_prompt_lengths:
                # The first pass verifies the first draft together with the prompt.
                lengths = _prompt_lengths(args, kwargs)
                if lengths is not None:
                    stack.enter_context(self.driver.prompt_lengths(lengths))
            return type(self.model).generate(self.model, *args, **kwargs)

    def refuse_continuous(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse continuous batching, which keeps several prompts in one row."""
        raise RoutingError(
            "continuous batching keeps several prompts in one row, and each prompt needs a row of "
            "its own to be routed; call routed.generate_many(prompts), or detach() first"
        )


def take_off_overrides(model: Any) -> dict[str, Any]:
    """Take the overrides of a `GenerateHandle` off a model, and return them by name."""
    overrides = {}
    for name in ("generate", *CONTINUOUS_METHODS):
        override = vars(model).pop(name, None)
        if override is not None:
            overrides[name] = override
    return overrides


def make_option_lookup(
    model: Any, options: Mapping[str, Any], args: Sequence[Any] = ()
) -> Callable[[str], Any]:
    """Return a function that looks up an option of a `generate` call by name.

    The function looks at the keyword arguments, then at the generation config of the call, then at
    the generation config of the model. It returns None for an option that isn't set.
    """
    config = options.get("generation_config")
    if "generation_config" not in options and len(args) > 1:
        config = args[1]
    configs = [config]
    if options.get("use_model_defaults") is not False:
        configs.append(model.generation_config)

    def option(name: str) -> Any:
        values = [options.get(name)]
        values += [getattr(config, name, None) for config in configs]
        return next((value for value in values if value is not None), None)

    return option


def _refuse_options(option: Callable[[str], Any], reads_prompt: bool) -> None:
    """Refuse options of `generate` under which decisions would be wrong."""
    early_exit = option("assistant_early_exit")
    if early_exit is not None:
        raise RoutingError(
            f"assistant_early_exit={early_exit} would leave out layers without routing; leave it "
            f"out, or give an assistant_model"
        )
    chunk = option("prefill_chunk_size")
    if chunk is not None and reads_prompt:
        raise RoutingError(
            f"prefill_chunk_size={chunk} would let the policy decide on the first chunk of the "
            f"prompt alone; leave it out, or pin a plan with routed.fixed(...)"
        )
    guidance = option("guidance_scale")
    if guidance not in (None, 1) and option("use_cache") is False:
        raise RoutingError(
            f"guidance_scale={guidance} runs a second prompt, and without a cache it would get "
            f"the decisions of the first prompt; leave use_cache on"
        )


def end_tokens(ends: Any) -> list[int]:
    """Return the tokens that end an answer, from an `eos_token_id` in any of its forms.

    Example:
        >>> end_tokens(2), end_tokens([2, 5]), end_tokens(None)
        ([2], [2, 5], [])
    """
    if ends is None:
        return []
    return [int(end) for end in torch.as_tensor(ends).reshape(-1)]


def _prompt_lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return each prompt's number of tokens without padding, `[B]`; None if it isn't known."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return torch.as_tensor(mask.sum(dim=1))
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    candidates.append(kwargs.get("inputs_embeds"))
    for prompts in candidates:
        if prompts is not None:
            return torch.full((prompts.shape[0],), prompts.shape[1])
    return None
