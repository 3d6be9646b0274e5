"""llama.cpp: convert checkpoints to its format, quantise them, and run them on one thread."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCRIPT = "convert_hf_to_gguf.py"
MAX_TOKENS = 1024
"""The longest prompt with its answer."""


def add_checkout(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the checkout of llama.cpp."""
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")


def check_checkout(parser: argparse.ArgumentParser, llama_cpp: Path) -> None:
    """End with a message if llama.cpp's converter or llama-cpp-python is missing."""
    if find_spec("llama_cpp") is None or not (llama_cpp / SCRIPT).is_file():
        parser.error(f"install llama-cpp-python, and give a checkout with {SCRIPT}")


def convert(folder: Path, llama_cpp: Path, weights: str = "f32") -> Path:
    """Convert a checkpoint to GGUF with unquantised weights, `f32` or `f16`."""
    file = folder / f"model-{weights}.gguf"
    command = [sys.executable, str(llama_cpp / SCRIPT), str(folder)]
    command += ["--outfile", str(file), "--outtype", weights]
    places = [str(llama_cpp / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SCRIPT} failed: {done.stderr.splitlines()[-1]}")
    return file


def load(file: Path, num_threads: int = 1, num_rows: int = 1) -> Any:
    """Load a GGUF file; `num_rows` sequences fit into its cache."""
    from llama_cpp import Llama

    return Llama(
        str(file),
        n_ctx=MAX_TOKENS * num_rows,
        n_threads=num_threads,
        n_threads_batch=num_threads,
        verbose=False,
    )


def generate(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return so many tokens as llama.cpp writes them greedily."""
    model.reset()
    tokens: list[int] = []
    for token in model.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == num_tokens:
            break
    return tokens
