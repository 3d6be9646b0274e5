"""What a bypass takes back of the loss of random routes, and what it costs.

Routes skip layers drawn at random, never the first one, and each is measured on a text of its own
that nothing was fitted on: with nothing in place of a skipped layer, and with bypasses of several
ranks. Another fit is measured beside them: maps fitted along random routes, so that they also
correct what earlier maps did (`--on-routes RANK`). A row has the mean increase of the next-token
loss over the full path's, the share that the bypass takes back with its 95 % interval over routes,
and on how many routes it is better. The full path is the bound: an increase of 0. Then come the
seconds to fit, and what the bypass of a layer costs as a share of the layer: counted in
multiply-adds, and measured in turns.

`--draw N` draws other routes, and takes other texts than draws of as many routes: choose with one
draw, report another. What is measured is kept in `--output-dir` by route and text, so the same
command goes on after a kill, and more routes, ranks or draws can be added.

    python benchmarks/bypass.py --text FILE,... --held-out FILE,... [--routes N] [--skips N,...]
        [--ranks N,...] [--on-routes RANK] [--draw N] [--tokens N] [--output-dir DIR]
        [--json FILE] [--quick] [--clock cpu] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import msgspec
import torch
from common.compare import SEED, divide_means
from common.route_fit import draw_route, fit_on_routes
from common.texts import Kinds, read_kinds

from drllm.evaluation.flops import count_bypass_cost
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import Bypass
from drllm.models.scoring.score import Request, score
from drllm.paths import Decisions
from drllm.prune.bypass import join_maps, solve_bypass
from drllm.records.codec import hash_values
from drllm.tasks.texts import Tokens, choose_calibration_texts
from drllm.work.store import ResultStore

QUICK = {"routes": 6, "tokens": 1500}
WHOLE = {"routes": 200, "tokens": 50_000}
SKIPS = "2,3,5"
RANKS = "16,64,100000"
"""The last one is above every hidden size: the full rank."""
MAX_TOKENS = 256  # of a text
CACHE_GB = 1.0
TIMED_TOKENS = 128
TIMED_REPEATS = 20
NOTHING = "nothing"
MIN_ROUTES = 5  # of a row


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """The next-token loss of a text along a route, in nats a token."""

    value: float


class Measurer:
    """Measures routes, each on a text of its own, and keeps what is measured.

    Args:
        base: The model.
        fit_texts: The texts that the bypasses are fitted on.
        texts: The texts to measure on; route number i is measured on text number i.
        folder: Where measurements are kept.
    """

    def __init__(
        self,
        base: BaseModel,
        fit_texts: Sequence[Tokens],
        texts: Sequence[Tokens],
        folder: Path,
    ) -> None:
        self.base = base
        self.texts = texts
        # The texts to measure on are in the key of each result, so that more can be added.
        identity = {
            "model": base.identity,
            "runtime": base.runtime,
            "texts_sha256": hash_values(fit_texts),
        }
        self.store = ResultStore(folder, identity, stage="benchmark")
        self.store.open()

    def measure(self, name: str, bypass: Bypass | None, routes: Sequence[Decisions]) -> list[float]:
        """Return the loss along each route on its text."""
        losses = []
        routed = RoutedModel(self.base.model, tokenizer=self.base.tokenizer, bypass=bypass)
        try:
            for route, text in zip(routes, self.texts, strict=True):
                key = f"{name} {hash_values([route, text])[:16]}"
                make = partial(self._score, routed, route, text)
                losses.append(self.store.get_or_make(key, Loss, make).value)
        finally:
            routed.detach()
        return losses

    def _score(self, routed: RoutedModel, route: Decisions, text: Tokens) -> Loss:
        request = Request.from_text(text)
        [[outcome]] = score(routed, [request], [route], state_cache_gb=CACHE_GB)
        return Loss(value=-outcome.logprobs[0] / len(request.continuations[0]))


def fit(base: BaseModel, texts: Sequence[Tokens], rank: int, clock: Any) -> tuple[Bypass, float]:
    """Fit a bypass; return it with the seconds that took."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        started = clock()
        maps, _ = solve_bypass(routed, texts, rank)
        seconds = clock() - started
    finally:
        routed.detach()
    return join_maps(maps, base.identity), seconds


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


def compare(plain: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Compare the increases along routes with one bypass and with nothing."""
    gains = [before - after for before, after in zip(plain, ours, strict=True)]
    # The share of all routes together, so that routes that lose nothing don't divide by 0.
    recovered, interval = divide_means(gains, plain)
    return {
        "routes": len(plain),
        "increase": statistics.fmean(ours),
        "increase_with_nothing": statistics.fmean(plain),
        "recovered": recovered,
        "interval": interval,
        "better_on": statistics.fmean(gain > 0 for gain in gains),
    }


def print_row(row: Mapping[str, Any]) -> None:
    """Print what one bypass does on routes with so many skips."""
    low, high = row["interval"]
    print(
        f"{row['skips']} layers skipped, {row['routes']} {row['which']}: "
        f"+{row['increase_with_nothing']:.3f} nats a token with nothing, +{row['increase']:.3f} "
        f"with {row['way']}; recovered {row['recovered']:.0%} ({low:.0%} to {high:.0%}), better on "
        f"{row['better_on']:.0%}",
        flush=True,
    )


def skips_neighbours(route: Decisions) -> bool:
    """Tell whether a route skips two layers in a row."""
    return any(pair == (0, 0) for pair in pairwise(route))


def make_rows(
    increases: Mapping[str, Sequence[float]], routes: Sequence[Decisions], num_skips: int
) -> list[dict[str, Any]]:
    """Compare each bypass with nothing, on all routes and on those that skip layers in a row."""
    rows = []
    runs = [place for place, route in enumerate(routes) if skips_neighbours(route)]
    groups = {"routes": list(range(len(routes))), "routes that skip layers in a row": runs}
    for which, places in groups.items():
        if len(places) < MIN_ROUTES:
            continue
        plain = [increases[NOTHING][place] for place in places]
        for way in increases:
            if way != NOTHING:
                ours = [increases[way][place] for place in places]
                rows.append(
                    {"skips": num_skips, "which": which, "way": way, **compare(plain, ours)}
                )
    return rows


def fit_all(
    base: BaseModel, texts: Sequence[Tokens], options: argparse.Namespace, figures: dict[str, Any]
) -> dict[str, Bypass]:
    """Fit all bypasses, print what each costs, and return them by name."""
    clock = common.clock_of(options)
    ways: dict[str, Bypass] = {}
    for rank in map(int, options.ranks.split(",")):
        bypass, seconds = fit(base, texts, rank, clock)
        name = f"rank {bypass.rank}"
        ways[name] = bypass
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
    if options.on_routes is not None:
        started = clock()
        start, _ = fit(base, texts, options.on_routes, clock)
        bypass = fit_on_routes(base, texts, start, options.on_routes, SEED)
        seconds = clock() - started
        name = f"rank {bypass.rank} fitted on routes"
        ways[name] = bypass
        figures["fits"][name] = {"seconds": seconds}
        print(f"{name}: fitted in {seconds:.0f} s", flush=True)
    return ways


def choose_texts(held_out: Kinds, num_routes: int, draw: int) -> list[Tokens]:
    """Choose a text for each route, from each kind in turn.

    Another draw of as many routes has other texts. With more routes, those of draw 0 keep theirs.
    """
    num_per_kind = -(-num_routes // len(held_out))  # rounded up
    end = (draw + 1) * num_per_kind
    for name, kind in held_out.items():
        if len(kind) < end:
            raise SystemExit(
                f"--draw {draw} of {num_routes} routes needs {end} texts of each kind, and "
                f"{name} has {len(kind)}; give fewer --routes, or more texts to --held-out"
            )
    texts = []
    for place in range(draw * num_per_kind, end):
        texts += [kind[place] for kind in held_out.values()]
    return texts[:num_routes]


def measure_all(
    base: BaseModel, options: argparse.Namespace, sizes: Mapping[str, int], folder: Path
) -> dict[str, Any]:
    """Measure what isn't kept in the folder, print each row, and return the figures."""
    to_fit = read_kinds(options.text, base, MAX_TOKENS)
    held_out = read_kinds(options.held_out, base, MAX_TOKENS)
    chosen = choose_calibration_texts(to_fit, sizes["tokens"], SEED)
    fit_texts = [text for texts in chosen.values() for text in texts]
    measured = choose_texts(held_out, sizes["routes"], options.draw)
    if set(fit_texts) & set(measured):
        raise SystemExit("a text is in --text and in --held-out")
    measurer = Measurer(base, fit_texts, measured, folder)
    full = measurer.measure("full", None, [(1,) * base.num_layers] * len(measured))
    mean = statistics.fmean(full)
    print(f"full path: {mean:.3f} nats a token on {len(measured)} texts", flush=True)
    figures: dict[str, Any] = {"full": mean, "rows": [], "fits": {}}
    ways: dict[str, Bypass | None] = {NOTHING: None}
    ways.update(fit_all(base, fit_texts, options, figures))
    for num_skips in map(int, options.skips.split(",")):
        draw = random.Random(f"{num_skips} {options.draw}")
        routes = [draw_route(draw, base.num_layers, num_skips) for _ in measured]
        increases = {}
        for name, bypass in ways.items():
            losses = measurer.measure(name, bypass, routes)
            increases[name] = [loss - own for loss, own in zip(losses, full, strict=True)]
        for row in make_rows(increases, routes, num_skips):
            print_row(row)
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
    parser.add_argument("--on-routes", type=int, help="also a bypass of this rank fitted on routes")
    parser.add_argument("--draw", type=int, default=0, help="which draw of routes and texts")
    parser.add_argument("--tokens", type=int, help="tokens to fit on")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bypass"))
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    with common.measurement_folder(options) as folder:
        figures = measure_all(base, options, sizes, folder)
    common.write_figures(options, {**common.describe_run(base, options), **figures, **sizes})


if __name__ == "__main__":
    main()
