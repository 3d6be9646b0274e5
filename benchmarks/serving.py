"""Whether llama.cpp writes what transformers writes along an exported path, and how long both take.

The full path and one without some layers are exported, converted by llama.cpp's own script to GGUF
in float32, and given the same prompts, which both engines answer greedily on one thread. Texts are
compared up to their ends; times are of as many tokens everywhere. The bound is the share of the
multiply-adds of a decode step that the path still has; times include the prompt, which saves more.

    python benchmarks/serving.py --llama-cpp DIR [--path FILE[:NAME]] [--quick] [--json FILE]
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

from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import encode, render
from drllm.models.export import export_path
from drllm.paths import StaticPath
from drllm.records.static_paths import load_path
from drllm.tasks.registry import get_task

QUICK = {"prompts": 3, "tokens": 8}
WHOLE = {"prompts": 20, "tokens": 32}
OURS = "the exported path in each engine"
THEIRS = "the full path in the same engine"
TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
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


def choose_paths(base: BaseModel, name: str | None) -> dict[str, StaticPath]:
    """Return the full path, and the named one or one without a sixth of the layers."""
    num_layers = base.num_layers
    full = StaticPath(range(num_layers))
    if name is not None:
        return {FULL: full, PATH: load_path(name)}
    first = num_layers // 2
    left_out = range(first, first + num_layers // 6)
    kept = [layer for layer in range(num_layers) if layer not in left_out]
    return {FULL: full, PATH: StaticPath(kept)}


def make_prompts(base: BaseModel, number: int) -> list[list[int]]:
    """Return built-in questions as tokens, through the chat template."""
    examples = get_task("builtin_facts").examples("test")[:number]
    texts = [render(base.tokenizer, example.question, chat=True) for example in examples]
    return [encode(base.tokenizer, text) for text in texts]


def load_engines(
    base: BaseModel, path: StaticPath, folder: Path, checkout: Path, num_tokens: int
) -> Engines:
    """Export a path, and load it in both engines."""
    exported = export_path(base, path, folder).folder
    return Engines(
        transformers=AutoModelForCausalLM.from_pretrained(exported).eval(),
        llama=llama_cpp.load(llama_cpp.convert(exported, checkout)),
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


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser)
    llama_cpp.add_checkout(parser)
    parser.add_argument("--path", help="static path; without a sixth of the layers unless given")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--tokens", type=int, help="written to each")
    options = parser.parse_args()
    llama_cpp.check_checkout(parser, options.llama_cpp)
    options.clock = "cpu"
    torch.set_num_threads(1)
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    paths = choose_paths(base, options.path)
    prompts = make_prompts(base, sizes["prompts"])
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: load_engines(base, path, Path(folder) / name, options.llama_cpp, sizes["tokens"])
            for name, path in paths.items()
        }
        rows, num_equal = answer(engines, prompts, time.process_time)
        for engine in engines.values():
            engine.llama.close()
    report(base, options, paths[PATH], rows, num_equal)


def report(
    base: BaseModel,
    options: Any,
    path: StaticPath,
    rows: Sequence[Seconds],
    num_equal: Mapping[str, int],
) -> None:
    """Print the figures, and write them if `--json` asks for it."""
    least = bound.share_of_work(base, path.decisions(base.num_layers), num_tokens=1)
    for name, number in num_equal.items():
        print(f"{name} path: {number} of {len(rows)} texts of llama.cpp are those of transformers")
    shares = {}
    comparisons = []
    for engine in (TRANSFORMERS, LLAMA_CPP):
        share = statistics.median(row[engine, PATH] / row[engine, FULL] for row in rows)
        shares[engine] = share
        comparison = Comparison(f"write along a shorter path, {engine}", 1 / share, 1 / least)
        comparisons.append(comparison)
        print(
            f"{engine}: the path takes {share:.3f} of the full path's time, its multiply-adds are "
            f"{least:.3f} (share of the bound {comparison.share:.0%})"
        )
    faster = statistics.median(row[TRANSFORMERS, PATH] / row[LLAMA_CPP, PATH] for row in rows)
    print(f"llama.cpp is {faster:.2f} times as fast as transformers along the path")
    figures = {
        **common.describe_run(base, options),
        "prompts": len(rows),
        "layers": list(path.layers),
        "equal": dict(num_equal),
        "repeats": 1,
        "overhead": shares,
        "llama_cpp_speedup": faster,
        "ours": OURS,
        "theirs": THEIRS,
    }
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
