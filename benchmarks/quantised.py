"""Layers out, weights of fewer bits, or both: size, seconds and the loss of texts, in one run.

The full path and a shorter one are exported and run in several precisions: by transformers in
float32 and with int8 weights (torchao), and by llama.cpp, where a built checkout is given, with 16,
8 and 4 bits. Measured are the size of the weights, and the seconds to read a prompt and to write
tokens after it, for one row and for eight. With `--text`, also the next-token loss of texts in
transformers, in float32 and int8: its mean over the kinds, with the 95 % interval over the texts of
each. Everything is compared with the full path in float32, or in 16 bits for llama.cpp. The bound
of a shorter path is its share of the multiply-adds.

The weights of the default model were stored with 4 bits before: what 4 bits cost it can't be
measured, so no loss of them is printed.

    python benchmarks/quantised.py [--path FILE[:NAME]] [--llama-cpp DIR] [--text FILE,...]
        [--num-texts N] [--repeats N] [--quick] [--json FILE] [--model MODEL]

DIR is a checkout of llama.cpp with `llama-quantize` and `llama-batched-bench` in build/bin.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import bound, int8, llama_cpp
from common.compare import average_kinds
from common.comparison import Comparison
from common.texts import Kinds, read_kinds
from torch.nn import functional as F

from drllm.evaluation.latency import (
    device_clock,
    prepare_decoding,
    prepare_reading,
    time_in_turns,
)
from drllm.model.load import BaseModel, load
from drllm.model.submodel import shorten
from drllm.prune.export import export

QUICK = {"repeats": 1, "num_texts": 2, "prompt": 32, "written": 4}
WHOLE = {"repeats": 5, "num_texts": 100, "prompt": 256, "written": 32}
ROWS = (1, 8)
MAX_TOKENS = 512
SEED = 0
FULL = "full path"
SHORTER = "shorter path"
READ = "read"
WRITE = "write"
FLOAT32 = "float32"
INT8 = int8.LABEL
GGUF_16 = "16 bits (llama.cpp F16)"
GGUF_8 = "8 bits (llama.cpp Q8_0)"
GGUF_4 = "4 bits (llama.cpp Q4_K_M)"
GGUF_TYPES = {GGUF_16: "F16", GGUF_8: "Q8_0", GGUF_4: "Q4_K_M"}
QUANTISE = "llama-quantize"
BENCH = "llama-batched-bench"
OURS = "layers left out, fewer bits, or both"
THEIRS = "the full path in float32, in 16 bits for llama.cpp"

System = tuple[str, str]
"""A path and a precision."""
Workload = tuple[str, int]
"""`READ` or `WRITE`, and the number of rows."""


@dataclass
class Measurement:
    """What was measured of a system.

    Attributes:
        num_bytes: The size of the weights.
        seconds: Workload → seconds in each round.
        losses: Kind of text → the next-token loss of each text, in nats a token.
    """

    num_bytes: int
    seconds: dict[Workload, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)


def find_program(checkout: Path, name: str) -> Path:
    """Return the place of a program of llama.cpp."""
    return checkout / "build" / "bin" / name


def check_programs(parser: argparse.ArgumentParser, checkout: Path) -> None:
    """End with a message if the checkout isn't built."""
    for name in (QUANTISE, BENCH):
        if not find_program(checkout, name).is_file():
            parser.error(
                f"{checkout} has no build/bin/{name}; build it there: cmake -B build && "
                f"cmake --build build --target {QUANTISE} {BENCH}"
            )


def load_in_precisions(folders: Mapping[str, Path]) -> dict[System, BaseModel]:
    """Load each checkpoint in float32, and with int8 weights where torchao is installed."""
    models = {}
    for name, folder in folders.items():
        models[name, FLOAT32] = load(str(folder), device="cpu", dtype=FLOAT32)
        if int8.is_available():
            models[name, INT8] = int8.load_int8(str(folder))
    return models


def count_bytes(model: Any) -> int:
    """Return the size of a model's weights as they are saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def time_transformers(
    models: Mapping[System, BaseModel], sizes: Mapping[str, int]
) -> dict[System, dict[Workload, list[float]]]:
    """Return the seconds of all models for all workloads, in turns."""
    seconds: dict[System, dict[Workload, list[float]]] = {system: {} for system in models}
    clock = device_clock(torch.device("cpu"))
    generator = torch.Generator().manual_seed(SEED)
    first, *_ = models.values()
    vocabulary = first.model.config.get_text_config().vocab_size
    write = partial(prepare_decoding, num_tokens=sizes["written"])
    for num_rows in ROWS:
        ids = torch.randint(3, vocabulary, (num_rows, sizes["prompt"]), generator=generator)
        for name, prepare in ((READ, prepare_reading), (WRITE, write)):
            calls = {system: prepare(base.model, ids) for system, base in models.items()}
            time_in_turns(calls, 1, clock)  # not counted
            rounds = time_in_turns(calls, sizes["repeats"], clock)
            for system in models:
                seconds[system][name, num_rows] = [times[system] for times in rounds]
    return seconds


def measure_losses(base: BaseModel, kinds: Kinds) -> dict[str, list[float]]:
    """Return the next-token loss of each text of each kind."""
    losses: dict[str, list[float]] = {}
    for kind, texts in kinds.items():
        losses[kind] = []
        for tokens in texts:
            ids = torch.tensor([list(tokens)])  # [1, T]
            logits = base.model(ids, use_cache=False).logits[0, :-1].float()
            losses[kind].append(F.cross_entropy(logits, ids[0, 1:]).item())
    return losses


def quantise_files(folders: Mapping[str, Path], checkout: Path) -> dict[System, Path]:
    """Convert each checkpoint to GGUF, and quantise it by llama.cpp's own program."""
    program = find_program(checkout, QUANTISE)
    files = {}
    for name, folder in folders.items():
        whole = llama_cpp.convert(folder, checkout, "f16")
        for precision, kind in GGUF_TYPES.items():
            file = whole
            if precision != GGUF_16:
                file = folder / f"model-{kind}.gguf"
                command = [program, whole, file, kind]
                subprocess.run(command, check=True, capture_output=True)
            files[name, precision] = file
    return files


def time_llama_cpp(
    files: Mapping[System, Path], checkout: Path, sizes: Mapping[str, int]
) -> dict[System, dict[Workload, list[float]]]:
    """Return the seconds of all files for all workloads, in turns, by llama.cpp's own program."""
    program = find_program(checkout, BENCH)
    seconds: dict[System, dict[Workload, list[float]]] = {system: {} for system in files}
    num_tokens = max(ROWS) * (sizes["prompt"] + sizes["written"])
    settings = ["-c", str(num_tokens), "-npp", str(sizes["prompt"]), "-ntg", str(sizes["written"])]
    settings += ["-npl", ",".join(map(str, ROWS)), "-t", str(torch.get_num_threads())]
    settings += ["--output-format", "jsonl"]
    for number in range(sizes["repeats"]):
        for system in sorted(files, reverse=number % 2 == 1):
            command = [str(program), "-m", str(files[system]), *settings]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    row = json.loads(line)
                    seconds[system].setdefault((READ, row["pl"]), []).append(row["t_pp"])
                    seconds[system].setdefault((WRITE, row["pl"]), []).append(row["t_tg"])
    return seconds


def measure(
    options: argparse.Namespace, base: BaseModel, skip: Sequence[int], sizes: Mapping[str, int]
) -> dict[System, Measurement]:
    """Export the model with and without the layers, and measure both in all precisions."""
    kinds: Kinds = {}
    if options.text:
        kinds = read_kinds(options.text, base, MAX_TOKENS)
        kinds = {name: texts[: sizes["num_texts"]] for name, texts in kinds.items()}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = {}
        for label, skipped in ((FULL, []), (SHORTER, skip)):
            folders[label] = Path(folder) / label.replace(" ", "-")
            export(shorten(base.model, skipped), base, folders[label])
        models = load_in_precisions(folders)
        with torch.no_grad():
            times = time_transformers(models, sizes)
            for system, model in models.items():
                losses = measure_losses(model, kinds)
                measured[system] = Measurement(count_bytes(model.model), times[system], losses)
        del models
        if options.llama_cpp:
            files = quantise_files(folders, options.llama_cpp)
            times = time_llama_cpp(files, options.llama_cpp, sizes)
            for system, file in files.items():
                measured[system] = Measurement(file.stat().st_size, times[system])
    return measured


def find_reference(system: System) -> System:
    """Return the system that another one is compared with."""
    _, precision = system
    return FULL, GGUF_16 if precision in GGUF_TYPES else FLOAT32


def summarise(measured: Mapping[System, Measurement]) -> list[dict[str, Any]]:
    """Return a row for each system: its size, its speed, and its loss beside the reference's."""
    rows = []
    for system, measurement in measured.items():
        reference = measured[find_reference(system)]
        speedups = {}
        for (what, num_rows), seconds in measurement.seconds.items():
            others = reference.seconds[what, num_rows]
            ratios = [theirs / ours for theirs, ours in zip(others, seconds, strict=True)]
            speedups[f"{what}, rows: {num_rows}"] = statistics.median(ratios)
        row: dict[str, Any] = {
            "path": system[0],
            "precision": system[1],
            "megabytes": measurement.num_bytes / 1e6,
            "speedup": speedups,
        }
        if measurement.losses:
            increases = {}
            for kind, losses in measurement.losses.items():
                pairs = zip(losses, reference.losses[kind], strict=True)
                increases[kind] = [ours - theirs for ours, theirs in pairs]
            row["loss_increase"], row["interval"] = average_kinds(increases)
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table of Markdown."""
    names = list(rows[0]["speedup"])
    print(f"| | | MB | {' | '.join(f'times as fast: {name}' for name in names)} | loss |")
    print(f"|---|---|--:|{'--:|' * len(names)}---|")
    for row in rows:
        speeds = " | ".join(f"{row['speedup'][name]:.2f}" for name in names)
        loss = "–"
        if "interval" in row:
            low, high = row["interval"]
            loss = f"{row['loss_increase']:+.3f} ({low:+.3f} to {high:+.3f})"
        system = f"{row['path']} | {row['precision']} | {row['megabytes']:.0f}"
        print(f"| {system} | {speeds} | {loss} |")


def list_comparisons(
    rows: Sequence[Mapping[str, Any]], least: Mapping[str, float]
) -> list[Comparison]:
    """Return the speed of each row beside its reference.

    Args:
        rows: What `summarise` returns.
        least: For `read` and `write`, the shorter path's share of the multiply-adds. It is a bound
            where the weights have as many bits as the reference's.
    """
    comparisons = []
    for row in rows:
        if (row["path"], row["precision"]) == find_reference((row["path"], row["precision"])):
            continue
        has_bound = row["path"] == SHORTER and row["precision"] in (FLOAT32, GGUF_16)
        for name, speedup in row["speedup"].items():
            what, _, _ = name.partition(",")
            bound_of_speed = 1 / least[what] if has_bound else None
            label = f"{name}: {row['path']}, {row['precision']}"
            comparisons.append(Comparison(label, speedup, bound_of_speed))
    return comparisons


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser)
    common.add_skip(parser)
    parser.add_argument("--llama-cpp", type=Path, help="a built checkout of llama.cpp")
    parser.add_argument("--text", help="files of texts, one kind a file, to measure the loss on")
    parser.add_argument("--num-texts", type=int, help="of each kind")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    options.clock = "wall"
    if options.llama_cpp:
        check_programs(parser, options.llama_cpp)
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    skip = common.list_skipped(options, base)
    rows = summarise(measure(options, base, skip, sizes))
    report(rows)
    decisions = common.leave_out(skip, base.num_layers)
    least = {
        READ: bound.share_of_work(base, decisions, sizes["prompt"]),
        WRITE: bound.share_of_work(base, decisions, num_tokens=1),
    }
    figures = {
        **common.describe_run(base, options),
        "ours": OURS,
        "theirs": THEIRS,
        "rows": rows,
        "speedup": {f"{row['path']}, {row['precision']}": row["speedup"] for row in rows},
        **sizes,
    }
    common.write_figures(options, figures, list_comparisons(rows, least))


if __name__ == "__main__":
    main()
