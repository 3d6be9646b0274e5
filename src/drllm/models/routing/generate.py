"""The override of `generate`: tells routing where prompts end and which rows are copies.

The decoding itself is the model's own.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from drllm.errors import RoutingError
from drllm.models.routing.driver import RoutingDriver


@dataclass(eq=False)
class GenerateHandle:
    """The override of a model's `generate`; a plain object, so that models copy and pickle.

    Without it, a `generate` without a cache would decide anew at every step, beams of one prompt
    could be given different decisions, and a draft's tokens would be read as part of the prompt.
    """

    model: Any
    driver: RoutingDriver

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, with decisions taken once per prompt."""
        option = options_of(self.model, kwargs, args)
        reads = self.driver.current_policy.reads_prompt
        if (early_exit := option("assistant_early_exit")) is not None:
            raise RoutingError(
                f"assistant_early_exit={early_exit} would leave out layers behind the back of "
                f"routing; leave it out, or give an assistant_model"
            )
        if (chunk := option("prefill_chunk_size")) is not None and reads:
            raise RoutingError(
                f"prefill_chunk_size={chunk} would let the policy decide on the first chunk of the "
                f"prompt alone; leave it out, or pin a plan with routed.fixed(...)"
            )
        if option("guidance_scale") not in (None, 1) and option("use_cache") is False:
            raise RoutingError(
                f"guidance_scale={option('guidance_scale')} runs a second prompt, and without a "
                f"cache nothing tells its decisions from the first one's; leave use_cache on"
            )
        copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        with ExitStack() as stack:
            stack.enter_context(self.driver.generating(copies))
            drafted = option("assistant_model") is not None or option("prompt_lookup_num_tokens")
            # The first pass verifies the first draft together with the prompt.
            lengths = _prompt_lengths(args, kwargs) if drafted and reads else None
            if lengths is not None and not self.driver.has_prompt_lengths:
                stack.enter_context(self.driver.prompt_lengths(lengths))
            return type(self.model).generate(self.model, *args, **kwargs)


def options_of(
    model: Any, given: Mapping[str, Any], args: Sequence[Any] = ()
) -> Callable[[str], Any]:
    """Return what tells the options of a call of `generate` by name, None where one isn't set.

    Those given by name come first, then the generation config given, then the model's own.
    """
    config = given.get("generation_config", args[1] if len(args) > 1 else None)
    own = None if given.get("use_model_defaults") is False else model.generation_config

    def option(name: str) -> Any:
        values = (given.get(name), getattr(config, name, None), getattr(own, name, None))
        return next((value for value in values if value is not None), None)

    return option


def end_tokens(given: Any) -> list[int]:
    """Return the tokens that end an answer, from an `eos_token_id` in any of its forms.

    Example:
        >>> end_tokens(2), end_tokens([2, 5]), end_tokens(None)
        ([2], [2, 5], [])
    """
    return [] if given is None else [int(end) for end in torch.as_tensor(given).reshape(-1)]


def _prompt_lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return each prompt's number of tokens, `[B]`, padding not counted."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return torch.as_tensor(mask.sum(dim=1))
    given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if given is None:
        given = kwargs.get("inputs_embeds")
    return None if given is None else torch.full((given.shape[0],), given.shape[1])
