"""From a prompt's text to the tokens that a model reads: one way, for every stage.

Owns the chat template and the special tokens. Search, training, generation and evaluation all
encode through here, so that routers are trained on exactly what they will read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from drllm.errors import ConfigError

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages
"""A text, or a conversation so far: messages with `role` and `content`."""


def render(tokenizer: Any, prompt: Prompt, *, chat: bool) -> str:
    """Return the text that the model reads.

    Args:
        tokenizer: The base model's tokenizer.
        prompt: A text, or a conversation.
        chat: Put a text into the user's turn of the tokenizer's chat template, where it has one;
            a base model without a template reads the text as it is.

    Raises:
        ConfigError: A conversation without a template to put it into, or a prompt that the
            template refuses.
    """
    template = chat and getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, str):
        if not template:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    elif not template:
        why = "the tokenizer has none" if chat else "chat is turned off"
        raise ConfigError(f"a conversation needs a chat template, and {why}; give a text instead")
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ConfigError(
            f"the model's chat template refuses the prompt: {error}; see its model card"
        ) from error
    return rendered


def context_length(model: Any) -> int | None:
    """Return how many tokens a model can read, or None where its config names no limit."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a rendered prompt.

    Special tokens are added as the tokenizer is configured to, except where the text brings its
    own (a rendered chat template starts with the begin-of-sequence token).
    """
    bos = getattr(tokenizer, "bos_token", None)
    own = bos is not None and text.startswith(bos)
    tokens: list[int] = tokenizer(text, add_special_tokens=not own)["input_ids"]
    return tokens


def encode_continuation(tokenizer: Any, text: str, continuation: str) -> list[int]:
    """Return the tokens by which a continuation follows a rendered prompt.

    The prompt and its continuation are tokenised together, and what goes beyond the prompt's own
    tokens is the continuation.

    Source: the rule of lm-evaluation-harness (`TemplateLM._encode_pair`); its special case for
        prompts that end in white space never arises with plain prompts of ours.
    """
    return encode(tokenizer, text + continuation)[len(encode(tokenizer, text)) :]


def left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Return token rows as one batch with padding on the left, and its attention mask.

    Args:
        rows: Token ids of each prompt.
        device: Where the batch lies.

    Returns:
        `[B, T]` token ids (padding is 0, and masked) and `[B, T]` mask of ones and zeros.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
