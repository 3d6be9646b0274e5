"""From a prompt's text to the tokens that a model reads: one way, for every stage.

Owns the chat template and the special tokens. Search, training, generation and evaluation all
encode through here, so that routers are trained on exactly what they will read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def render(tokenizer: Any, text: str, *, chat: bool) -> str:
    """Return the text that the model reads.

    Args:
        tokenizer: The base model's tokenizer.
        text: A prompt.
        chat: Put the text into the user's turn of the tokenizer's chat template, where it has
            one; a base model without a template reads the text as it is.
    """
    if not chat or not getattr(tokenizer, "chat_template", None):
        return text
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return rendered


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
