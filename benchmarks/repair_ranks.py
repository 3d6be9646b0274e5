"""Does the stand-in choose the paths that are best after their refit? Random paths, held-out texts.

`drllm tune` compares candidates with a stand-in for the refit, and refits only the best of each
level. Here every path is measured three times on texts that neither was fitted on: plain, with the
stand-in, and with its refit. The rank correlation with the refit says how well the cheap ways order
paths. How much each choice loses is the loss, after the refit, of the path that the cheap way likes
best minus that of the best path, among paths with as many layers out. Losses are means over the
kinds of text, and their 95 % intervals resample each kind by itself. The refit's own choice is the
bound: it loses nothing.

The kinds are files (`--text` to fit on, `--held-out` to measure on), else tasks: their questions
with the right answers, of the split for fitting and of the one for tests.
A path that is measured is kept in `--output-dir`, so the same command goes on after a kill.
`--draw N` draws other paths: change the stand-in with one draw, and measure it with another.

    python benchmarks/repair_ranks.py [--tasks TASKS | --text FILE,... --held-out FILE,...]
        [--paths N] [--tokens N] [--texts N] [--least N] [--most N] [--draw N] [--output-dir DIR]
        [--quick] [--json FILE] [--data-dir DIR] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
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
from common.compare import SEED, average_kinds
from common.texts import read_kinds, refuse_fitted_texts
from scipy.stats import spearmanr

from drllm.config import TuneConfig
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.static_paths import TEST
from drllm.tasks.examples import choose
from drllm.tasks.texts import Tokens
from drllm.tuning.calibration import choose_texts, read_calibration
from drllm.tuning.data_splits import split_tasks
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
MAX_TOKENS = 512
"""Tokens of a text of a file; longer ones are cut."""


KindLosses = dict[str, list[float]]
"""Kind of text → the next-token loss of each of its texts, in nats a token."""


class PathLosses(msgspec.Struct, frozen=True, kw_only=True):
    """A path's losses, and what it took to measure them."""

    layers: list[int]
    losses: dict[str, KindLosses]  # for plain, stand-in and refit
    seconds: dict[str, float]


def draw_paths(num_layers: int, sizes: Mapping[str, int], draw: int) -> list[StaticPath]:
    """Draw different paths that run layer 0, as many of each number of layers out as possible."""
    generator = random.Random(SEED + draw)
    nums_out = range(sizes["least"], sizes["most"] + 1)
    paths: dict[StaticPath, None] = {}  # an ordered set
    while len(paths) < sizes["paths"]:
        num_out = nums_out[len(paths) % len(nums_out)]
        skipped = generator.sample(range(1, num_layers), num_out)
        paths[StaticPath(sorted(set(range(num_layers)) - set(skipped)))] = None
    return list(paths)


def read_task_texts(
    base: BaseModel, options: argparse.Namespace, sizes: Mapping[str, int]
) -> tuple[list[Tokens], dict[str, list[Item]]]:
    """Return texts to fit on, and for each task items to measure, from questions with answers."""
    config = TuneConfig(data_dir=options.data_dir)
    tasks = split_tasks(config, options.tasks)
    sources = read_calibration(config, tasks)
    by_source = {source.name: tokenize_source(base, source) for source in sources}
    texts = choose_texts(by_source, sizes["tokens"], SEED)
    items = {}
    for number, task in enumerate(tasks):
        share = take_share(sizes["texts"], len(tasks), number)
        examples = choose(task.examples[TEST], share, SEED)
        prompts = [make_prompt(task.task, example, LOSS) for example in examples]
        items[task.task.name] = make_text_items(base, prompts)
    return texts, items


def read_file_texts(
    base: BaseModel, options: argparse.Namespace, sizes: Mapping[str, int]
) -> tuple[list[Tokens], dict[str, list[Item]]]:
    """Return texts to fit on from `--text`, and items to measure from each file of `--held-out`."""
    to_fit = read_kinds(options.text, base, MAX_TOKENS)
    to_measure = read_kinds(options.held_out, base, MAX_TOKENS)
    texts = choose_texts(to_fit, sizes["tokens"], SEED)
    refuse_fitted_texts(to_fit, to_measure)
    items = {}
    for number, (kind, of_kind) in enumerate(to_measure.items()):
        share = take_share(sizes["texts"], len(to_measure), number)
        items[kind] = [Item(Request.from_text(text)) for text in of_kind[:share]]
    return texts, items


def take_share(num_texts: int, num_kinds: int, number: int) -> int:
    """Return how many of all texts are of the kind with a number, as equal as possible."""
    return num_texts * (number + 1) // num_kinds - num_texts * number // num_kinds


def score_kinds(
    routed: RoutedModel,
    items: Mapping[str, Sequence[Item]],
    path: StaticPath,
    crossings: StandIn | None = None,
) -> KindLosses:
    """Return the loss of each text along a path."""
    losses = {}
    for kind, of_kind in items.items():
        scored = score_paths(routed, of_kind, [path], LOSS, CACHE_GB, crossings)
        [values] = scored.objective
        losses[kind] = [-value for value in values]
    return losses


def measure_path(
    routed: RoutedModel,
    stand_in: StandIn,
    texts: Sequence[Tokens],
    items: Mapping[str, Sequence[Item]],
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
        losses[name] = score_kinds(routed, items, scored_path, crossings)
        if name == BEST_WAY:
            routed.injection.adapters.drop(ADAPTER)
        seconds[name] = time.perf_counter() - started
    return PathLosses(layers=list(path.layers), losses=losses, seconds=seconds)


def mean_loss(row: PathLosses, way: str) -> float:
    """Return a path's loss, each kind of text counting the same."""
    return fmean(fmean(losses) for losses in row.losses[way].values())


def correlate(rows: Sequence[PathLosses], way: str) -> float:
    """Return Spearman's correlation of the losses of a cheap way with those of the refit."""
    cheap = [mean_loss(row, way) for row in rows]
    best = [mean_loss(row, BEST_WAY) for row in rows]
    return float(spearmanr(cheap, best).statistic)


def choice_loses(rows: Sequence[PathLosses], way: str) -> dict[str, Any]:
    """Return how much the path that a cheap way likes best loses against the best, refitted."""
    chosen = min(rows, key=lambda row: mean_loss(row, way))
    best = min(rows, key=lambda row: mean_loss(row, BEST_WAY))
    differences = {}
    for kind, best_losses in best.losses[BEST_WAY].items():
        pairs = zip(chosen.losses[BEST_WAY][kind], best_losses, strict=True)
        differences[kind] = [loss - best_loss for loss, best_loss in pairs]
    mean, interval = average_kinds(differences)
    return {"mean": mean, "interval": interval, "layers": chosen.layers}


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
                way: fmean(mean_loss(row, way) for row in group) for way in (*CHEAP_WAYS, BEST_WAY)
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


def list_requests(items: Mapping[str, Sequence[Item]]) -> list[Any]:
    """Return the kind and the tokens of each item."""
    return [(kind, item.request.continuations) for kind in items for item in items[kind]]


def measure_all(
    base: BaseModel, options: argparse.Namespace, sizes: Mapping[str, int], folder: Path
) -> dict[str, Any]:
    """Measure all paths that aren't kept in the folder, and return the figures."""
    if options.text:
        texts, items = read_file_texts(base, options, sizes)
    else:
        texts, items = read_task_texts(base, options, sizes)
    identity = {
        "model": base.identity,
        "runtime": base.runtime,
        "texts_sha256": hash_values(texts),
        "held_out_sha256": hash_values(list_requests(items)),
    }
    store = ResultStore(folder, identity, stage="benchmark")
    store.open()
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    started = time.perf_counter()
    stand_in = fit_stand_in(routed, texts)
    fit_seconds = time.perf_counter() - started
    full = StaticPath(range(base.num_layers))
    full_losses = score_kinds(routed, items, full)
    rows = []
    for path in draw_paths(base.num_layers, sizes, options.draw):
        key = " ".join(map(str, path.layers))
        make = partial(measure_path, routed, stand_in, texts, items, path)
        row = store.get_or_make(key, PathLosses, make)
        rows.append(row)
        means = ", ".join(f"{way} {mean_loss(row, way):.4f}" for way in row.losses)
        print(f"{path.edits(base.num_layers)}: {means}", flush=True)
    full_loss = fmean(map(fmean, full_losses.values()))
    figures = summarise(rows, full_loss, base.num_layers)
    figures["stand_in_fit_seconds"] = fit_seconds
    figures["calibration_tokens"] = sum(map(len, texts))
    figures["held_out_texts"] = {kind: len(of_kind) for kind, of_kind in items.items()}
    return figures


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--tasks", default="builtin_facts,builtin_arithmetic", help="comma list")
    parser.add_argument("--text", help="files of texts to fit on, one a kind, in place of tasks")
    parser.add_argument("--held-out", help="files of other texts to measure on, one a kind")
    parser.add_argument("--paths", type=int, help="how many random paths")
    parser.add_argument("--tokens", type=int, help="to fit on")
    parser.add_argument("--texts", type=int, help="held out, of all tasks together")
    parser.add_argument("--least", type=int, help="layers out")
    parser.add_argument("--most", type=int, help="layers out")
    parser.add_argument("--draw", type=int, default=0, help="which draw of paths")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/repair-ranks"))
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    options = parser.parse_args()
    if bool(options.text) != bool(options.held_out):
        parser.error("give --text and --held-out together, or neither")
    options.clock = "wall"
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    with common.measurement_folder(options) as folder:
        figures = measure_all(base, options, sizes, folder)
    print_figures(figures)
    common.write_figures(options, {**common.describe_run(base, options), **figures})


if __name__ == "__main__":
    main()
