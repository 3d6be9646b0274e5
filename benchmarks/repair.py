"""How much of the loss of left-out layers a repair takes back, on kinds of text.

Each path is measured on texts that nothing was fitted on: plain, with refits on more and more
calibration tokens, and as healed folders run it. Texts come from files, one kind of text a file.
Calibration tokens are drawn evenly from the kinds of `--text`; the kinds of `--unseen` are only
measured. The texts to measure on are held out of `--text`, or come from files of their own
(`--held-out`), so that `drllm heal` can train on all of `--text`. A table has the increase of the
mean next-token loss over the full path's by kind, and its mean over the kinds with the 95 %
interval over the texts of each. The full path is the bound: an increase of 0. `--png` draws the
means by the number of layers left out.

What is measured is kept in `--output-dir`, so the same command goes on after a kill, and more paths
or numbers of tokens can be added.

    python benchmarks/repair.py --text FILE,... [--held-out FILE,...] [--unseen FILE,...]
        [--without LAYERS/LAYERS...] [--tokens N,...] [--first-token-weight W]
        [--healed FOLDER,...] [--num-texts N] [--output-dir DIR] [--json FILE] [--quick]
        [--png FILE] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import msgspec
from common.compare import SEED, average_kinds
from common.texts import Kinds, read_kinds, refuse_fitted_texts
from torch import Tensor

from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import install_path
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.static_paths import load_path
from drllm.reporting import drawing
from drllm.tasks.texts import choose_calibration_texts
from drllm.tuning.objectives import LOSS
from drllm.tuning.path_scorer import Item, score_paths
from drllm.tuning.refit import join_weights, refit
from drllm.work.store import ResultStore

QUICK = {"num_texts": 4}
WHOLE = {"num_texts": 100}
QUICK_TOKENS = "1000"
WHOLE_TOKENS = "50000"
WITHOUT = "12,13,14,15,17"
"""The layers that are left out by default: five of SmolLM2's 30, chosen under repair."""
MAX_TOKENS = 512
"""Tokens of a text; longer ones are cut."""
CACHE_GB = 1.0
ADAPTER = "measured"
PLAIN, REFIT, HEALED = "plain", "refit", "healed"
LINES = {
    PLAIN: ("left out", "faint"),
    REFIT: ("repaired in closed form", "s1"),
    HEALED: ("repaired, then trained", "s2"),
}
"""Way → the label and the colour of its line in the drawing."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The next-token loss of each text of each kind, in nats a token, along one path."""

    losses: dict[str, list[float]]
    num_tokens: int = 0  # calibration tokens
    seconds: float = 0.0  # to solve the refit
    ridges: list[float] = []
    unexplained: list[float] = []


def hold_out(kinds: Kinds, num_texts: int) -> tuple[Kinds, Kinds]:
    """Return the texts to fit on and those to measure on, at most half of a kind."""
    to_fit = {}
    to_measure = {}
    for name, texts in kinds.items():
        num_held_out = min(num_texts, len(texts) // 2)
        to_measure[name] = texts[:num_held_out]
        to_fit[name] = texts[num_held_out:]
    return to_fit, to_measure


def read_seen_kinds(
    options: argparse.Namespace, base: BaseModel, num_texts: int
) -> tuple[Kinds, Kinds]:
    """Return the texts to fit on, and other texts of the same kinds to measure on."""
    kinds = read_kinds(options.text, base, MAX_TOKENS)
    if options.held_out is None:
        return hold_out(kinds, num_texts)
    to_measure = read_kinds(options.held_out, base, MAX_TOKENS)
    if list(to_measure) != list(kinds):
        raise SystemExit(
            f"--held-out has the kinds {', '.join(to_measure)}, and --text {', '.join(kinds)}; "
            f"give a file of the same name for each kind, in the same order"
        )
    for name, texts in to_measure.items():
        to_measure[name] = texts[:num_texts]
    refuse_fitted_texts(kinds, to_measure)
    return kinds, to_measure


class Measurer:
    """Measures paths on the same texts, and keeps what is measured.

    Args:
        base: The model.
        to_fit: The texts that refits are solved on, by kind.
        to_measure: The texts that losses are measured on, by kind.
        folder: Where measurements are kept.
    """

    def __init__(self, base: BaseModel, to_fit: Kinds, to_measure: Kinds, folder: Path) -> None:
        self.routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        self.to_fit = to_fit
        self.to_measure = to_measure
        identity = {
            "model": base.identity,
            "runtime": base.runtime,
            "texts_sha256": hash_values([*to_fit.items(), *to_measure.items()]),
        }
        self.store = ResultStore(folder, identity, stage="benchmark")
        self.store.open()

    def measure(self, path: StaticPath, name: str = "") -> Measurement:
        """Measure a path as it is; `name` stands for its adapter in the kept file's name."""
        key = f"{_spell(path)} {name}"
        return self.store.get_or_make(key, Measurement, partial(self._score, path))

    def measure_refit(
        self, path: StaticPath, num_tokens: int, first_token_weight: float | None
    ) -> Measurement:
        """Measure a path with a refit on so many tokens."""
        key = f"{_spell(path)} refit {num_tokens} {first_token_weight}"
        make = partial(self._score_refit, path, num_tokens, first_token_weight)
        return self.store.get_or_make(key, Measurement, make)

    def _score(self, path: StaticPath) -> Measurement:
        losses = {}
        for kind, texts in self.to_measure.items():
            items = [Item(Request.from_text(text)) for text in texts]
            [values] = score_paths(self.routed, items, [path], LOSS, CACHE_GB).objective
            losses[kind] = [-value for value in values]
        return Measurement(losses=losses)

    def _score_refit(
        self, path: StaticPath, num_tokens: int, first_token_weight: float | None
    ) -> Measurement:
        by_kind = choose_calibration_texts(self.to_fit, num_tokens, SEED)
        texts = [text for texts in by_kind.values() for text in texts]
        started = time.perf_counter()
        gaps = refit(self.routed, path, texts, first_token_weight=first_token_weight)
        seconds = time.perf_counter() - started
        with self._adapter(join_weights(gaps)):
            scored = self._score(path.with_adapter(ADAPTER))
        return Measurement(
            losses=scored.losses,
            num_tokens=sum(map(len, texts)),
            seconds=seconds,
            ridges=[gap.ridge for gap in gaps],
            unexplained=[gap.unexplained for gap in gaps],
        )

    @contextmanager
    def _adapter(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold a refit in the model inside the block."""
        self.routed.injection.add_adapter(ADAPTER, refit=weights)
        try:
            yield
        finally:
            self.routed.injection.adapters.drop(ADAPTER)


def _spell(path: StaticPath) -> str:
    return " ".join(map(str, path.layers))


def summarise(full: Measurement, measured: Measurement, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the increase of the loss over the full path's: by kind, and the mean over kinds.

    The interval is of the mean over kinds; each text is paired with itself along the full path.
    """
    increases = {}
    for kind in kinds:
        pairs = zip(measured.losses[kind], full.losses[kind], strict=True)
        increases[kind] = [loss - full_loss for loss, full_loss in pairs]
    mean, interval = average_kinds(increases)
    by_kind = {kind: fmean(values) for kind, values in increases.items()}
    return {"by_kind": by_kind, "mean": mean, "interval": interval}


def print_row(label: str, seen: Mapping[str, Any], unseen: Mapping[str, Any]) -> None:
    """Print one row: the increase over the full path."""
    low, high = seen["interval"]
    kinds = ", ".join(f"{kind} {value:+.3f}" for kind, value in seen["by_kind"].items())
    line = f"{label}: {seen['mean']:+.4f} ({low:+.4f} to {high:+.4f}); {kinds}"
    if unseen:
        low, high = unseen["interval"]
        kinds = ", ".join(f"{kind} {value:+.3f}" for kind, value in unseen["by_kind"].items())
        line += f"; never fitted on {unseen['mean']:+.4f} ({low:+.4f} to {high:+.4f}): {kinds}"
    print(line, flush=True)


def measure_all(
    base: BaseModel, options: argparse.Namespace, num_texts: int, folder: Path
) -> dict[str, Any]:
    """Measure what isn't kept in the folder, print each row, and return the figures."""
    to_fit, seen = read_seen_kinds(options, base, num_texts)
    unseen = {}
    for name, texts in read_kinds(options.unseen, base, MAX_TOKENS).items():
        unseen[name] = texts[:num_texts]
    measurer = Measurer(base, to_fit, seen | unseen, folder)
    full = measurer.measure(StaticPath(range(base.num_layers)))
    means = {kind: fmean(losses) for kind, losses in full.losses.items()}
    print("full path:", ", ".join(f"{kind} {loss:.3f}" for kind, loss in means.items()))
    rows: list[dict[str, Any]] = []

    def add(label: str, way: str, path: StaticPath, measured: Measurement) -> None:
        row = {"row": label, "way": way, "layers_out": base.num_layers - len(path.layers)}
        row |= {"seen": summarise(full, measured, list(seen)), "unseen": {}}
        if unseen:
            row["unseen"] = summarise(full, measured, list(unseen))
        print_row(label, row["seen"], row["unseen"])
        found = msgspec.to_builtins(measured)
        del found["losses"]
        rows.append(row | found)

    for without in options.without.split("/"):
        left_out = set(map(int, without.split(",")))
        path = StaticPath(layer for layer in range(base.num_layers) if layer not in left_out)
        add(f"without {without}", PLAIN, path, measurer.measure(path))
        for num_tokens in map(int, filter(None, options.tokens.split(","))):
            measured = measurer.measure_refit(path, num_tokens, options.first_token_weight)
            label = f"without {without}, refit on {measured.num_tokens} tokens"
            add(f"{label} in {measured.seconds:.0f} s", REFIT, path, measured)
    for name in filter(None, (options.healed or "").split(",")):
        healed = install_path(measurer.routed.injection, load_path(name))
        add(name, HEALED, healed, measurer.measure(healed, healed.adapter))
    return {"full": means, "rows": rows, "texts_of_a_kind": num_texts}


def draw_increases(
    rows: Sequence[Mapping[str, Any]], num_layers: int, colours: drawing.Colours, width: float
) -> Any:
    """Draw the increase of the loss by the number of layers left out, a line for each way.

    Each line begins at the full path, whose increase is 0. Of several refits or healed folders with
    as many layers out, the one that loses least is drawn.
    """
    figure, (axes,) = drawing.make_panels(1, 1, width, 2.6)
    for way, (label, colour) in LINES.items():
        best: dict[int, Mapping[str, Any]] = {}
        for row in rows:
            if row["way"] != way:
                continue
            num_out = row["layers_out"]
            if num_out not in best or row["seen"]["mean"] < best[num_out]["mean"]:
                best[num_out] = row["seen"]
        if not best:
            continue
        counts = sorted(best)
        means = [best[count]["mean"] for count in counts]
        lows = [best[count]["interval"][0] for count in counts]
        highs = [best[count]["interval"][1] for count in counts]
        axes.plot(
            [0, *counts], [0.0, *means], "o-", color=colours[colour], label=label, markersize=4
        )
        axes.vlines(counts, lows, highs, color=colours[colour], linewidth=1.2)
    axes.axhline(0, color=colours["ink"], linewidth=1, linestyle=":", label="all layers")
    axes.set(xlabel=f"layers left out, of {num_layers}", ylabel="loss of text, nats a token more")
    drawing.use_whole_numbers(axes)
    drawing.add_legend(axes, columns=2)
    return figure


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "", "few texts and tokens, under a minute")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--text", required=True, help="files of texts to fit on, one a kind")
    parser.add_argument("--held-out", help="files of other texts of the same kinds to measure on")
    parser.add_argument("--unseen", help="files of texts that are only measured")
    parser.add_argument("--without", default=WITHOUT, help="layers to leave out; / between paths")
    parser.add_argument("--tokens", help="calibration tokens of each refit; empty: no refit")
    parser.add_argument("--first-token-weight", type=float, help="0 or 1 in place of the design's")
    parser.add_argument("--healed", help="folders of drllm heal to measure too")
    parser.add_argument("--num-texts", type=int, help="texts of a kind to measure on")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/repair"))
    parser.add_argument("--png", type=Path, help="also draw the increases to this file")
    options = parser.parse_args()
    options.clock = "wall"
    if options.tokens is None:
        options.tokens = QUICK_TOKENS if options.quick else WHOLE_TOKENS
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    with common.measurement_folder(options) as folder:
        figures = measure_all(base, options, sizes["num_texts"], folder)
    if options.png:
        draw = partial(draw_increases, figures["rows"], base.num_layers)
        options.png.write_bytes(drawing.draw_png(draw, drawing.WIDE))
    common.write_figures(options, {**common.describe_run(base, options), **figures})


if __name__ == "__main__":
    main()
