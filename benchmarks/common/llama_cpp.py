"""llama.cpp: convert checkpoints to its format, and run them on one thread."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError
from drllm.pipeline.bundle import convert_to_gguf, find_converter

MAX_TOKENS = 1024
"""The longest prompt with its answer."""


def add_checkout(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the checkout of llama.cpp."""
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")


def check_checkout(parser: argparse.ArgumentParser, llama_cpp: Path) -> None:
    """End with a message if llama.cpp's converter or llama-cpp-python is missing."""
    try:
        find_converter(llama_cpp)
    except ConfigError as error:
        parser.error(str(error))
    if find_spec("llama_cpp") is None:
        parser.error("install llama-cpp-python")


def convert(folder: Path, llama_cpp: Path, weights: str = "f32") -> Path:
    """Convert a checkpoint to GGUF with unquantised weights, `f32` or `f16`."""
    file = folder / f"model-{weights}.gguf"
    convert_to_gguf(folder, file, find_converter(llama_cpp), weights)
    return file


def load(file: Path) -> Any:
    """Load a GGUF file, to run it on one thread."""
    from llama_cpp import Llama

    return Llama(str(file), n_ctx=MAX_TOKENS, n_threads=1, n_threads_batch=1, verbose=False)


def generate(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return so many tokens as llama.cpp writes them greedily."""
    model.reset()
    tokens: list[int] = []
    for token in model.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == num_tokens:
            break
    return tokens
