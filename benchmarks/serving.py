"""Whether llama.cpp says what transformers says of an exported path, and how long both take.

The full path and one without some layers are exported, converted by llama.cpp's own script to GGUF
in float32, and asked the same prompts greedily, by transformers and by llama.cpp, one thread each.
Texts are compared up to their ends; times are of as many tokens everywhere.

    python benchmarks/serving.py --llama-cpp DIR [--path FILE[:NAME]] [--quick] [--json FILE]
        [--model MODEL] [--prompts N] [--tokens N]

DIR is a checkout of llama.cpp, whose requirements for conversion are installed; llama-cpp-python
runs the model.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoModelForCausalLM

from drllm.models.base.prompts import encode, render
from drllm.models.export import export_path
from drllm.paths import StaticPath
from drllm.records.static_paths import load_path
from drllm.tasks.registry import get_task

QUICK = {"prompts": 3, "tokens": 8}
WHOLE = {"prompts": 20, "tokens": 32}
SCRIPT = "convert_hf_to_gguf.py"
OURS, THEIRS = "the exported path in each engine", "the full path in the same engine"


def convert(folder: Path, llama_cpp: Path) -> Path:
    """Convert a checkpoint to GGUF in float32."""
    file = folder / "model.gguf"
    words = [sys.executable, llama_cpp / SCRIPT, folder, "--outfile", file, "--outtype", "f32"]
    paths = [str(llama_cpp / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SCRIPT} failed: {done.stderr.splitlines()[-1]}")
    return file


def in_transformers(
    model: Any, ids: Sequence[int], num: int, end: int, least: int = 0
) -> list[int]:
    """Return the tokens, `num` at most, that transformers gives greedily."""
    output = model.generate(
        torch.tensor([ids]),
        min_new_tokens=least,
        max_new_tokens=num,
        do_sample=False,
        pad_token_id=end,
    )
    found: list[int] = output[0, len(ids) :].tolist()
    return found


def in_llama_cpp(model: Any, ids: Sequence[int], num: int) -> list[int]:
    """Return so many tokens as llama.cpp gives them greedily."""
    model.reset()
    found: list[int] = []
    for token in model.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if len(found) == num:
            break
    return found


def cut_at_end(tokens: Sequence[int], end: int) -> list[int]:
    """Return tokens up to the first end of a text."""
    return list(tokens[: tokens.index(end)] if end in tokens else tokens)


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    parser.add_argument("--path", help="static path; without a sixth of the layers unless given")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--tokens", type=int, help="written to each")
    options = parser.parse_args()
    if find_spec("llama_cpp") is None or not (options.llama_cpp / SCRIPT).is_file():
        parser.error(f"install llama-cpp-python, and give a checkout with {SCRIPT}")
    from llama_cpp import Llama

    options.clock, clock = "cpu", time.process_time
    torch.set_num_threads(1)
    sizes, base = common.sizes_of(options, QUICK, WHOLE), common.base_of(options)
    L, end, num = base.num_layers, base.tokenizer.eos_token_id, sizes["tokens"]
    middle = range(L // 2, L // 2 + L // 6)
    plans = {
        "full": StaticPath(range(L)),
        "path": StaticPath([at for at in range(L) if at not in middle])
        if options.path is None
        else load_path(options.path),
    }
    examples = get_task("builtin_facts").examples("test")[: sizes["prompts"]]
    rendered = [render(base.tokenizer, each.question, chat=True) for each in examples]
    asked = [encode(base.tokenizer, text) for text in rendered]
    equal, rows = dict.fromkeys(plans, 0), []
    with tempfile.TemporaryDirectory() as place:
        engines = {}
        for name, plan in plans.items():
            folder = export_path(base, plan, Path(place) / name).folder
            settings = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
            llama = Llama(str(convert(folder, options.llama_cpp)), **settings)
            engines[name] = AutoModelForCausalLM.from_pretrained(folder).eval(), llama
        for number, ids in enumerate(asked):
            row: dict[str, float] = {}
            for name in sorted(plans, reverse=bool(number % 2)):
                stock, llama = engines[name]
                started = clock()
                in_transformers(stock, ids, num, end, num)
                between = clock()
                said = in_llama_cpp(llama, ids, num)
                row[f"transformers {name}"] = between - started
                row[f"llama.cpp {name}"] = clock() - between
                text = in_transformers(stock, ids, num, end)
                equal[name] += cut_at_end(said, end) == cut_at_end(text, end)
            rows.append(row)
        for _, llama in engines.values():
            llama.close()
    shares = {
        engine: statistics.median(row[f"{engine} path"] / row[f"{engine} full"] for row in rows)
        for engine in ("transformers", "llama.cpp")
    }
    faster = statistics.median(row["transformers path"] / row["llama.cpp path"] for row in rows)
    layers = L - len(middle) if options.path is None else None
    print(f"texts of llama.cpp equal to those of transformers: {equal} of {len(asked)} prompts")
    print(f"time of the path by that of the full one: {shares}; layers {layers or 'given'} of {L}")
    print(f"llama.cpp against transformers, along the path: {faster:.2f} times as fast")
    figures = {
        **common.describe_run(base, options),
        "prompts": len(asked),
        "equal": equal,
        "repeats": 1,
    }
    figures |= {"overhead": shares, "speedup": faster, "ours": OURS, "theirs": THEIRS}
    common.write_figures(options, figures)


if __name__ == "__main__":
    main()
