"""How many records a second the driver of a search can take, from its own process and from Ray.

Ours: `run_search` with an executor that returns ready-made blocks at once, so that all of the time
is the driver's own: forming blocks, hashing prompts, committing each block atomically, and joining
the blocks to `search.jsonl` with its manifest. Through Ray (left out where it isn't installed) the
same blocks come from worker processes; counted is the driver's processor time, not the workers'.
Obvious way: each block is appended to one file and synchronised; it survives a kill only in part,
and knows nothing of settings, failures or repeated questions.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import msgspec

from drllm.config import ModelConfig, SearchConfig
from drllm.paths import full_decisions
from drllm.records.manifest import to_lines
from drllm.records.search import Retest, SearchRecord, TriedPath
from drllm.search import ray as ray_executor
from drllm.search.batch import BatchRecords
from drllm.search.questions import Batch, SearchQuestion, collect_questions, split_into_batches
from drllm.search.ray import RayExecutor
from drllm.search.run import run_search
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, Prompt
from drllm.work.listener import Listener

LAYERS = 30
PATHS = 51
IDENTITY = {"id": "ready-made", "num_layers": LAYERS}
RUNTIME = {"dtype": "float32", "device": "cpu"}


class ManyQuestions(Task):
    """As many questions as are wanted, each as long as a question of ARC."""

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
        """Return how the question is asked, and four other ways, as many as of a choice."""
        text = f"Question: {example.question}\nAnswer:"
        return (Prompt(text=text, reward=reward, answer="one"),) * 5


def ready_made(questions: Sequence[SearchQuestion]) -> BatchRecords:
    """Return a batch of records of the size that a search of 50 simulations gives."""
    records = []
    for question in questions:
        example = question.example
        rng = random.Random(example.id)
        tried = {full_decisions(LAYERS): True}
        while len(tried) < PATHS:
            decisions = [1] * LAYERS
            for _ in range(rng.randint(1, 4)):
                decisions[rng.randrange(LAYERS)] = rng.choice((0, 2))
            tried[tuple(decisions)] = rng.random() < 0.5
        paths = tuple(
            TriedPath(
                decisions=decisions,
                simulation=place,
                reward=float(is_right),
                margin=rng.gauss(0, 1),
                executions=float(sum(decisions)),
                kl=rng.random(),
                retest=Retest(passed=3, asked=4, margin=rng.gauss(0, 1), survived=True)
                if is_right
                else None,
            )
            for place, (decisions, is_right) in enumerate(tried.items())
        )
        text = f"Question: {example.question}\nAnswer:"
        records.append(
            SearchRecord(
                id=example.id,
                task=question.task,
                question=example.question,
                prompt=text,
                answer=example.answer,
                reward="loglikelihood",
                num_layers=LAYERS,
                paths=paths,
                seconds=1.0,
            )
        )
    return BatchRecords(tuple(records))


class ReadyMade:
    """An executor whose batches were searched before."""

    identity = IDENTITY
    runtime = RUNTIME

    def __init__(self, results: dict[int, BatchRecords]) -> None:
        self.results = results

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return the prompts' texts."""
        return [prompt.text for prompt in prompts]

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Any = None,
        on_batch_step: Any = None,
    ) -> Iterator[tuple[Batch, BatchRecords]]:
        """Hand over the batches."""
        for batch in batches:
            yield batch, self.results[batch.number]


class ReadyMadeWorker:
    """A worker of Ray whose batches cost it next to nothing: one is made, and sent every time."""

    def load(
        self, model: ModelConfig, num_threads: int, num_sharing: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Say that there is a model."""
        self.made: dict[int, BatchRecords] = {}
        return IDENTITY, RUNTIME

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return the prompts' texts."""
        return [prompt.text for prompt in prompts]

    def search(self, batch: Batch, config: SearchConfig, parts: Any) -> BatchRecords:
        """Return ready-made records of the questions."""
        size = len(batch.questions)
        if size not in self.made:
            self.made[size] = ready_made(batch.questions)
        renamed = [
            msgspec.structs.replace(record, id=question.example.id)
            for record, question in zip(self.made[size].records, batch.questions, strict=True)
        ]
        return BatchRecords(tuple(renamed))


class Clock(Listener):
    """Hears of every batch, and knows what the driver's processor spent on them.

    Attributes:
        seconds: From the first batch to the last, writing the file not counted.
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds = 0.0

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Any]:
        """Hear of each batch."""

        def on_progress(*_: object) -> None:
            now = time.process_time()
            self.started = now if self.started is None else self.started
            self.seconds = now - self.started

        yield on_progress


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds of this process."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def append(path: Path, batches: Sequence[Batch], results: dict[int, BatchRecords]) -> None:
    """Keep the batches the obvious way."""
    with path.open("a", encoding="utf-8") as file:
        for batch in batches:
            file.write(to_lines(results[batch.number].records))
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__)
    options = parser.parse_args()
    repeats, number = (2, 800) if options.quick else (5, 8000)
    task = ManyQuestions(number)
    questions = collect_questions([task], SearchConfig())
    batches = split_into_batches(questions, SearchConfig().block_size)
    results = {batch.number: ready_made(batch.questions) for batch in batches}
    size = sum(len(to_lines(result.records).encode()) for result in results.values())
    ways: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": [], "ray": []}
    clocks: dict[str, list[Clock]] = {"ours": [], "ray": []}
    executor = ReadyMade(results)

    def run(way: str, by: Any, output: Path) -> None:
        clock = Clock()
        clocks[way].append(clock)
        work = partial(run_search, by, questions, SearchConfig(), output, clock)
        ways[way].append(timed(work))

    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(repeat) for repeat in range(2 * repeats)]
        for repeat in range(repeats):
            run("ours", executor, outputs[repeat])
            path = Path(folder) / f"{repeat}.jsonl"
            ways["theirs"].append(timed(partial(append, path, batches, results)))
        if importlib.util.find_spec("ray") is None:
            del ways["ray"], clocks["ray"]
        else:
            ray_executor.Worker = ReadyMadeWorker  # type: ignore[misc,assignment]
            with RayExecutor(ModelConfig(device="cpu"), num_workers=2) as workers:
                for output in outputs[repeats:]:
                    run("ray", workers, output)
    wall = {way: statistics.median(w for w, _ in times) for way, times in ways.items()}
    processor = {way: statistics.median(p for _, p in times) for way, times in ways.items()}
    for way in ways:
        print(
            f"{way:<7} {number / wall[way]:>9.0f} records a second, "
            f"{number / processor[way]:>9.0f} a second of the driver's processor"
        )
    commits = {
        way: number / statistics.median(clock.seconds for clock in those)
        for way, those in clocks.items()
    }
    for way, rate in commits.items():
        print(f"{way:<7} {rate:>9.0f} a second of it while batches come")
    print(f"a record is {size / number / 1000:.1f} kB, a path {size / number / PATHS:.0f} B")
    result = {
        "overhead": {
            "wall": wall["ours"] / wall["theirs"],
            "processor": processor["ours"] / processor["theirs"],
        },
        "records_per_second": {way: number / seconds for way, seconds in wall.items()},
        "records_per_processor_second": {
            way: number / seconds for way, seconds in processor.items()
        },
        "committed_per_processor_second": commits,
        "records": number,
        "bytes_per_record": size / number,
        "bytes_per_path": size / number / PATHS,
        "repeats": repeats,
        "ours": "run_search fed with ready-made batches of questions",
        "theirs": "each batch appended to one file and synchronised",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": ways,
    }
    common.write_figures(options, result)


if __name__ == "__main__":
    main()
