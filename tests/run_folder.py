"""Writes small, seeded run folders as the stages leave them, and renders reports about them."""

import functools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from drllm import records
from drllm.config import SuperviseConfig
from drllm.paths import full_decisions
from drllm.records.codec import SCHEMA_VERSION
from drllm.records.manifest import new_manifest, write_records
from drllm.records.markdown import NBSP
from drllm.records.results import (
    Evaluation,
    Flops,
    Point,
    Sample,
    SampleOutcome,
    System,
)
from drllm.records.search import Retest, SearchRecord
from drllm.reporting.document import Document, Section, to_markdown
from drllm.reporting.run import read_run
from drllm.reporting.sections import build_document
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.exclusion import DropTest, Limits, TaskTest, Trial
from drllm.statistics.intervals import wilson_interval
from drllm.statistics.paired import mcnemar_exact, paired_interval
from drllm.supervision.select import pick_targets
from search_records import make_path, make_record

PINNED = {
    "drllm_version": "0.0.0",
    "created": "2026-01-02T03:04:05+00:00",
    "libraries": {"torch": "2.0.0", "transformers": "5.0.0"},
}
"""What would otherwise differ between machines and days."""

SETTINGS = {"dataset": "arc_easy", "num_simulations": 30, "seed": 0}

MATERIALS = ("copper", "glass", "wool", "ice", "granite", "rubber", "salt", "tin")
VERBS = ("melts", "dissolves", "conducts", "floats", "expands", "breaks", "stretches", "rusts")


def question_text(number: int) -> str:
    first = MATERIALS[number % 8]
    return f"Which of these is true when {first} {VERBS[number // 8 % 8]} in case {number}?"


BASELINES = ("permuted routes", "last layers")
TEXT_LOSS = {"base": 3.8, "routed": 3.9, "permuted routes": 3.93, "last layers": 4.6}
CHANCE = 0.25
OPTIONS = ("it bends", "it sinks", "it rings", "it glows")

find_interval = functools.cache(paired_interval)


def judge(quantity: Any, mean: float, ends: tuple[float, float], n: int, **fields: Any) -> Verdict:
    """A verdict that shows a difference where the interval excludes 0, unless told otherwise."""
    shown = "none shown"
    if ends[0] > 0 or ends[1] < 0:
        shown = "higher" if mean > 0 else "lower"
    return Verdict(quantity=quantity, mean=mean, interval=ends, n=n, **{"shown": shown, **fields})


def differences(
    ours: str, theirs: str, right: Mapping[str, set[int]], n: int, factor: float
) -> Differences:
    """What one system has more than another; accuracies of permuted routes are means over draws."""
    won = len(right[ours] - right[theirs])
    lost = len(right[theirs] - right[ours])
    ends = find_interval(won, lost, n)
    counts: dict[str, Any] = {"excluded_loss": max(0.0, -ends[0])}
    if "permuted routes" not in (ours, theirs):
        counts |= {"won": won, "lost": lost, "p": mcnemar_exact(won, lost)}
    guessed: dict[str, Any] = {}
    if wilson_interval(len(right["base"]), n)[0] <= CHANCE:
        guessed = {"shown": "guessing", "excluded_loss": None}
    gold = -0.1 * factor
    loss = factor * (TEXT_LOSS[ours] - TEXT_LOSS[theirs])
    return Differences(
        accuracy=judge("accuracy", (won - lost) / n, ends, n, **{**counts, **guessed}),
        gold_logprob=judge("gold_logprob", gold, (gold - 0.2, gold + 0.2), n, **guessed),
        text_loss=judge("text_loss", loss, (loss - 0.05, loss + 0.05), n),
    )


NOT_EXCLUDED = TaskTest(
    task="arc_easy", failures=("a loss of up to 12.0 points is not excluded",), needed=90
)
TESTED = DropTest(
    limits=Limits(max_drop=10.0, max_loss_increase=0.05),
    trials=(
        Trial(name="routed, 10 % saved", tasks=(TaskTest(task="arc_easy"),)),
        Trial(name="routed, 20 % saved", tasks=(NOT_EXCLUDED,)),
    ),
    untested=("routed, 30 % saved",),
)

RUNTIME = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa"}
SECONDS = {"base": (0.1, 0.12, 0.11), "routed": (0.09, 0.12, 0.0902)}
"""What each round of a batch of one row took; decoding half as long, others in proportion."""

WHOLE: dict[str, Any] = {"depths": (0.1, 0.2), "drop_test": TESTED}
"""What an evaluation has that was asked for all that there is."""


class RunFolderWriter:
    """Writes the parts of a run folder; every part can be left out or replaced."""

    def __init__(self, path: Path, num_layers: int, seed: int) -> None:
        self.path = path
        self.num_layers = num_layers
        self.rng = random.Random(seed)
        self.samples: list[Sample] = []
        self.model = {"id": "smollm2-135m", "revision": None, "class": "LlamaForCausalLM"}
        self.model |= {"num_layers": num_layers, "hidden_size": 576}
        self.model |= {"fingerprint": "0123456789abcdef"}

    def header(self, schema: str, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "schema": schema,
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "config": {"seed": 7, "curve": None, **config},
            "inputs": {"routers.safetensors": "5" * 64},
            "routers": "routers",
            "routers_sha256": "5" * 64,
            **PINNED,
        }

    def kl(self, decisions: tuple[int, ...]) -> float:
        """How much edits harm: the first two layers and the last matter most, as in real models."""
        important = (0, 1, self.num_layers - 1)
        harms = ((2.5 if layer in important else 0.25, 0.0, 0.3) for layer in range(len(decisions)))
        return sum(harm[value] for value, harm in zip(decisions, harms, strict=True))

    def edited(self) -> tuple[int, ...]:
        decisions = list(full_decisions(self.num_layers))
        for _ in range(self.rng.choice((1, 1, 2, 3, 4))):
            decisions[self.rng.randrange(self.num_layers)] = self.rng.choice((0, 0, 2))
        return tuple(decisions)

    def search(self, questions: int = 40, simulations: int = 30) -> None:
        self.searched = [self._searched(number, simulations) for number in range(questions)]
        manifest = new_manifest("search", model=self.model, config=SETTINGS, extra=PINNED)
        write_records(self.path / "search.jsonl", self.searched, manifest)

    def _searched(self, number: int, simulations: int) -> SearchRecord:
        ease = self.rng.gauss(0.2, 1.0)
        tried = dict.fromkeys([full_decisions(self.num_layers)])
        tried.update(dict.fromkeys(self.edited() for _ in range(simulations)))
        paths = []
        for decisions in filter(any, tried):
            margin = round(ease - self.kl(decisions) + self.rng.gauss(0, 0.4), 3)
            passed = sum(margin + self.rng.gauss(0, 0.5) > 0 for _ in range(4))
            again = Retest(passed=passed, asked=4, margin=margin - 0.1, survived=passed >= 3)
            retest = again if margin > 0 else None
            paths.append(make_path(decisions, float(margin > 0), margin=margin, retest=retest))
        question = question_text(number)
        return make_record(
            *paths,
            id=f"train-{number}",
            task="arc_easy",
            question=question,
            prompt=f"Question: {question}\nAnswer:",
            answer="it bends",
            seconds=0.25,
        )

    def supervision(self) -> None:
        chosen = pick_targets(self.searched, SuperviseConfig(target="shortest"))
        manifest = new_manifest(
            "supervision",
            model=self.model,
            config=SETTINGS,
            inputs=[self.path / "search.jsonl"],
            extra={**PINNED, "summary": chosen.summary},
        )
        write_records(self.path / "supervision.jsonl", chosen, manifest)

    def routers(self, epochs: int = 25, validation: bool = True) -> None:
        shape = {"num_layers": self.num_layers, "hidden_size": 576, "num_windows": 8}
        base = {"base_model": "smollm2-135m", "base_fingerprint": self.model["fingerprint"]}
        self.write("routers/router_config.json", {**shape, **base, "training": {}})
        parts = {"train": 40, "validation": 12} if validation else {"train": 40}
        lines = []
        for epoch in range(1, epochs + 1):
            for part in parts:
                learned = (1 - math.exp(-epoch / 6)) * (1.0 if part == "train" else 0.55)
                scores = {"macro_f1": 0.33 + 0.3 * learned, "accuracy": 0.75 + 0.1 * learned}
                loss = 0.1 - 0.08 * learned
                line = {"epoch": epoch, "split": part, "routers_loss": loss, **scores}
                lines.append(json.dumps(line) + "\n")
        self.text("routers/metrics.jsonl", "".join(lines))
        self.layers(parts, epochs)

    def layers(self, parts: dict[str, int], epoch: int) -> None:
        """Write the confusions of the saved routers, which hit three labels in four."""
        found: dict[str, Any] = {"schema": "drllm.layers", "schema_version": 1, "epoch": epoch}
        for part, size in parts.items():
            rng = random.Random(f"{part} {self.num_layers}")
            confusion = [[[0, 0, 0] for _ in range(3)] for _ in range(self.num_layers)]
            for layer in confusion:
                for label in rng.choices((0, 1, 2), (0.2, 0.75, 0.05), k=size):
                    layer[label][label if rng.random() < 0.75 else 1] += 1
            spent = sum(row[1] + 2 * row[2] for layer in confusion for row in layer)
            about = {"examples": size, "executions": spent, "loss": 0.5}
            found[part] = {**about, "confusion": confusion}
        self.write("routers/layers.json", found)

    def evaluation(
        self,
        task: str = "arc_easy",
        questions: int = 60,
        accuracies: tuple[float, float, float] = (0.55, 0.5, 0.49),
        question: Callable[[int], str] = question_text,
        depths: tuple[float, ...] = (),
        drop_test: DropTest | None = None,
    ) -> None:
        """Write a result whose accuracies are exactly the given shares of right answers.

        With `depths`, routed and its baselines at these shares saved are there too.
        """
        shares = zip(("base", "routed", "permuted routes"), accuracies, strict=True)
        right = {name: self._right(share, questions) for name, share in shares}
        right["last layers"] = self._right(0.5 * accuracies[1], questions)
        deeper = [f"{n}, {100 * d:g} % saved" for d in depths for n in right if n != "base"]
        samples: list[Sample] = []
        for number in range(questions):
            route = tuple(
                0 if self.rng.random() < share else 2 if self.rng.random() < 0.02 else 1
                for share in self._habits()
            )
            routes = {"base": full_decisions(self.num_layers), "routed": route}
            outcomes = {
                name: SampleOutcome(
                    correct=float(is_right := number in right[name.split(",")[0]]),
                    gold_logprob=-1.2,
                    decisions=routes.get(name),
                    answer=(number + (not is_right)) % 4 if name in routes else None,
                )
                for name in [*right, *deeper]
            }
            about = {"id": f"{task}-{number}", "task": task, "question": question(number)}
            samples.append(Sample(**about, choices=OPTIONS, gold=number % 4, systems=outcomes))
        mean = sum(sum(each.systems["routed"].decisions or ()) for each in samples) / questions
        judged = functools.partial(self._judged, right, questions)
        systems = [
            self._system(name, mean if name != "base" else float(self.num_layers), judged(name))
            for name in right
        ]
        curve = [
            Point(
                system=name,
                setting=f"{100 * share:g} % saved" if share else "",
                executions=(1 - share) * self.num_layers,
                **judged(name, 1 + 5 * share),
            )
            for name in right
            for share in ((0.0,) if name == "base" else depths)
            if depths
        ]
        config = {"tasks": task, "curve": "0.1,0.2" if depths else None}
        about = {"task": task, "split": "test", "kind": "choices", "metric": "acc"}
        about |= {"num_questions": questions, "num_layers": self.num_layers, "num_fewshot": 0}
        result = Evaluation(
            **self.header("drllm.evaluation", config),
            **about,
            chance=CHANCE,
            runtime=RUNTIME,
            systems=tuple(systems),
            curve=tuple(curve),
            drop_test=drop_test,
            findings=("Accuracy is as high; layers are saved.", "Findings follow."),
        )
        self.write(f"eval/{task}.json", msgspec.to_builtins(result))
        self.samples += samples
        lines = b"\n".join(map(msgspec.json.encode, self.samples))
        self.text("eval/samples.jsonl", lines.decode() + "\n")

    def static_paths(self, *, findings: tuple[str, ...] = ("A path saves layers too.",)) -> None:
        """Put three static paths beside the routed model."""
        layers = range(self.num_layers)
        paths = {f"skip{n}": [*layers[:1], *layers[1 + n :]] for n in (1, 2, 3)}

        def apply(values: dict[str, Any]) -> None:
            _, routed, *_ = values["systems"]
            for name, path in paths.items():
                own = {"name": name, "executions": len(path), "reads_question": False}
                against = {"routed_against": routed["against_base"]}
                values["systems"].append({**routed, **own, **against})
                values["paths"][name] = path
            values["findings"][1:1] = findings

        self.change("eval/arc_easy.json", apply)

    def latency(self) -> None:
        """Write the times of base and routed, as an evaluation measures them."""
        timings = [
            records.latency.Timing(
                system=name,
                phase=phase,
                batch_size=size,
                num_tokens=size * tokens,
                executions=self.num_layers - (0.5 if name == "routed" else 0.0),
                seconds=tuple(size * factor * each for each in seconds),
            )
            for phase, tokens, factor in (("prefill", 16, 1.0), ("decode", 2, 0.5))
            for size in (1, 4, 16)
            for name, seconds in SECONDS.items()
        ]
        found = records.latency.Latency(
            **self.header("drllm.latency", {"tasks": "arc_easy"}),
            runtime={**RUNTIME, "num_threads": 2},
            machine="Linux x86_64, Processor 9000, 2 cores",
            num_prompts=16,
            systems={name: f"what {name} is" for name in SECONDS},
            measured=records.latency.Timings(
                prompt_tokens=16, new_tokens=2, timings=tuple(timings)
            ),
        )
        self.write("eval/latency.json", msgspec.to_builtins(found))

    def _judged(
        self, right: dict[str, set[int]], n: int, name: str, factor: float = 1.0
    ) -> dict[str, Any]:
        """Return what a system and a point have in common."""
        base, routed = (
            differences(*pair, right, n, factor) for pair in ((name, "base"), ("routed", name))
        )
        return {
            "accuracy": len(right[name]) / n,
            "interval": wilson_interval(len(right[name]), n),
            "gold_logprob": -1.2,
            "text_loss": TEXT_LOSS[name],
            "against_base": None if name == "base" else base,
            "routed_against": routed if name in BASELINES else None,
        }

    def _system(self, name: str, spent: float, judged: dict[str, Any]) -> System:
        baseline, permuted = name in BASELINES, name == "permuted routes"
        return System(
            name=name,
            description=f"what {name} means",
            source=f"the paper of {name}" if baseline else None,
            fitted_on="nothing" if baseline else None,
            reads_question=False if baseline else None,
            metrics={"acc": judged["accuracy"], "acc_norm": judged["accuracy"] / 2},
            prompt_flops=Flops(weights=1.5e9 * spent, attention=2e7 * spent),
            kv_bytes_per_token=768 * spent,
            executions=spent,
            seconds=12.34,
            draws=10 if permuted else 1,
            unchanged_routes=0.02 if permuted else None,
            **judged,
        )

    def _habits(self) -> list[float]:
        half, last = self.num_layers / 2, self.num_layers - 1
        return [
            0.01
            if layer in (0, 1, last)
            else 0.02 + 0.3 * (layer > half) / (1 + abs(layer - 0.7 * self.num_layers))
            for layer in range(self.num_layers)
        ]

    def _right(self, share: float, questions: int) -> set[int]:
        return set(self.rng.sample(range(questions), round(share * questions)))

    def everything(self, **evaluation: Any) -> Path:
        self.text("run.yaml", "model: smollm2-135m\nseed: 0\n")
        self.search()
        self.supervision()
        self.routers()
        self.evaluation(**evaluation)
        self.latency()
        return self.path

    def change(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change what a JSON file holds."""
        values = json.loads((self.path / name).read_text(encoding="utf-8"))
        change(values)
        self.write(name, values)

    def write(self, name: str, values: Any) -> Path:
        return self.text(name, json.dumps(values))

    def text(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def report_text(*folders: Path) -> str:
    """Return the Markdown about some folders, with plain spaces; nothing is drawn."""
    document = build_document([read_run(folder) for folder in folders])
    return to_markdown(document, "figures").replace(NBSP, " ")


def section_text(sections: Sequence[Section], title: str = "") -> str:
    """Return the Markdown below the heading of one of these sections, the first without a title."""
    title = title or sections[0].title
    text = to_markdown(Document("", "", [], sections), "figures").replace(NBSP, " ")
    return text.split(f"## {title}\n")[1].split("\n## ")[0].strip()


def table_rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the first table whose header begins so, the header first."""
    rows = text.split(f"\n| {header}", 1)[1].split("\n\n", 1)[0]
    cells = [line.strip("| ").split(" | ") for line in f"{header}{rows}".splitlines()]
    return [cells[0], *cells[2:]]


def add_paths(evaluation: Evaluation, number: int, *, routed: bool = True) -> Evaluation:
    """Add static paths to a result, from the fewest layers to the most, or put them in its place.

    The path `skip1` is the most accurate of them.
    """
    paths = []
    for skipped in range(number, 0, -1):
        accuracy = 0.6 - 0.3 * skipped / number
        path = replace(
            evaluation.systems[1],
            name=f"skip{skipped}",
            executions=12.0 - skipped,
            accuracy=accuracy,
            interval=(accuracy - 0.05, accuracy + 0.05),
        )
        paths.append(path)
    systems = (*(evaluation.systems if routed else evaluation.systems[:1]), *paths)
    steps = {path.name: (0,) for path in paths}
    return replace(evaluation, systems=systems, paths=steps, curve=())
