"""Texts that the full model writes by itself, to repair paths with where no other text is given.

The model begins each text with a word drawn from its vocabulary, and samples the rest from its own
distribution. Such texts are of many kinds, as the texts that the model was trained on.

Source: LLM-QAT (arXiv 2305.17888), which calibrates quantised models on them.
"""

import random
from collections.abc import Callable
from typing import Any

import torch

from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many

MAX_NEW_TOKENS = 192  # of a text
TEXTS_AT_ONCE = 32


def write_own_texts(
    routed: RoutedModel,
    num_tokens: int,
    seed: int,
    on_progress: Callable[[float, float], None] | None = None,
) -> list[str]:
    """Let the full model write texts, sampled at temperature 1 without a cut of the distribution.

    The same model, seed and number give the same texts on the same machine.

    Args:
        routed: The model, with its tokenizer; no plan is in use.
        num_tokens: How many tokens to write at least.
        seed: Seed of the first words and of the sampling.
        on_progress: Called with the tokens written and `num_tokens`.
    """
    first_words = _list_first_words(routed.tokenizer)
    draw = random.Random(seed)
    texts: list[str] = []
    num_written = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while num_written < num_tokens:
            prompts = draw.choices(first_words, k=TEXTS_AT_ONCE)
            answers = generate_many(
                routed,
                prompts,
                batch_size=TEXTS_AT_ONCE,
                max_new_tokens=MAX_NEW_TOKENS,
                chat=False,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                texts.append(prompt + answer.text)
                num_written += len(answer.tokens)
            if on_progress is not None:
                on_progress(min(num_written, num_tokens), num_tokens)
    return texts


def _list_first_words(tokenizer: Any) -> list[str]:
    """Return the tokens that are words of letters, sorted: the texts may begin with them."""
    words = set()
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        if word.isalpha() and word.isascii():
            words.add(word)
    return sorted(words)
