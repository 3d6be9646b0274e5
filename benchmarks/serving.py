"""Whether llama.cpp writes what transformers writes along an exported path, and how long both take.

The full path and one without some layers are exported, converted by llama.cpp's own script to GGUF
in float32, and given the same prompts, which both engines answer greedily on one thread. Texts are
compared up to their ends; times are of as many tokens everywhere. The bound is the share of the
multiply-adds of a decode step that the path still has; times include the prompt, which saves more.

    python benchmarks/serving.py --llama-cpp DIR [--skip LAYERS] [--quick] [--json FILE]
        [--model MODEL] [--prompts N] [--tokens N]

DIR is a checkout of llama.cpp, whose requirements for conversion are installed; llama-cpp-python
runs the model.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from common import bound, llama_cpp
from common.comparison import Comparison
from transformers import AutoModelForCausalLM

from drllm.model.load import BaseModel
from drllm.model.prompts import encode, render
from drllm.model.submodel import shorten
from drllm.prune.export import export
from drllm.tasks.registry import get_task

QUICK = {"prompts": 3, "tokens": 8}
WHOLE = {"prompts": 20, "tokens": 32}
OURS = "the exported path in each engine"
THEIRS = "the full path in the same engine"
TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
ENGINES = (TRANSFORMERS, LLAMA_CPP)
FULL = "full"
PATH = "path"

Seconds = dict[tuple[str, str], float]
"""(engine, path) → seconds of one prompt and its answer."""


@dataclass(frozen=True)
class Engines:
    """One path in both engines.

    Attributes:
        transformers: The exported checkpoint.
        llama: The same checkpoint as GGUF.
        end: The token that ends a text.
        num_tokens: How many tokens are written.
    """

    transformers: Any
    llama: Any
    end: int
    num_tokens: int

    def write_in_transformers(self, prompt: Sequence[int], *, stop: bool) -> list[int]:
        """Return the tokens that transformers writes greedily, up to the end if `stop`."""
        output = self.transformers.generate(
            torch.tensor([prompt]),
            min_new_tokens=0 if stop else self.num_tokens,
            max_new_tokens=self.num_tokens,
            do_sample=False,
            pad_token_id=self.end,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def write_in_llama_cpp(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens that llama.cpp writes greedily."""
        return llama_cpp.generate(self.llama, prompt, self.num_tokens)

    def are_texts_equal(self, prompt: Sequence[int], by_llama: Sequence[int]) -> bool:
        """Tell whether both engines write the same text."""
        by_transformers = self.write_in_transformers(prompt, stop=True)
        return self._cut_at_end(by_llama) == self._cut_at_end(by_transformers)

    def _cut_at_end(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens[: tokens.index(self.end)] if self.end in tokens else tokens)


def make_prompts(base: BaseModel, number: int) -> list[list[int]]:
    """Return built-in questions as tokens, through the chat template."""
    examples = get_task("builtin_facts").examples("test")[:number]
    texts = [render(base.tokenizer, example.question, chat=True) for example in examples]
    return [encode(base.tokenizer, text) for text in texts]


def load_engines(
    base: BaseModel, skip: Sequence[int], folder: Path, checkout: Path, num_tokens: int
) -> Engines:
    """Export the model without some layers, and load it in both engines."""
    export(shorten(base.model, skip), base, folder)
    return Engines(
        transformers=AutoModelForCausalLM.from_pretrained(folder).eval(),
        llama=llama_cpp.load(llama_cpp.convert(folder, checkout)),
        end=base.tokenizer.eos_token_id,
        num_tokens=num_tokens,
    )


def answer(
    engines: Mapping[str, Engines], prompts: Sequence[Sequence[int]], clock: common.Clock
) -> tuple[list[Seconds], dict[str, int]]:
    """Let both engines answer all prompts along both paths, in turns.

    Returns:
        The seconds of each prompt, and for each path how many texts of the engines are equal.
    """
    rows = []
    num_equal = dict.fromkeys(engines, 0)
    for number, prompt in enumerate(prompts):
        row: Seconds = {}
        for name in sorted(engines, reverse=number % 2 == 1):
            engine = engines[name]
            started = clock()
            engine.write_in_transformers(prompt, stop=False)
            between = clock()
            by_llama = engine.write_in_llama_cpp(prompt)
            row[TRANSFORMERS, name] = between - started
            row[LLAMA_CPP, name] = clock() - between
            num_equal[name] += engine.are_texts_equal(prompt, by_llama)
        rows.append(row)
    return rows, num_equal


def answer_along_paths(
    base: BaseModel,
    paths: Mapping[str, Sequence[int]],
    checkout: Path,
    sizes: Mapping[str, int],
) -> tuple[list[Seconds], dict[str, int]]:
    """Export the model without the layers of each entry, and let both engines answer."""
    prompts = make_prompts(base, sizes["prompts"])
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: load_engines(base, skip, Path(folder) / name, checkout, sizes["tokens"])
            for name, skip in paths.items()
        }
        try:
            return answer(engines, prompts, time.process_time)
        finally:
            for engine in engines.values():
                engine.llama.close()


def compare_with_full(rows: Sequence[Seconds], least: float) -> dict[str, Comparison]:
    """Compare for each engine the seconds along the shorter path with those along the full one.

    Args:
        rows: The seconds of each prompt.
        least: The share of the multiply-adds that the shorter path still has.
    """
    comparisons = {}
    for engine in ENGINES:
        speedup = statistics.median(row[engine, FULL] / row[engine, PATH] for row in rows)
        what = f"write along a shorter path, {engine}"
        comparisons[engine] = Comparison(what, speedup, 1 / least)
    return comparisons


def compare_engines(rows: Sequence[Seconds]) -> float:
    """Return how many times as fast as transformers llama.cpp is along the shorter path."""
    return statistics.median(row[TRANSFORMERS, PATH] / row[LLAMA_CPP, PATH] for row in rows)


def report(
    comparisons: Mapping[str, Comparison],
    least: float,
    faster: float,
    num_equal: Mapping[str, int],
    num_texts: int,
) -> None:
    """Print what came out."""
    for name, number in num_equal.items():
        print(f"{name} path: {number} of {num_texts} texts of llama.cpp are those of transformers")
    for engine, comparison in comparisons.items():
        print(
            f"{engine}: the path takes {1 / comparison.speedup:.3f} of the full path's time, its "
            f"multiply-adds are {least:.3f} (share of the bound {comparison.share:.0%})"
        )
    print(f"llama.cpp is {faster:.2f} times as fast as transformers along the path")


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser)
    llama_cpp.add_checkout(parser)
    common.add_skip(parser)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--tokens", type=int, help="written to each")
    options = parser.parse_args()
    llama_cpp.check_checkout(parser, options.llama_cpp)
    options.clock = "cpu"
    torch.set_num_threads(1)
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    skip = common.list_skipped(options, base)
    decisions = common.leave_out(skip, base.num_layers)
    least = bound.share_of_work(base, decisions, num_tokens=1)
    paths: dict[str, list[int]] = {FULL: [], PATH: skip}
    rows, num_equal = answer_along_paths(base, paths, options.llama_cpp, sizes)
    comparisons = compare_with_full(rows, least)
    faster = compare_engines(rows)
    report(comparisons, least, faster, num_equal, len(rows))
    figures = {
        **common.describe_run(base, options),
        "prompts": len(rows),
        "skipped": skip,
        "equal": num_equal,
        "repeats": 1,
        "overhead": {engine: 1 / each.speedup for engine, each in comparisons.items()},
        "llama_cpp_speedup": faster,
        "ours": OURS,
        "theirs": THEIRS,
    }
    common.write_figures(options, figures, list(comparisons.values()))


if __name__ == "__main__":
    main()
