"""How many targets do routers need? Routers of several sizes of training set and several seeds.

A fixed part of the target paths is held out, drawn with a seed; of the others the first 25, 50 and
so on of one order are trained on, so that a larger set contains the smaller ones. How far routers
agree with the held-out targets is read as they are trained: each router reads what the target path
gives its layer. Then questions to test are asked along the routes that the routers take, with
`--executions` at the depth bias that brings questions of `select` to that mean, and along the same
routes, each on another question (permuted): what routes gain by being chosen for their questions.

    python benchmarks/learning_curve.py --supervision FILE ... --task TASK [--sizes N,...]
        [--held-out N] [--seeds N] [--executions X] [--questions N] [--quick] [--json FILE]
        [--data-dir DIR] [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from common.compare import SEED, compare_paired, in_words, mean_change
from common.path_values import (
    CALIBRATED_ON,
    QuestionSet,
    Values,
    depth_bias_of,
    mean_executions,
    tokens_of,
)
from common.path_values import GOLD_LOG_PROBABILITY as RIGHT

from drllm.agreement import compute_metrics, count_baselines
from drllm.config import TrainConfig, TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.errors import ConfigError
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel, detach
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.depth_control import route_prompts
from drllm.models.routing.policies import RouterPolicy
from drllm.models.workers import open_workers
from drllm.paths import StaticPath, to_path
from drllm.records.static_paths import SELECT, TEST
from drllm.records.supervision import join_supervision
from drllm.supervision.summary import class_counts
from drllm.tasks.examples import choose
from drllm.training.feature_store import FeatureStore
from drllm.training.features import Features, collect_features
from drllm.training.trainer import Trainer, count_decisions
from drllm.tuning.data_splits import split_tasks
from drllm.tuning.objectives import GOLD, make_prompt
from drllm.work.listener import Listener

QUICK = {"questions": 8, "seeds": 1, "held_out": 4}
WHOLE = {"questions": 300, "seeds": 3, "held_out": 150}
QUICK_SIZES, SIZES = "4,8", "25,50,100,200,400"
RIVALS = ("full", "permuted")


def of_rows(examples: Features, rows: Sequence[int]) -> Features:
    """Return some of the targets' features, which stay where they are."""
    places = torch.arange(len(examples.labels)) if examples.places is None else examples.places
    return dataclasses.replace(
        examples,
        filled=examples.filled[rows],
        labels=examples.labels[rows],
        questions=[examples.questions[row] for row in rows],
        tasks=[examples.tasks[row] for row in rows],
        places=places[rows],
    )


def train_routers(
    examples: Features, rows: Sequence[int], identity: Mapping[str, Any], seed: int
) -> RouterStack:
    """Train routers on some targets by the default settings, with none held out."""
    config = TrainConfig(seed=seed, validation_fraction=0.0)
    trainer = Trainer(of_rows(examples, rows), identity, config)
    while not trainer.is_over:
        trainer.train_epoch()
    return trainer.build_routers()


@torch.no_grad()
def measure_agreement(
    routers: RouterStack, examples: Features, rows: Sequence[int]
) -> dict[str, Any]:
    """Return how far routers agree with held-out targets; the loss is in nats a label."""
    labels = examples.labels[rows]  # [B, L]
    logits = routers(examples.rows(rows), examples.filled[rows])  # [B, L, C]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return compute_metrics(count_decisions(logits.argmax(dim=-1), labels, float(loss)))


def describe_agreement(found: Mapping[str, Any]) -> str:
    """Return what routers, or a trivial way to decide, reach on held-out targets."""
    words = f"labels hit {found['accuracy']:.4f}, macro-F1 {found['macro_f1']:.4f}"
    if found["routers_loss"] is not None:
        words += f", {found['routers_loss']:.4f} nats a label"
    return words


def make_comparison(
    options: argparse.Namespace, numbers: Mapping[str, int], routed: RoutedModel
) -> Any:
    """Return a function that compares routers' routes with the full path and permuted routes."""
    [parts] = split_tasks(TuneConfig(data_dir=options.data_dir, num_fit=LARGEST_INT), options.task)

    def prompts(part: str, num: int) -> list[Any]:
        chosen = choose(parts.examples[part], num, SEED)
        return [make_prompt(parts.task, example, GOLD) for example in chosen]

    calibrated_on = tokens_of(routed, prompts(SELECT, CALIBRATED_ON))
    questions = QuestionSet(routed, prompts(TEST, numbers["questions"]))
    num = len(questions.prompts)
    full = questions.evaluate([StaticPath(range(routed.num_layers))] * num)
    permutation = torch.randperm(num, generator=torch.Generator().manual_seed(SEED)).tolist()

    def compare(routers: RouterStack) -> tuple[dict[str, Any], dict[str, Values]]:
        routers = routers.to(routed.model.device)
        bias = depth_bias_of(routed, routers, calibrated_on, options.executions)
        routes = route_prompts(routed, RouterPolicy(routers, depth_bias=bias), questions.prompts)
        plans = [StaticPath(to_path(route)) for route in routes.tolist()]
        values = {"own": questions.evaluate(plans), "full": full}
        values["permuted"] = questions.evaluate([plans[place] for place in permutation])
        figures: dict[str, Any] = {"executions": mean_executions(plans)}
        for rival in RIVALS:
            rows = {}
            for what in full:
                rows[what] = compare_paired(what, values["own"][what], values[rival][what])
            figures[rival] = rows
        return figures, values

    return compare


@dataclass(frozen=True)
class LearningCurve:
    """Trains routers on sets of several sizes, and measures each.

    Attributes:
        examples: The features of all targets.
        held_out: The rows of the targets that routers are judged on.
        order: The rows that are trained on, the first ones by smaller sets too.
        identity: The model's.
        num_seeds: How many routers are trained on a set.
        compare: Compares routers' routes with the rivals', see `make_comparison`.
    """

    examples: Features
    held_out: Sequence[int]
    order: Sequence[int]
    identity: Mapping[str, Any]
    num_seeds: int
    compare: Any

    def describe_baselines(self) -> dict[str, dict[str, Any]]:
        """Return what the trivial ways to decide reach on the held-out targets."""
        labels = self.examples.labels
        counts = [class_counts(labels[rows].tolist()) for rows in (self.held_out, self.order)]
        return {
            name: compute_metrics(counted) for name, counted in count_baselines(*counts).items()
        }

    def measure_size(self, size: int) -> dict[str, Any]:
        """Return the figures of routers that were trained on so many targets, by seed."""
        seeds: list[dict[str, Any]] = []
        values: list[dict[str, Values]] = []
        for seed in range(self.num_seeds):
            routers = train_routers(self.examples, self.order[:size], self.identity, seed)
            agreement = measure_agreement(routers, self.examples, self.held_out)
            try:
                figures, answers = self.compare(routers)
                values.append(answers)
            except ConfigError as error:  # these routers can't be brought to that depth
                figures = {"not compared": str(error)}
            seeds.append({"held_out": agreement, **figures})
            print(f"{size} targets, seed {seed}: {describe_agreement(agreement)}", flush=True)
        mean: dict[str, dict[str, Any]] = {}
        if values:
            own = [seed_values["own"][RIGHT] for seed_values in values]
            for rival in RIVALS:
                others = [seed_values[rival][RIGHT] for seed_values in values]
                mean[rival] = mean_change(own, others)
        words = "; ".join(f"less {name} {in_words(RIGHT, row)}" for name, row in mean.items())
        print(f"{size} targets, {len(values)} seeds: right option {words}", flush=True)
        return {"seeds": seeds, "mean of seeds": mean}


def parse_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the flags."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--supervision", nargs="+", type=Path, required=True, help="target paths")
    parser.add_argument("--task", default="builtin_facts", help="with options, to test on")
    parser.add_argument("--sizes", help=f"of training sets; {SIZES} unless given")
    parser.add_argument("--executions", type=float, help="mean executions; as trained unless given")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    for name in WHOLE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = parser.parse_args()
    options.clock = "none"
    return parser, options


def pool_features(base: BaseModel, targets: Any, folder: Path) -> Features:
    """Return what routers read of all targets, as a training pools it."""
    config = TrainConfig()
    store = FeatureStore(folder)
    with open_workers(base, None, config, Listener()) as workers:
        return collect_features(workers, targets, num_windows=config.num_windows, store=store)


def main() -> None:
    """Run it from the command line."""
    parser, options = parse_options()
    numbers = common.sizes_of(options, QUICK, WHOLE)
    default = QUICK_SIZES if options.quick else SIZES
    sizes = [int(size) for size in (options.sizes or default).split(",")]
    targets = join_supervision(options.supervision)
    base = common.base_of(options)
    with tempfile.TemporaryDirectory() as folder:
        examples = pool_features(base, targets, Path(folder) / "features")
        order = list(range(len(examples.labels)))
        random.Random(SEED).shuffle(order)
        held_out = order[: numbers["held_out"]]
        rest = order[numbers["held_out"] :]
        if max(sizes) > len(rest):
            parser.error(
                f"--sizes: {max(sizes)} targets, but there are {len(order)}, of which "
                f"{len(held_out)} are held out"
            )
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        compare = make_comparison(options, numbers, routed)
        curve = LearningCurve(examples, held_out, rest, base.identity, numbers["seeds"], compare)
        baselines = curve.describe_baselines()
        for name, found in baselines.items():
            print(f"{name}: {describe_agreement(found)}")
        figures: dict[str, Any] = {
            "of": common.describe_run(base, options),
            "held_out": len(held_out),
            "baselines": baselines,
            "sizes": {},
        }
        for size in sizes:
            figures["sizes"][str(size)] = curve.measure_size(size)
            common.write_figures(options, figures)
    detach(base.model)


if __name__ == "__main__":
    main()
