"""Write `builtin_texts`, the texts that come with drllm: SmolLM2-135M-Instruct writes them.

Most are texts that the model samples freely, each from a word of its vocabulary: such texts are of
many kinds, as those that it was trained on (LLM-QAT, arXiv 2305.17888, calibrates quantised models
on them). The others are its chat answers to built-in questions
of the split `search`. They were written once, with the defaults, and another machine may sample
others: floating-point sums differ.

    python benchmarks/make_builtin_texts.py [--output FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import common
import torch

from drllm.model.prompts import encode, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.records.codec import write_atomically
from drllm.tasks.registry import get_task
from drllm.tasks.texts import BUILTIN_TEXTS_FILE

NUM_TOKENS = 16_000  # of the texts that are sampled freely
NUM_QUESTIONS = 60  # that are answered in the chat
MAX_ANSWER_TOKENS = 96
MAX_NEW_TOKENS = 192  # of a text that is sampled freely
TEXTS_AT_ONCE = 32


def main() -> None:
    """Write the texts, and print how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_model(parser)
    parser.add_argument("--output", type=Path, default=BUILTIN_TEXTS_FILE, help="file to write")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="tokens to sample freely")
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS, help="questions to answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of texts and questions")
    options = parser.parse_args()

    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    texts = write_own_texts(routed, options.tokens, options.seed, print_progress)
    texts += answer_questions(routed, options.questions, options.seed)
    write_texts(options.output, texts)
    num_tokens = sum(len(encode(base.tokenizer, text)) for text in texts)
    num_bytes = options.output.stat().st_size
    print(f"{len(texts)} texts, {num_tokens:,} tokens, {num_bytes:,} bytes: {options.output}")


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
    draw = Random(seed)
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


def print_progress(num_written: float, num_tokens: float) -> None:
    """Print how many tokens are written."""
    print(f"{num_written:,.0f} of {num_tokens:,.0f} tokens", flush=True)


def answer_questions(routed: RoutedModel, number: int, seed: int) -> list[str]:
    """Return questions of the split `search` with the model's greedy answers, as chats."""
    examples = get_task("builtin_facts").examples("search")
    questions = [example.question for example in Random(seed).sample(examples, k=number)]
    answers = generate_many(routed, questions, max_new_tokens=MAX_ANSWER_TOKENS)
    tokenizer = routed.tokenizer
    chats = []
    for question, answer in zip(questions, answers, strict=True):
        prompt = render(tokenizer, question, chat=True)
        chats.append(prompt + tokenizer.decode(answer.tokens))
    return chats


def write_texts(file: Path, texts: Sequence[str]) -> None:
    """Write texts as gzipped JSON lines; the same texts give the same bytes."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    write_atomically(file, gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
