"""What a bypass takes back of the loss of random routes, and what it costs.

Routes skip layers drawn at random, always the same for all ways. Each route is measured on texts
that nothing was fitted on: with nothing in place of a skipped layer, and with bypasses of several
ranks. A row has the mean increase of the next-token loss over the full path's, the share that the
bypass takes back with its 95 % interval over routes, and on how many routes it is better. The full
path is the bound: an increase of 0. Then come the seconds to fit, and what the bypass of a layer
costs as a share of the layer: counted in multiply-adds, and measured in turns.

What is measured is kept in `--output-dir`, so the same command goes on after a kill, and more
routes or ranks can be added.

    python benchmarks/bypass.py --text FILE,... --held-out FILE,... [--routes N] [--skips N,...]
        [--ranks N,...] [--tokens N] [--num-texts N] [--output-dir DIR] [--json FILE] [--quick]
        [--clock cpu] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import msgspec
import torch
from common.compare import SEED
from common.texts import read_kinds

from drllm.evaluation.flops import count_bypass_cost
from drllm.models.base.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import Bypass
from drllm.models.scoring.score import Request
from drllm.paths import Decisions, StaticPath, to_path
from drllm.records.codec import hash_values
from drllm.statistics.intervals import mean_interval
from drllm.tuning.bypass_solver import BypassSolver, join_solutions
from drllm.tuning.heal_texts import Tokens, choose_calibration_texts
from drllm.tuning.objectives import LOSS
from drllm.tuning.path_scorer import Item, score_paths
from drllm.work.store import ResultStore

QUICK = {"routes": 4, "num_texts": 2, "tokens": 1500}
WHOLE = {"routes": 200, "num_texts": 5, "tokens": 50_000}
SKIPS = "2,3,5"
RANKS = "16,64,100000"
"""The last one is above every hidden size: the full rank."""
MAX_TOKENS = 256  # of a text
CACHE_GB = 1.0
TIMED_TOKENS = 128
TIMED_REPEATS = 20
NOTHING = "nothing"


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """The mean next-token loss of the texts along each of some routes, in nats a token."""

    values: list[float]


def draw_routes(num_layers: int, num_skips: int, number: int) -> list[Decisions]:
    """Draw routes that skip some layers, never the first one."""
    draw = random.Random(num_skips)
    routes = []
    for _ in range(number):
        skipped = set(draw.sample(range(1, num_layers), num_skips))
        routes.append(tuple(0 if layer in skipped else 1 for layer in range(num_layers)))
    return routes


class Measurer:
    """Measures routes on the same texts, and keeps what is measured.

    Args:
        base: The model.
        texts: The texts.
        folder: Where measurements are kept.
        identity: What else they depend on.
    """

    def __init__(
        self, base: BaseModel, texts: Sequence[Tokens], folder: Path, identity: Mapping[str, Any]
    ) -> None:
        self.base = base
        self.items = [Item(Request.from_text(text)) for text in texts]
        self.num_tokens = [len(text) - 1 for text in texts]
        self.store = ResultStore(folder, identity, stage="benchmark")
        self.store.open()

    def measure(self, name: str, bypass: Bypass | None, routes: Sequence[Decisions]) -> list[float]:
        """Return the mean loss along each route."""
        key = f"{name} {hash_values(routes)[:16]}"
        make = partial(self._score, bypass, routes)
        return self.store.get_or_make(key, Losses, make).values

    def _score(self, bypass: Bypass | None, routes: Sequence[Decisions]) -> Losses:
        routed = RoutedModel(self.base.model, tokenizer=self.base.tokenizer, bypass=bypass)
        try:
            paths = [StaticPath(to_path(route)) for route in routes]
            scores = score_paths(routed, self.items, paths, LOSS, CACHE_GB).objective
        finally:
            routed.detach()
        total = sum(self.num_tokens)
        means = []
        for row in scores:
            losses = [-value * num for value, num in zip(row, self.num_tokens, strict=True)]
            means.append(sum(losses) / total)
        return Losses(values=means)


def fit(base: BaseModel, texts: Sequence[Tokens], rank: int, clock: Any) -> tuple[Bypass, float]:
    """Fit a bypass; return it with the seconds that took."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        started = clock()
        solver = BypassSolver(routed, texts, rank)
        solutions = [solution for group in solver.groups for solution in solver.solve(group)]
        seconds = clock() - started
    finally:
        routed.detach()
    return join_solutions(solutions, base.identity), seconds


def time_share(base: BaseModel, bypass: Bypass, clock: Any) -> float:
    """Return the time of a layer's bypass as a share of the layer's own, the median of several.

    The layers' own time is that of a pass over all layers, divided by their number.
    """
    ids = torch.randint(100, (1, TIMED_TOKENS), device=base.model.device)
    width = bypass.hidden_size
    states = torch.randn(1, TIMED_TOKENS, width).to(base.model.device, base.model.dtype)
    decoder = base.model.get_decoder()

    def run_layers() -> float:
        started = clock()
        decoder(ids, use_cache=False)
        return clock() - started

    def run_bypass() -> float:
        started = clock()
        for layer in range(bypass.num_layers):
            bypass.skip(layer, states)
        return clock() - started

    with torch.no_grad():
        runs = common.run_in_turns({"layers": run_layers, "bypass": run_bypass}, TIMED_REPEATS)
    return statistics.median(run["bypass"] / run["layers"] for run in runs)


def compare(increases: Mapping[str, Sequence[float]], name: str, num_skips: int) -> dict[str, Any]:
    """Compare one bypass with nothing, on the same routes."""
    plain = increases[NOTHING]
    ours = increases[name]
    mean = statistics.fmean(plain)
    # The share of the mean, so that routes that lose nothing don't divide by 0.
    gains = [(before - after) / mean for before, after in zip(plain, ours, strict=True)]
    low, high = mean_interval(gains, SEED)
    return {
        "skips": num_skips,
        "way": name,
        "increase": statistics.fmean(ours),
        "increase_with_nothing": mean,
        "recovered": statistics.fmean(gains),
        "interval": [low, high],
        "better_on": statistics.fmean(gain > 0 for gain in gains),
    }


def print_row(row: Mapping[str, Any], routes: int) -> None:
    """Print what one bypass does on routes with so many skips."""
    low, high = row["interval"]
    print(
        f"{row['skips']} layers skipped, {routes} routes: +{row['increase_with_nothing']:.3f} nats "
        f"a token with nothing, +{row['increase']:.3f} with {row['way']}; recovered "
        f"{row['recovered']:.0%} ({low:.0%} to {high:.0%}), better on {row['better_on']:.0%} of "
        f"the routes",
        flush=True,
    )


def measure_all(
    base: BaseModel, options: argparse.Namespace, sizes: Mapping[str, int], folder: Path
) -> dict[str, Any]:
    """Measure what isn't kept in the folder, print each row, and return the figures."""
    clock = common.clock_of(options)
    to_fit = read_kinds(options.text, base, MAX_TOKENS)
    held_out = read_kinds(options.held_out, base, MAX_TOKENS)
    chosen = choose_calibration_texts(to_fit, sizes["tokens"], SEED)
    fit_texts = [text for texts in chosen.values() for text in texts]
    measured = [text for texts in held_out.values() for text in texts[: sizes["num_texts"]]]
    if set(fit_texts) & set(measured):
        raise SystemExit("a text is in --text and in --held-out")
    identity = {
        "model": base.identity,
        "runtime": base.runtime,
        "texts_sha256": hash_values([*fit_texts, *measured]),
    }
    measurer = Measurer(base, measured, folder, identity)
    [full] = measurer.measure("full", None, [(1,) * base.num_layers])
    print(f"full path: {full:.3f} nats a token on {len(measured)} texts")
    figures: dict[str, Any] = {"full": full, "rows": [], "fits": {}}
    bypasses: dict[str, Bypass] = {}
    for rank in map(int, options.ranks.split(",")):
        bypass, seconds = fit(base, fit_texts, rank, clock)
        name = f"rank {bypass.rank}"
        bypasses[name] = bypass
        routed = RoutedModel(base.model, tokenizer=base.tokenizer, bypass=bypass)
        counted = count_bypass_cost(routed)
        routed.detach()
        timed = time_share(base, bypass, clock)
        figures["fits"][name] = {"seconds": seconds, "counted": counted, "measured": timed}
        print(
            f"{name}: fitted in {seconds:.0f} s; {counted:.1%} of a layer's multiply-adds, "
            f"{timed:.1%} of its time",
            flush=True,
        )
    for num_skips in map(int, options.skips.split(",")):
        routes = draw_routes(base.num_layers, num_skips, sizes["routes"])
        increases = {}
        for name, bypass in {NOTHING: None, **bypasses}.items():
            losses = measurer.measure(name, bypass, routes)
            increases[name] = [loss - full for loss in losses]
        for name in bypasses:
            row = compare(increases, name, num_skips)
            print_row(row, len(routes))
            figures["rows"].append(row)
    return figures


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "", "few routes, texts and tokens, under a minute")
    common.add_clock(parser)
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--text", required=True, help="files of texts to fit on, one a kind")
    parser.add_argument("--held-out", required=True, help="files of other texts to measure on")
    parser.add_argument("--routes", type=int, help="routes of each number of skips")
    parser.add_argument("--skips", default=SKIPS, help="numbers of layers to skip")
    parser.add_argument("--ranks", default=RANKS, help="ranks of the bypasses")
    parser.add_argument("--tokens", type=int, help="tokens to fit on")
    parser.add_argument("--num-texts", type=int, help="texts of a kind to measure on")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bypass"))
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    if options.quick:  # a quick run measures anew, whatever was measured before
        with tempfile.TemporaryDirectory() as folder:
            figures = measure_all(base, options, sizes, Path(folder))
    else:
        figures = measure_all(base, options, sizes, options.output_dir)
    common.write_figures(options, {**common.describe_run(base, options), **figures, **sizes})


if __name__ == "__main__":
    main()
