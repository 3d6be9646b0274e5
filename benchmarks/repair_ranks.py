"""Does the stand-in choose the paths that are best after their refit? Random paths, held-out texts.

`drllm tune` compares candidates with a stand-in for the refit, and refits only the best of each
level. Here every path is measured three times on texts that neither was fitted on: plain, with the
stand-in, and with its refit. The rank correlation with the refit says how well the cheap ways order
paths. How much each choice loses is the loss, after the refit, of the path that the cheap way likes
best minus that of the best path, among paths with as many layers out; with the 95 % interval over
texts. The refit's own choice is the bound: it loses nothing.

A path that is measured is kept in `--output-dir`, so the same command goes on after a kill.

    python benchmarks/repair_ranks.py [--tasks TASKS] [--text FILE,...] [--paths N] [--tokens N]
        [--texts N] [--least N] [--most N] [--output-dir DIR] [--quick] [--json FILE]
        [--data-dir DIR] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import msgspec
from common.compare import SEED
from scipy.stats import spearmanr

from drllm.config import TuneConfig
from drllm.models.base.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.static_paths import TEST
from drllm.statistics.intervals import mean_interval
from drllm.tasks.examples import choose
from drllm.tuning.calibration import choose_texts, read_calibration
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.heal_tokens import tokenize_source
from drllm.tuning.objectives import LOSS, make_prompt
from drllm.tuning.path_scorer import Item, make_text_items, score_paths
from drllm.tuning.refit import join_weights, refit
from drllm.tuning.stand_in import StandIn, fit_stand_in
from drllm.work.store import ResultStore

QUICK = {"paths": 4, "tokens": 1500, "texts": 6, "least": 2, "most": 3}
WHOLE = {"paths": 60, "tokens": 10_000, "texts": 50, "least": 2, "most": 7}
CHEAP_WAYS = ("plain", "stand-in")
BEST_WAY = "refit"
CACHE_GB = 1.0
ADAPTER = "measured"


class PathLosses(msgspec.Struct, frozen=True, kw_only=True):
    """A path's next-token loss on each text, in nats a token, and what it took to measure it."""

    layers: list[int]
    losses: dict[str, list[float]]  # plain, stand-in and refit → the loss of each text
    seconds: dict[str, float]


def draw_paths(num_layers: int, sizes: Mapping[str, int]) -> list[StaticPath]:
    """Draw different paths that run layer 0, as many of each number of layers out as possible."""
    generator = random.Random(SEED)
    nums_out = range(sizes["least"], sizes["most"] + 1)
    paths: dict[StaticPath, None] = {}  # an ordered set
    while len(paths) < sizes["paths"]:
        num_out = nums_out[len(paths) % len(nums_out)]
        skipped = generator.sample(range(1, num_layers), num_out)
        paths[StaticPath(sorted(set(range(num_layers)) - set(skipped)))] = None
    return list(paths)


def read_texts(
    base: BaseModel, splits: Sequence[TaskSplits], config: TuneConfig, num_tokens: int
) -> list[Tokens]:
    """Return the texts that maps and weights are fitted on."""
    sources = read_calibration(config, splits)
    by_source = {source.name: tokenize_source(base, source) for source in sources}
    return choose_texts(by_source, num_tokens, SEED)


def held_out_items(base: BaseModel, splits: Sequence[TaskSplits], num_texts: int) -> list[Item]:
    """Return questions to test with their right answers, as many of each task."""
    items = []
    for number, task in enumerate(splits):
        share = num_texts * (number + 1) // len(splits) - num_texts * number // len(splits)
        examples = choose(task.examples[TEST], share, SEED)
        prompts = [make_prompt(task.task, example, LOSS) for example in examples]
        items += make_text_items(base, prompts)
    return items


def measure_path(
    routed: RoutedModel,
    stand_in: StandIn,
    texts: Sequence[Tokens],
    items: Sequence[Item],
    path: StaticPath,
) -> PathLosses:
    """Measure a path plain, with the stand-in, and with its refit."""
    losses = {}
    seconds = {}
    for name in ("plain", "stand-in", BEST_WAY):
        started = time.perf_counter()
        crossings = stand_in if name == "stand-in" else None
        scored_path = path
        if name == BEST_WAY:
            weights = join_weights(refit(routed, path, texts))
            routed.injection.add_adapter(ADAPTER, refit=weights)
            scored_path = path.with_adapter(ADAPTER)
        [values] = score_paths(routed, items, [scored_path], LOSS, CACHE_GB, crossings).objective
        losses[name] = [-value for value in values]
        if name == BEST_WAY:
            routed.injection.adapters.drop(ADAPTER)
        seconds[name] = time.perf_counter() - started
    return PathLosses(layers=list(path.layers), losses=losses, seconds=seconds)


def correlate(rows: Sequence[PathLosses], way: str) -> float:
    """Return Spearman's correlation of the losses of a cheap way with those of the refit."""
    cheap = [fmean(row.losses[way]) for row in rows]
    best = [fmean(row.losses[BEST_WAY]) for row in rows]
    return float(spearmanr(cheap, best).statistic)


def choice_loses(rows: Sequence[PathLosses], way: str) -> dict[str, Any]:
    """Return how much the path that a cheap way likes best loses against the best, refitted."""
    chosen = min(rows, key=lambda row: fmean(row.losses[way]))
    best = min(rows, key=lambda row: fmean(row.losses[BEST_WAY]))
    pairs = zip(chosen.losses[BEST_WAY], best.losses[BEST_WAY], strict=True)
    differences = [loss - best_loss for loss, best_loss in pairs]
    low, high = mean_interval(differences, SEED)
    return {"mean": fmean(differences), "interval": [low, high], "layers": chosen.layers}


def summarise(rows: Sequence[PathLosses], full_loss: float, num_layers: int) -> dict[str, Any]:
    """Return the figures of all paths, and by the number of layers out."""
    figures: dict[str, Any] = {"paths": len(rows), "full_loss": full_loss, "spearman": {}}
    by_size: dict[int, list[PathLosses]] = {}
    for row in rows:
        by_size.setdefault(num_layers - len(row.layers), []).append(row)
    for way in CHEAP_WAYS:
        figures["spearman"][way] = correlate(rows, way)
    figures["layers_out"] = {}
    for num_out, group in sorted(by_size.items()):
        if len(group) < 2:
            continue
        figures["layers_out"][num_out] = {
            "paths": len(group),
            "spearman": {way: correlate(group, way) for way in CHEAP_WAYS},
            "choice_loses": {way: choice_loses(group, way) for way in CHEAP_WAYS},
            "mean_loss": {
                way: fmean(fmean(row.losses[way]) for row in group)
                for way in (*CHEAP_WAYS, BEST_WAY)
            },
        }
    figures["seconds_a_path"] = {
        way: fmean(row.seconds[way] for row in rows) for way in (*CHEAP_WAYS, BEST_WAY)
    }
    return figures


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print the figures; the bound of a choice is 0, what the refit's own choice loses."""
    for way, value in figures["spearman"].items():
        print(f"{way}: rank correlation with the refit {value:.3f} over {figures['paths']} paths")
    for num_out, group in figures["layers_out"].items():
        for way, found in group["choice_loses"].items():
            low, high = found["interval"]
            print(
                f"{num_out} layers out, chosen {way}: rank correlation "
                f"{group['spearman'][way]:.3f}, the choice loses {found['mean']:.4f} nats a token "
                f"({low:.4f} to {high:.4f}), bound 0"
            )


def measure_all(
    base: BaseModel, options: argparse.Namespace, sizes: Mapping[str, int], folder: Path
) -> dict[str, Any]:
    """Measure all paths that aren't kept in the folder, and return the figures."""
    config = TuneConfig(data_dir=options.data_dir, text=options.text)
    splits = split_tasks(config, options.tasks)
    texts = read_texts(base, splits, config, sizes["tokens"])
    items = held_out_items(base, splits, sizes["texts"])
    identity = {
        "model": base.identity,
        "runtime": base.runtime,
        "texts_sha256": hash_values(texts),
        "held_out_sha256": hash_values(item.request.continuations for item in items),
    }
    store = ResultStore(folder, identity, stage="benchmark")
    store.open()
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    started = time.perf_counter()
    stand_in = fit_stand_in(routed, texts)
    fit_seconds = time.perf_counter() - started
    full = StaticPath(range(base.num_layers))
    [values] = score_paths(routed, items, [full], LOSS, CACHE_GB).objective
    rows = []
    for path in draw_paths(base.num_layers, sizes):
        key = " ".join(map(str, path.layers))
        make = partial(measure_path, routed, stand_in, texts, items, path)
        row = store.get_or_make(key, PathLosses, make)
        rows.append(row)
        means = ", ".join(f"{way} {fmean(losses):.4f}" for way, losses in row.losses.items())
        print(f"{path.edits(base.num_layers)}: {means}", flush=True)
    figures = summarise(rows, -fmean(values), base.num_layers)
    figures["stand_in_fit_seconds"] = fit_seconds
    figures["calibration_tokens"] = sum(map(len, texts))
    figures["held_out_texts"] = len(items)
    return figures


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--tasks", default="builtin_facts,builtin_arithmetic", help="comma list")
    parser.add_argument("--text", help="more texts to fit on, as drllm tune takes them")
    parser.add_argument("--paths", type=int, help="how many random paths")
    parser.add_argument("--tokens", type=int, help="to fit on")
    parser.add_argument("--texts", type=int, help="held out, of all tasks together")
    parser.add_argument("--least", type=int, help="layers out")
    parser.add_argument("--most", type=int, help="layers out")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/repair-ranks"))
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    options = parser.parse_args()
    options.clock = "wall"
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    with common.measurement_folder(options) as folder:
        figures = measure_all(base, options, sizes, folder)
    print_figures(figures)
    common.write_figures(options, {**common.describe_run(base, options), **figures})


if __name__ == "__main__":
    main()
