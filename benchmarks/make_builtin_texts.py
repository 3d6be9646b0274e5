"""Write `builtin_texts`, the texts that come with drllm: SmolLM2-135M-Instruct writes them.

Most are texts that the model samples freely. The others are its chat answers to built-in questions
of the split `search`. They were written once, with the defaults, and another machine may sample
others: floating-point sums differ.

    python benchmarks/make_builtin_texts.py [--output FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import common

from drllm.models.base.prompts import encode, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.records.codec import write_atomically
from drllm.tasks.registry import get_task
from drllm.tuning.heal_texts import BUILTIN_TEXTS_FILE
from drllm.tuning.own_texts import write_own_texts

NUM_TOKENS = 16_000  # of the texts that are sampled freely
NUM_QUESTIONS = 60  # that are answered in the chat
MAX_ANSWER_TOKENS = 96


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
