"""Measure how many records per second the driver of a search takes, in one process and from Ray.

Ours is `run_search` with an executor that returns finished batches at once. So all of the time is
the driver's own: it forms batches, hashes prompts, writes each batch atomically, and joins the
batches to `search.jsonl` with its manifest. With Ray, if it is installed, worker processes return
such batches. Then the processor time of the driver alone is counted.

Theirs is the obvious way: each batch is appended to one file and synchronised. After a kill this
file may end in the middle of a batch, and it has no settings, failures or repeated questions.

    python benchmarks/driver.py [--quick] [--json FILE]
"""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import common
import msgspec
import torch

from drllm.config import ModelConfig, SearchConfig
from drllm.model.load import BaseModel
from drllm.models.workers import RoutedModelLoader, Workers
from drllm.paths import Decisions, full_decisions
from drllm.records.manifest import to_lines
from drllm.records.search import Retest, SearchRecord, TriedPath
from drllm.search.batch import BatchRecords
from drllm.search.questions import Batch, SearchQuestion, collect_questions, split_into_batches
from drllm.search.run import run_search
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, Prompt
from drllm.work import ray as ray_executor
from drllm.work.listener import Listener
from drllm.work.ray import RayExecutor
from drllm.work.run import Block

LAYERS = 30
PATHS = 51  # of a question, as a search of 50 simulations has
NUM_PROMPTS = 5  # of a question with options: the search's own, and four of the re-test
IDENTITY = {"id": "ready-made", "num_layers": LAYERS}
RUNTIME = {"dtype": "float32", "device": "cpu"}

QUICK = {"repeats": 2, "questions": 800}
WHOLE = {"repeats": 5, "questions": 8000}

OURS = "run_search fed with ready-made batches of questions"
THEIRS = "each batch appended to one file and synchronised"


class ManyQuestions(Task):
    """Any number of questions, each as long as a question of ARC."""

    name = "many"
    description = "questions for measuring"
    rewards = ("loglikelihood",)

    def __init__(self, number: int) -> None:
        self.number = number

    def examples(self, split: str, data_dir: Path | None = None) -> list[Example]:
        """Return the questions."""
        text = "which of these things is the one that is asked for in this question?"
        return [
            Example(id=str(n), task=self.name, question=f"Of {n}, {text}", gold=0, answer="one")
            for n in range(self.number)
        ]

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompts of a question; their number is that of a real question's prompts."""
        prompt = Prompt(text=render_question(example), reward=reward, answer="one")
        return (prompt,) * NUM_PROMPTS


def render_question(example: Example) -> str:
    """Return the text of a question's prompt."""
    return f"Question: {example.question}\nAnswer:"


def make_records(questions: Sequence[SearchQuestion]) -> BatchRecords:
    """Return records of questions, as large as those of a search with 50 simulations."""
    return BatchRecords(tuple(make_record(question) for question in questions))


def make_record(question: SearchQuestion) -> SearchRecord:
    """Return the record of one question, with random paths and results."""
    example = question.example
    rng = random.Random(example.id)
    verdicts: dict[Decisions, bool] = {full_decisions(LAYERS): True}  # whether a path is right
    while len(verdicts) < PATHS:
        decisions = [1] * LAYERS
        for _ in range(rng.randint(1, 4)):
            decisions[rng.randrange(LAYERS)] = rng.choice((0, 2))
        verdicts[tuple(decisions)] = rng.random() < 0.5
    paths = []
    for simulation, (path, is_right) in enumerate(verdicts.items()):
        paths.append(make_tried_path(path, simulation, is_right, rng))
    return SearchRecord(
        id=example.id,
        task=question.task,
        question=example.question,
        prompt=render_question(example),
        answer=example.answer,
        reward="loglikelihood",
        num_layers=LAYERS,
        paths=tuple(paths),
        seconds=1.0,
    )


def make_tried_path(
    decisions: Decisions, simulation: int, is_right: bool, rng: random.Random
) -> TriedPath:
    """Return a path with random results; a right path has passed the re-test."""
    margin = rng.gauss(0, 1)
    kl = rng.random()
    retest = None
    if is_right:
        retest = Retest(passed=3, asked=4, margin=rng.gauss(0, 1), survived=True)
    return TriedPath(
        decisions=decisions,
        simulation=simulation,
        reward=float(is_right),
        margin=margin,
        executions=float(sum(decisions)),
        kl=kl,
        retest=retest,
    )


class ReadyExecutor:
    """An executor that returns finished batches.

    Args:
        results: The records of each batch, by the batch's number.
    """

    identity = IDENTITY
    runtime = RUNTIME
    num_workers = 1
    num_sharing = 1

    def __init__(self, results: dict[int, BatchRecords]) -> None:
        self.results = results

    def run(
        self, blocks: Sequence[Block[Batch]], function: Any, keep: Any = None, on_step: Any = None
    ) -> Iterator[tuple[Block[Batch], BatchRecords]]:
        """Yield the batches with their records."""
        for block in blocks:
            yield block, self.results[block.data.number]


class ReadyWorker:
    """A worker of Ray that spends almost no time on a batch.

    It makes records once for each size of a batch. For later batches of this size it only changes
    the questions' ids.
    """

    def load(self, load_model: object, plan: object) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load nothing, and return the identity and the runtime of a model."""
        self.results: dict[int, BatchRecords] = {}  # by the number of questions
        return IDENTITY, RUNTIME

    def prepare(self, function: object) -> None:
        """Prepare nothing."""

    def run(self, batch: Batch, store: object) -> BatchRecords:
        """Return records of the questions."""
        size = len(batch.questions)
        if size not in self.results:
            self.results[size] = make_records(batch.questions)
        records = []
        for record, question in zip(self.results[size].records, batch.questions, strict=True):
            records.append(msgspec.structs.replace(record, id=question.example.id))
        return BatchRecords(tuple(records))


def make_workers(executor: Any) -> Workers:
    """Return an executor with a base model that is never run."""
    model: Any = SimpleNamespace(device=torch.device("meta"), named_modules=list)
    return Workers(BaseModel(model, None, "ready-made"), model, executor)


class BatchClock(Listener):
    """Measures the processor time of the driver from the first batch to the last.

    Attributes:
        seconds: This time. Joining the batches to the file isn't in it.
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds = 0.0

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Any]:
        """Yield the function that is called after each batch."""
        yield self._on_progress

    def _on_progress(self, *_: object) -> None:
        now = time.process_time()
        if self.started is None:
            self.started = now
        self.seconds = now - self.started


class Times(NamedTuple):
    """How long one run took, in seconds."""

    wall: float
    processor: float  # of this process alone


@dataclass
class Way:
    """The runs of one way to keep the records."""

    times: list[Times] = field(default_factory=list)
    clocks: list[BatchClock] = field(default_factory=list)  # none for the obvious way

    def run(self, work: Callable[[], object]) -> None:
        """Run the work, and add its times."""
        wall_start = time.perf_counter()
        processor_start = time.process_time()
        work()
        wall = time.perf_counter() - wall_start
        self.times.append(Times(wall, time.process_time() - processor_start))

    @property
    def wall(self) -> float:
        """The median wall time of the runs."""
        return statistics.median(times.wall for times in self.times)

    @property
    def processor(self) -> float:
        """The median processor time of the runs."""
        return statistics.median(times.processor for times in self.times)

    @property
    def batch_seconds(self) -> float:
        """The median processor time while batches come."""
        return statistics.median(clock.seconds for clock in self.clocks)


def append_batches(path: Path, batches: Sequence[Batch], results: dict[int, BatchRecords]) -> None:
    """Keep the batches the obvious way."""
    with path.open("a", encoding="utf-8") as file:
        for batch in batches:
            file.write(to_lines(results[batch.number].records))
            file.flush()
            os.fsync(file.fileno())


def run_driver(way: Way, executor: Any, questions: Sequence[SearchQuestion], output: Path) -> None:
    """Run the driver of a search once, and add its times to a way."""
    clock = BatchClock()
    way.clocks.append(clock)
    workers = make_workers(executor)
    way.run(partial(run_search, workers, questions, SearchConfig(), output, clock))


def time_in_process(
    questions: Sequence[SearchQuestion], results: dict[int, BatchRecords], repeats: int
) -> dict[str, Way]:
    """Time ours and the obvious way in this process, in turns."""
    batches = split_into_batches(questions, SearchConfig().block_size)
    executor = ReadyExecutor(results)
    ours = Way()
    theirs = Way()
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            run_driver(ours, executor, questions, Path(folder) / str(repeat))
            file = Path(folder) / f"{repeat}.jsonl"
            theirs.run(partial(append_batches, file, batches, results))
    return {"ours": ours, "theirs": theirs}


def time_with_ray(questions: Sequence[SearchQuestion], repeats: int) -> Way:
    """Time ours with two workers of Ray."""
    ray_executor.Worker = ReadyWorker  # type: ignore[misc,assignment]
    way = Way()
    with (
        tempfile.TemporaryDirectory() as folder,
        RayExecutor(RoutedModelLoader(ModelConfig()), device="cpu", num_workers=2) as executor,
    ):
        for repeat in range(repeats):
            run_driver(way, executor, questions, Path(folder) / str(repeat))
    return way


def collect_figures(
    ways: dict[str, Way], number: int, num_bytes: int, repeats: int
) -> dict[str, Any]:
    """Return the figures, for `number` records of `num_bytes` in all."""
    ours = ways["ours"]
    theirs = ways["theirs"]
    with_driver = {name: way for name, way in ways.items() if way.clocks}
    return {
        "overhead": {
            "wall": ours.wall / theirs.wall,
            "processor": ours.processor / theirs.processor,
        },
        "records_per_second": {name: number / way.wall for name, way in ways.items()},
        "records_per_processor_second": {
            name: number / way.processor for name, way in ways.items()
        },
        "committed_per_processor_second": {
            name: number / way.batch_seconds for name, way in with_driver.items()
        },
        "records": number,
        "bytes_per_record": num_bytes / number,
        "bytes_per_path": num_bytes / number / PATHS,
        "repeats": repeats,
        "ours": OURS,
        "theirs": THEIRS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": {name: way.times for name, way in ways.items()},
    }


def report(figures: dict[str, Any]) -> None:
    """Print the figures."""
    by_processor = figures["records_per_processor_second"]
    for name, rate in figures["records_per_second"].items():
        print(
            f"{name:<7} {rate:>9.0f} records a second, "
            f"{by_processor[name]:>9.0f} a second of the driver's processor"
        )
    for name, rate in figures["committed_per_processor_second"].items():
        print(f"{name:<7} {rate:>9.0f} a second of the driver's processor while batches come")
    print(
        f"a record is {figures['bytes_per_record'] / 1000:.1f} kB, "
        f"a path {figures['bytes_per_path']:.0f} B"
    )


def main() -> None:
    """Run the comparison and print it."""
    options = common.parser_of(__doc__).parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    repeats = sizes["repeats"]
    number = sizes["questions"]
    questions = collect_questions([ManyQuestions(number)], SearchConfig())
    batches = split_into_batches(questions, SearchConfig().block_size)
    results = {batch.number: make_records(batch.questions) for batch in batches}
    num_bytes = sum(len(to_lines(result.records).encode()) for result in results.values())
    ways = time_in_process(questions, results, repeats)
    if importlib.util.find_spec("ray") is not None:
        ways["ray"] = time_with_ray(questions, repeats)
    figures = collect_figures(ways, number, num_bytes, repeats)
    report(figures)
    common.write_figures(options, figures)


if __name__ == "__main__":
    main()
