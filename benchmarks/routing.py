"""What routes per question are worth beside one path for all questions, at equal cost.

Router sets are compared with each other and with static paths on questions with options that
nothing was trained on: accuracy, the right option's log-probability among the options, and the
next-token loss of questions with their right answers. A set is the folder of a training, with the
routers of further seeds in `seed_N`; it runs with the bypass that it was trained with, if any.
At each share of saved layer executions every seed gets the depth bias that brings 64 questions of
`select` to that cost; what a bypass costs counts as executions. A set's figures are means over its
seeds. The first set also runs its own routes permuted, each on another question. What it loses by
that is what it gains by choosing a route for each question.

Each row is a difference from the full path; then come the differences between the first set and
every other row, paired by question, with 95 % intervals over questions. What is measured is kept
in `--output-dir`, so the same command goes on after a kill.

    python benchmarks/routing.py --task TASK --routers NAME=FOLDER [NAME=FOLDER ...]
        [--bypass NAME=FILE ...] [--paths FILE[:NAME],...] [--saved SHARE,...] [--questions N]
        [--texts N] [--output-dir DIR] [--quick] [--json FILE] [--data-dir DIR] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import msgspec
from common.compare import SEED, compare_paired, in_words
from common.path_values import CALIBRATED_ON, QuestionSet, Values, hash_path, tokens_of

from drllm.config import TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.cost import mean_executions, mean_skips, path_executions
from drllm.errors import ConfigError
from drllm.evaluation.flops import count_bypass_cost
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel, attach, detach
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routers.places import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import load_bypass
from drllm.models.routing.depth_control import TOLERANCE, find_depth_bias, route_prompts
from drllm.models.routing.healed import install_path
from drllm.models.routing.policies import RouterPolicy
from drllm.paths import StaticPath, to_path
from drllm.pipeline.manifest import hash_file
from drllm.records.codec import hash_values
from drllm.records.static_paths import SELECT, TEST, PathFile, read_path_list
from drllm.tasks.examples import Prompt, choose
from drllm.tuning.data_splits import split_tasks
from drllm.tuning.objectives import GOLD, make_prompt
from drllm.work.store import ResultStore

QUICK = {"questions": 12, "texts": 4}
WHOLE = {"questions": 1_000_000, "texts": 1_000_000}
NEAR = 0.05
"""How near to the cost a depth bias has to come, in executions, if any comes that near."""
FULL = "full"
PERMUTED = "permuted"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the questions give along their routes.

    Attributes:
        executions: The mean executions of a question, with what the bypass costs.
        values: Name of a quantity → its value for each question.
    """

    executions: float
    values: Values


@dataclass(frozen=True)
class RouterSet:
    """Routers that were trained in the same way with several seeds.

    Attributes:
        name: What the tables call them.
        routers: The routers of each seed.
        weights_sha256: The hash of each seed's weights.
        bypass: What runs in place of their skipped layers.
    """

    name: str
    routers: Sequence[RouterStack]
    weights_sha256: Sequence[str]
    bypass: Bypass | None


@dataclass(frozen=True)
class Row:
    """A line of the tables: one system at one cost, with an outcome for each seed."""

    name: str
    saved: float | None
    outcomes: Sequence[Outcome]

    @property
    def executions(self) -> float:
        """The mean executions over the seeds."""
        return fmean(outcome.executions for outcome in self.outcomes)

    def get_values(self, quantity: str) -> list[list[float]]:
        """Return the values of a quantity, `[seeds][questions]`."""
        return [outcome.values[quantity] for outcome in self.outcomes]


class Measurer:
    """Measures systems on the questions of a task, and keeps what is measured.

    Args:
        base: The model.
        questions: The questions to measure on.
        calibration: Questions on which depth biases are found.
        num_texts: How many of the questions are also read as texts.
        folder: Where measurements are kept.
    """

    def __init__(
        self,
        base: BaseModel,
        questions: Sequence[Prompt],
        calibration: Sequence[Prompt],
        num_texts: int,
        folder: Path,
    ) -> None:
        self.base = base
        self.questions = questions
        self.calibration = calibration
        self.num_texts = num_texts
        identity = {
            "model": base.identity,
            "runtime": base.runtime,
            "prompts_sha256": hash_values([questions, calibration, num_texts]),
        }
        self.store = ResultStore(folder, identity, stage="benchmark")
        self.store.open()

    def measure_path(self, name: str, file: PathFile | None) -> Row:
        """Measure a static path, or the full one for None."""
        key = name
        if file is not None:
            key += f" {hash_path(file)[:16]}"
        return Row(name, None, [self._get_or_make(key, partial(self._measure_path, file))])

    def _measure_path(self, file: PathFile | None) -> Outcome:
        routed = attach(self.base)
        path = StaticPath(range(self.base.num_layers))
        if file is not None:
            path = install_path(routed.injection, file)
        questions = QuestionSet(routed, self.questions, self.num_texts)
        values = questions.evaluate([path] * len(self.questions))
        return Outcome(executions=path_executions(path), values=values)

    def measure_routers(self, routers: RouterSet, saved: float, is_permuted: bool) -> Row:
        """Measure routers of several seeds at a share of saved executions.

        A seed whose routers can't be brought to this cost is left out, and said.
        """
        outcomes = []
        for seed, stack in enumerate(routers.routers):
            measure = partial(self._measure_seed, stack, routers.bypass, saved, is_permuted)
            hashes = [routers.weights_sha256[seed]]
            if routers.bypass is not None:
                hashes.append(routers.bypass.sha256)
            key = f"{routers.name} seed {seed} saved {saved:g} {hash_values(hashes)[:16]}"
            if is_permuted:
                key += f" {PERMUTED}"
            try:
                outcomes.append(self._get_or_make(key, measure))
            except ConfigError as error:
                print(f"{routers.name}, seed {seed}, {saved:.0%} saved: {error}", flush=True)
        name = f"{routers.name}, {PERMUTED}" if is_permuted else routers.name
        return Row(name, saved, outcomes)

    def _measure_seed(
        self, stack: RouterStack, bypass: Bypass | None, saved: float, is_permuted: bool
    ) -> Outcome:
        routed = attach(self.base, stack, bypass=bypass)  # refuses routers of another bypass
        skip_cost = count_bypass_cost(routed)
        num_layers = self.base.num_layers
        # With E executions and L - E skips the cost is E + skip_cost (L - E).
        target = num_layers * (1 - saved - skip_cost) / (1 - skip_cost)
        bias = find_bias(routed, tokens_of(routed, self.calibration), target)
        questions = QuestionSet(routed, self.questions, self.num_texts)
        policy = RouterPolicy(stack, depth_bias=bias)
        routes = route_prompts(routed, policy, questions.prompts).tolist()
        if is_permuted:
            random.Random(SEED).shuffle(routes)
        executions = mean_executions(routes) + skip_cost * mean_skips(routes)
        values = questions.evaluate([StaticPath(to_path(route)) for route in routes])
        return Outcome(executions=executions, values=values)

    def _get_or_make(self, key: str, make: Callable[[], Outcome]) -> Outcome:
        print(f"measuring {key} …", flush=True)
        try:
            return self.store.get_or_make(key, Outcome, make)
        finally:
            detach(self.base.model)


def find_bias(routed: RoutedModel, prompts: Sequence[Sequence[int]], executions: float) -> float:
    """Return the depth bias for a number of executions, as near as it comes.

    Raises:
        ConfigError: No bias comes as near as `find_depth_bias` asks for.
    """
    try:
        calibration = find_depth_bias(routed, prompts, executions, tolerance=NEAR)
    except ConfigError:
        calibration = find_depth_bias(routed, prompts, executions, tolerance=TOLERANCE)
    return calibration.depth_bias


def read_named(parser: argparse.ArgumentParser, flag: str, words: Sequence[str]) -> dict[str, Path]:
    """Return the paths of `NAME=PATH` by name."""
    by_name = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            parser.error(f"{flag}: {word!r} isn't NAME=PATH, for example plain=run/routers")
        by_name[name] = Path(path)
    return by_name


def load_router_set(name: str, folder: Path, bypass: Path | None) -> RouterSet:
    """Load the routers of all seeds of a training."""
    folders = [folder, *sorted(folder.glob("seed_*"))]
    return RouterSet(
        name=name,
        routers=[load_routers(of_seed) for of_seed in folders],
        weights_sha256=[hash_file(of_seed / WEIGHTS_FILE) for of_seed in folders],
        bypass=None if bypass is None else load_bypass(bypass),
    )


def compare_rows(ours: Row, theirs: Row) -> dict[str, Any]:
    """Return the difference of each quantity between two rows, mean over seeds, by quantity."""
    differences = {}
    for quantity in ours.outcomes[0].values:
        # A path has a single outcome, so the seeds of each row are averaged before the difference.
        values = average(ours.get_values(quantity))
        others = average(theirs.get_values(quantity))
        differences[quantity] = compare_paired(quantity, values, others)
    return differences


def average(by_seed: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each question over the seeds."""
    return [fmean(values) for values in zip(*by_seed, strict=True)]


def describe(differences: Mapping[str, Any]) -> str:
    """Return the differences of a row in words."""
    parts = [f"{quantity} {in_words(quantity, row)}" for quantity, row in differences.items()]
    return "; ".join(parts)


class Report:
    """The rows and the differences so far, printed as they come.

    Args:
        full: The full path, which every row is compared with.
    """

    def __init__(self, full: Row) -> None:
        self.full = full
        self.means: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.differences: list[dict[str, Any]] = []
        for quantity in full.outcomes[0].values:
            [values] = full.get_values(quantity)
            self.means[quantity] = {"mean": fmean(values), "n": len(values)}
            print(f"full path: {quantity} {fmean(values):.4f} on {len(values)}", flush=True)

    def add_row(self, row: Row) -> None:
        """Add the differences between a row and the full path."""
        differences = compare_rows(row, self.full)
        figures = {"name": row.name, "saved": row.saved, "seeds": len(row.outcomes)}
        self.rows.append(figures | {"executions": row.executions, "from_full": differences})
        words = describe(differences)
        print(f"{row.name}, {row.executions:.2f} executions: {words}", flush=True)

    def add_difference(self, ours: Row, theirs: Row) -> None:
        """Add the differences between the first router set and another row."""
        differences = compare_rows(ours, theirs)
        figures = {"saved": ours.saved, "ours": ours.name, "theirs": theirs.name}
        self.differences.append(figures | {"by": differences})
        words = describe(differences)
        print(f"{ours.saved:.0%} saved, {ours.name} less {theirs.name}: {words}", flush=True)


def measure_all(
    measurer: Measurer,
    sets: Sequence[RouterSet],
    paths: Mapping[str, PathFile],
    shares: Sequence[float],
) -> Report:
    """Measure what isn't kept in the folder, and print the rows."""
    report = Report(measurer.measure_path(FULL, None))
    path_rows = [measurer.measure_path(name, file) for name, file in paths.items()]
    for row in path_rows:
        report.add_row(row)
    for saved in shares:
        rows = [measurer.measure_routers(each, saved, is_permuted=False) for each in sets]
        rows.append(measurer.measure_routers(sets[0], saved, is_permuted=True))
        reached = [row for row in rows if row.outcomes]
        for row in reached:
            report.add_row(row)
        if rows[0].outcomes:
            for other in (*reached[1:], *path_rows):
                report.add_difference(rows[0], other)
    return report


def parse_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the flags."""
    parser = common.parser_of(__doc__ or "", "few questions, under a minute")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--task", required=True, help="with options")
    parser.add_argument("--routers", nargs="+", required=True, help="NAME=FOLDER of each set")
    parser.add_argument("--bypass", nargs="+", default=(), help="NAME=FILE of a set's bypass")
    parser.add_argument("--paths", help="static paths, healed or not, beside the routers")
    parser.add_argument("--saved", default="0.1,0.2", help="shares of the layer executions")
    parser.add_argument("--questions", type=int, help="maximum questions to measure on")
    parser.add_argument("--texts", type=int, help="maximum questions that are read as texts too")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/routing"))
    options = parser.parse_args()
    options.clock = "none"
    return parser, options


def main() -> None:
    """Run it from the command line."""
    parser, options = parse_options()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    bypasses = read_named(parser, "--bypass", options.bypass)
    folders = read_named(parser, "--routers", options.routers)
    for name in bypasses:
        if name not in folders:
            parser.error(f"--bypass: no set of --routers is called {name}")
    sets = [load_router_set(name, folder, bypasses.get(name)) for name, folder in folders.items()]
    paths = {} if options.paths is None else read_path_list(options.paths)
    shares = [float(share) for share in options.saved.split(",")]
    [parts] = split_tasks(TuneConfig(data_dir=options.data_dir, num_fit=LARGEST_INT), options.task)

    def make_prompts(part: str, num: int) -> list[Prompt]:
        chosen = choose(parts.examples[part], num, SEED)
        return [make_prompt(parts.task, example, GOLD) for example in chosen]

    base = common.base_of(options)
    with common.measurement_folder(options) as folder:
        measurer = Measurer(
            base,
            make_prompts(TEST, sizes["questions"]),
            make_prompts(SELECT, CALIBRATED_ON),
            sizes["texts"],
            folder,
        )
        report = measure_all(measurer, sets, paths, shares)
    figures = {
        "of": common.describe_run(base, options),
        "full": report.means,
        "rows": report.rows,
        "differences": report.differences,
    }
    common.write_figures(options, figures)


if __name__ == "__main__":
    main()
