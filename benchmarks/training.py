"""How much faster routers are trained on stored features than with the base model in the loop.

Ours: `collect_features` and `train_seed`, what `drllm train` does: one pass of the base model in
batches, its features kept on disk, then all layers' routers on them; checkpoints and metrics are
written.
Theirs: in each of 25 epochs the base model runs along every example's target path, one example at
a time; before each layer its router reads the states, and gradients add up over a step's examples.
The parity tests hold ours to this same loop (`Literal`) in double precision. It knows models that
are laid out like Llama's.

Both train on the same examples from the same weights in the same order, one run, and the losses of
every epoch are compared with each other, and with what rounding alone does to them. Target paths
are drawn, in the shares of the paper's labels: what a path teaches changes no time. `--scale` then
fits many targets, made by repeating the features of these, each size in a process of its own, and
reads the clock and the memory.

    python benchmarks/training.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--model MODEL] [--questions N] [--scale [--targets N]]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from common.comparison import Comparison
from common.literal_training import Literal, Walk, read_along

from drllm.config import TrainConfig
from drllm.config.files import PRESETS, normalise_settings, read_yaml
from drllm.model.load import BaseModel
from drllm.models.workers import open_workers
from drllm.records.manifest import new_manifest
from drllm.records.supervision import SupervisionRecord
from drllm.tasks.examples import OPTIONS_REWARD, choose
from drllm.tasks.registry import get_task
from drllm.training.feature_store import FeatureBlock, FeatureStore, Shape, name_block
from drllm.training.features import Features, collect_features
from drllm.training.stage import train_seed
from drllm.training.trainer import Trainer
from drllm.work.listener import Listener, OnProgress

QUICK = {"questions": 10, "targets": 48}
WHOLE = {"questions": 160, "targets": 4000}

SHARES = torch.tensor([4399.0, 120956.0, 1457.0]) / 126812
"""Of skip, execute and repeat among the paper's labels (arXiv 2510.12773)."""

EQUAL_LOSSES = 1e-4
"""Relative, of an epoch's loss: in float64, and in float32 where rounding alone moves it less."""
TIMES_ROUNDING = 10
"""How many times as far as rounding alone an epoch's loss may lie from ours. Training carries a
difference of a last bit on and multiplies it, so what rounding does is measured: ours again,
rounded in other places (`rounded_otherwise`)."""
PAPER = read_yaml(PRESETS["paper"], "settings")["train"]
CONFIG = TrainConfig(**normalise_settings(TrainConfig, PAPER))
"""Of both ways: the paper's, and every example is learned from."""
OTHER_BATCHES = (1, 2, 16)
"""Prompts of a pass, where what rounding does is measured."""

OURS = "one pass in batches, features on disk, then all routers (collect_features, train_seed)"
THEIRS = "the base model in the loop: every epoch, one example at a time"
WRITTEN_AT_ONCE = 32
GIB = 2**30


# --- against ours ------------------------------------------------------------------------------


def draw_targets(base: BaseModel, num: int, data_dir: Path | None) -> list[SupervisionRecord]:
    """Return targets on the prompts of real questions, their decisions drawn."""
    task = get_task("arc_easy" if data_dir else "builtin_facts")
    draws = torch.Generator().manual_seed(0)
    records = []
    for example in choose(task.examples("search", data_dir), num, seed=0):
        prompt = task.prompt(example, OPTIONS_REWARD)
        decisions = SHARES.multinomial(base.num_layers, replacement=True, generator=draws)
        records.append(
            SupervisionRecord(
                question=example.question,
                optimal_layer_config=tuple(decisions.tolist()),
                answer="",
                prompt=prompt.text,
                id=example.id,
                task=task.name,
                executions=float(decisions.sum()),
                improving=False,
            )
        )
    return records


def relative(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return how far values are from those of a reference, as shares of these."""
    return [abs(value / other - 1) for value, other in zip(values, reference, strict=True)]


def collect(
    base: BaseModel,
    records: Sequence[SupervisionRecord],
    folder: Path,
    batch_size: int | None = None,
) -> Features:
    """Run the feature pass, into a folder."""
    with open_workers(base, None, CONFIG, Listener()) as workers:
        return collect_features(
            workers,
            records,
            num_windows=CONFIG.num_windows,
            store=FeatureStore(folder),
            batch_size=batch_size,
        )


def literal_losses(
    base: BaseModel, records: Sequence[SupervisionRecord], features: Features
) -> list[float]:
    """Return the losses of the epochs of the literal way, begun with the weights that ours has."""
    stack = Trainer(features, base.identity, CONFIG).stack
    everything = range(len(records))
    literal = Literal(base.model, base.tokenizer, stack, records, CONFIG, everything, [])
    return [trained for trained, _ in literal.train()]


def rounded_otherwise(
    base: BaseModel,
    records: Sequence[SupervisionRecord],
    features: Features,
    folder: Path,
) -> dict[str, list[float]]:
    """Fit again where only the rounding is another, and return the losses of the epochs.

    Other batches in the pass round the features otherwise, float64 each step of the fit.
    """
    losses = {}
    for size in OTHER_BATCHES:
        others = collect(base, records, folder / f"by{size}", size)
        losses[f"{size} prompts a pass"] = fitted_losses(base, others, torch.float32)
    losses["float64"] = fitted_losses(base, features, torch.float64)
    return losses


def fitted_losses(base: BaseModel, features: Features, dtype: torch.dtype) -> list[float]:
    """Return the losses of the epochs of our fit, in a dtype."""
    trainer = Trainer(features, base.identity, CONFIG, dtype=dtype)
    while not trainer.is_over:
        trainer.train_epoch()
    return [row["routers_loss"] for row in trainer.metrics]


def compare_in_double(base: BaseModel, records: Sequence[SupervisionRecord]) -> list[float]:
    """Return how far the losses of both ways are from one another in float64.

    Converts the base model, for good.
    """
    model = base.model.double()
    features = read_along(model, base.tokenizer, records, CONFIG.num_windows)
    ours = fitted_losses(base, features, torch.float64)
    return relative(literal_losses(base, records, features), ours)


def furthest_so_far(samples: Sequence[Sequence[float]]) -> list[float]:
    """Return for each epoch the largest difference of any sample up to there.

    Not of that epoch alone: two losses that drift apart also cross, and are equal there by chance.
    """
    return list(itertools.accumulate(map(max, zip(*samples, strict=True)), max))


def are_equal(found: Sequence[float], by_rounding: Sequence[float]) -> bool:
    """Tell whether no epoch's difference is more than rounding explains; NaN is more."""
    return all(
        difference <= max(EQUAL_LOSSES, TIMES_ROUNDING * noise)
        for difference, noise in zip(found, by_rounding, strict=True)
    )


def walk_along(base: BaseModel, records: Sequence[SupervisionRecord], clock: common.Clock) -> float:
    """Run the base model along the target paths, one example at a time; return the seconds."""
    started = clock()
    for record in records:
        walk = Walk(base.model, base.tokenizer, record.prompt)
        for layer, label in enumerate(record.optimal_layer_config):
            walk.run(layer, label)
    return clock() - started


def compare(
    base: BaseModel, records: Sequence[SupervisionRecord], folder: Path, clock: common.Clock
) -> tuple[dict[str, Any], Features]:
    """Train both ways, and return the times and how far the losses are from one another."""
    walk_along(base, records[:2], clock)  # what is made at the first use belongs to nobody
    collect(base, records[:2], folder / "warm")

    started = clock()
    features = collect(base, records, folder / "features")
    pass_s = clock() - started
    rows = train_seed(features, base.identity, CONFIG, folder / "routers")
    ours_s = clock() - started

    started = clock()
    losses = literal_losses(base, records, features)
    theirs_s = clock() - started

    alone_s = walk_along(base, records, clock)
    our_losses = [row["routers_loss"] for row in rows]
    from_theirs = relative(losses, our_losses)
    samples = {}
    for name, others in rounded_otherwise(base, records, features, folder).items():
        samples[name] = relative(others, our_losses)
    by_rounding = furthest_so_far(list(samples.values()))
    return {
        "questions": len(records),
        "epochs": CONFIG.num_epochs,
        "speedup": theirs_s / ours_s,
        "theirs_s": theirs_s,
        "ours_s": ours_s,
        "pass_s": pass_s,
        "fit_s": ours_s - pass_s,
        "bound": theirs_s / pass_s,
        "batch_1_loses": alone_s / pass_s,
        "routers_in_the_loop": theirs_s / (CONFIG.num_epochs * alone_s),
        "relative_differences": from_theirs,
        "rounded_otherwise": samples,
        "by_rounding_alone": by_rounding,
        "losses_are_equal": are_equal(from_theirs, by_rounding),
        "last_loss": losses[-1],
    }, features


def differ(found: Sequence[float]) -> str:
    """Write the first epoch's difference, and the largest of the early and of all epochs."""
    early = max(1, len(found) // 5)
    return (
        f"{found[0]:.1e} in the first, at most {max(found[:early]):.1e} in the first {early}, "
        f"{max(found):.1e} in all"
    )


def report(result: Mapping[str, Any]) -> None:
    """Print what came out."""
    print(
        f"speedup {result['speedup']:.1f} (one run): {result['theirs_s']:.1f} s with the base "
        f"model in the loop, {result['ours_s']:.1f} s ours ({result['pass_s']:.1f} s the pass, "
        f"{result['fit_s']:.1f} s the fit); {result['questions']} questions, "
        f"{result['epochs']} epochs\n"
        f"  losses of the epochs differ, relatively, by {differ(result['relative_differences'])}; "
        f"by rounding alone {differ(result['by_rounding_alone'])}\n"
        f"  were the fit for nothing, {result['bound']:.1f}: {result['epochs']} epochs, times "
        f"{result['batch_1_loses']:.2f} for the base model one example at a time instead of the "
        f"pass, times {result['routers_in_the_loop']:.2f} for routers and gradients in the loop; "
        f"reached {result['speedup'] / result['bound']:.0%} of it"
    )


# --- how a fit grows ---------------------------------------------------------------------------


def sizes_of(whole: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Return the sizes N, L, D that are fitted: the whole one, then parts of one of its sides."""
    N, L, D = whole
    halves = [(N // 2, L, D), (N, L // 2, D), (N, L, D // 2)]
    return [(N, L, D), *halves, (N // 4, L, D)]


def write_repeated(
    features: Features, size: tuple[int, int, int], folder: Path, base: BaseModel
) -> None:
    """Write features of a size: the first layers and components of real ones, over and over."""
    N, L, D = size
    n, _, W, _ = features.shape
    real = features.rows(range(n))[:, :L, :, :D]
    rows = [row % n for row in range(N)]
    identity = {**base.identity, "num_layers": L, "hidden_size": D}
    manifest = new_manifest("features", model=identity, config={"num_windows": W})
    store = FeatureStore(folder)
    store.open(manifest, Shape(N, L, W, D))
    with store.writing(Listener().note):
        for start in range(0, N, WRITTEN_AT_ONCE):
            part = rows[start : start + WRITTEN_AT_ONCE]
            places = list(range(start, start + len(part)))
            block = FeatureBlock(
                targets=torch.tensor(places), filled=features.filled[part], means=real[part]
            )
            store.put(name_block(places), block)
    examples = {
        "identity": identity,
        "shape": (N, L, W, D),
        "labels": features.labels[rows][:, :L].tolist(),
        "questions": [f"{features.questions[row]} ({place})" for place, row in enumerate(rows)],
    }
    (folder / "examples.json").write_text(json.dumps(examples))


class MemoryListener(Listener):
    """Reads this process' own memory, in bytes, whenever a fit says how far it is."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[OnProgress]:
        """Take the place of a progress bar."""
        yield lambda *_: self.samples.append(memory("RssAnon"))


def fit_there(folder: Path, clock: common.Clock) -> dict[str, Any]:
    """Fit the features of a folder with the paper's settings, in a process that does only this."""
    examples = json.loads((folder / "examples.json").read_text())
    store = FeatureStore(folder)
    store.open(json.loads(store.manifest_path.read_text()), Shape(*examples["shape"]))
    features = Features(
        means=store.means,
        filled=store.filled,
        labels=torch.tensor(examples["labels"]),
        questions=tuple(examples["questions"]),
        tasks=("own",) * len(examples["questions"]),
    )
    memory_now = MemoryListener()
    started = clock()
    train_seed(
        features, examples["identity"], TrainConfig(), folder / "routers", listener=memory_now
    )
    return {
        "seconds": clock() - started,
        "peak_gib": memory("VmHWM") / GIB,
        "own_gib": max(memory_now.samples) / GIB,
        "features_gib": sum(path.stat().st_size for path in store.block_files()) / GIB,
    }


def memory(name: str) -> int:
    """Return a line of this process' account of its memory, in bytes; 0 outside of Linux.

    The most that `getrusage` tells begins with what the parent held.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def growth(
    base: BaseModel, features: Features, num: int, folder: Path, clock: str
) -> list[dict[str, Any]]:
    """Fit every size, each in a process of its own, and print what it took."""
    points: list[dict[str, Any]] = []
    n, L, W, D = features.shape
    print(
        f"a fit of {TrainConfig().num_epochs} epochs, W = {W}; features of {n} questions repeated"
    )
    for number, size in enumerate(sizes_of((num, L, D))):
        place = folder / f"size{number}"
        write_repeated(features, size, place, base)
        words = [sys.executable, __file__, "--fit", str(place), "--clock", clock]
        child = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        FeatureStore(place).remove()
        point = dict(zip("NLD", size, strict=True)) | json.loads(child.stdout)
        first = points[0] if points else point
        point["share_of_time"] = point["seconds"] / first["seconds"]
        points.append(point)
        print(
            f"  N {size[0]}, L {size[1]}, D {size[2]}: {point['seconds']:.1f} s "
            f"({point['share_of_time']:.2f} of the first), {point['peak_gib']:.2f} GiB at most "
            f"with the pages of the mapped file ({point['features_gib']:.2f} GiB), "
            f"{point['own_gib']:.2f} GiB without",
            flush=True,
        )
    return points


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__)
    common.add_clock(parser)
    parser.add_argument("--data-dir", type=Path, help="ARC-Easy in place of built-in questions")
    common.add_model(parser)
    parser.add_argument("--questions", type=int, help="trained on both ways")
    parser.add_argument("--double", action="store_true", help="also compare losses in float64")
    parser.add_argument("--scale", action="store_true", help="also see how a fit grows")
    parser.add_argument("--targets", type=int, help="with --scale: of the largest fit")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)  # a process of --scale's own
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    if options.targets is not None and not options.scale:
        parser.error("--targets has no effect without --scale")
    clock = common.clock_of(options)
    if options.fit:
        print(json.dumps(fit_there(options.fit, clock)))
        return
    base = common.base_of(options)
    measured = common.describe_run(base, options)  # before --double changes the model's dtype
    records = draw_targets(base, sizes["questions"], options.data_dir)
    with tempfile.TemporaryDirectory() as name:
        result, features = compare(base, records, Path(name), clock)
        report(result)
        scale = []
        if options.scale:
            scale = growth(base, features, sizes["targets"], Path(name), options.clock)
    if options.double:
        result["in_double"] = compare_in_double(base, records)
        print(f"in float64 the losses differ, relatively, by {differ(result['in_double'])}")
    figures = {
        "speedup": result["speedup"],
        "repeats": 1,
        "ours": OURS,
        "theirs": THEIRS,
        **measured,
        "result": result,
        "scale": scale,
    }
    rest = {"the fit of the routers": result["fit_s"] / result["ours_s"]}
    comparison = Comparison("train routers", result["speedup"], result["bound"], rest)
    common.write_figures(options, figures, [comparison])
    if not result["losses_are_equal"]:
        raise SystemExit(
            f"the losses differ by more than {EQUAL_LOSSES} and {TIMES_ROUNDING} times rounding"
        )
    if not all(difference <= EQUAL_LOSSES for difference in result.get("in_double", [])):
        raise SystemExit(f"in float64 the losses differ by more than {EQUAL_LOSSES}")


if __name__ == "__main__":
    main()
