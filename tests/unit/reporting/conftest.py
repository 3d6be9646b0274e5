"""A run folder as the stages leave it, small, seeded, and with numbers that hang together."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SuperviseConfig
from drllm.cost import executions
from drllm.paths import full_decisions
from drllm.records import (
    Retest,
    SearchRecord,
    TriedPath,
    new_manifest,
    write_records,
)
from drllm.reporting import markdown, write_report
from drllm.reporting.run import Run, read_run
from drllm.reporting.sections import document
from drllm.supervision import targets

PINNED = {
    "drllm_version": "0.0.0",
    "created": "2026-01-02T03:04:05+00:00",
    "libraries": {"torch": "2.0.0", "transformers": "5.0.0"},
}
"""What would otherwise differ between machines and days."""

SETTINGS = {"num_simulations": 30, "seed": 0}

MATERIALS = ("copper", "glass", "wool", "ice", "granite", "rubber", "salt", "tin")
VERBS = ("melts", "dissolves", "conducts", "floats", "expands", "breaks", "stretches", "rusts")


def question_text(number: int) -> str:
    first = MATERIALS[number % 8]
    return f"Which of these is true when {first} {VERBS[number // 8 % 8]} in case {number}?"


def mcnemar(won: int, lost: int) -> float:
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


BASELINES = ("permuted routes", "last layers")
TEXT_LOSS = {"base": 3.8, "routed": 3.9, "permuted routes": 3.93, "last layers": 4.6}


def interval(accuracy: float, questions: int) -> list[float]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / questions)
    return [max(0.0, accuracy - half), min(1.0, accuracy + half)]


def spread(rounds: Sequence[float]) -> dict[str, float]:
    """What is written of a comparison round by round."""
    return {"median": statistics.median(rounds), "lowest": min(rounds), "highest": max(rounds)}


def differences(
    ours: str, theirs: str, right: dict[str, set[int]], questions: int, factor: float = 1.0
) -> dict[str, Any]:
    """What one system has more than another, as an evaluation writes it."""
    won, lost = len(right[ours] - right[theirs]), len(right[theirs] - right[ours])
    mean = (won - lost) / questions
    half = 1.96 * math.sqrt(won + lost) / questions
    more = "higher" if won > lost else "lower"
    loss = factor * (TEXT_LOSS[ours] - TEXT_LOSS[theirs])
    return {
        "accuracy": {
            "mean": mean,
            "interval": [mean - half, mean + half],
            "shown": more if mcnemar(won, lost) < 0.05 else None,
        },
        "gold_logprob": {"mean": -0.1 * factor, "interval": [-0.3, 0.1], "shown": None},
        "text_loss": {
            "mean": loss,
            "interval": [loss - 0.05, loss + 0.05],
            "shown": "higher" if loss > 0.05 else "lower" if loss < -0.05 else None,
        },
    }


def trial(name: str, failures: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A setting tested for a certified choice."""
    return {
        "name": name,
        "executions": 5.4,
        "num_questions": 60,
        "won": 2,
        "lost": 3,
        "greatest_loss": 8.25,
        "num_texts": 40,
        "loss_increase": 0.02,
        "greatest_increase": 0.04,
        "failures": list(failures),
        **changes,
    }


def choice(
    trials: Sequence[dict[str, Any]], confirmation: dict[str, Any] | None, **changes: Any
) -> dict[str, Any]:
    """A certified choice as an evaluation writes it."""
    return {
        "limits": {"epsilon": 10.0, "max_loss_increase": 0.05, "confidence": 0.95},
        "trials": list(trials),
        "confirmation": confirmation,
        "obstacle": None,
        "sentences": ["60 questions can certify a loss below 5.00 points at best.", "So it is."],
        **changes,
    }


FAILED = "next-token loss up to 0.080 nats a token higher is not excluded"
TRIED = (trial("routed, 10 % saved"), trial("routed, 20 % saved", (FAILED,), executions=4.8))
CERTIFIED = choice(TRIED, trial("routed, 10 % saved", won=4, lost=4))
CHOICES = {
    "certified": CERTIFIED,
    "the first fails": choice(TRIED[1:], None),
    "fails on other questions": choice(TRIED, trial("routed, 10 % saved", (FAILED,))),
    "not tested on others": choice(TRIED, None),
    "nothing to try": choice((), None, obstacle="Less than 10 points is too little at n = 60"),
}
"""Every way that a certified choice can end."""

RUNTIME = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa"}
SECONDS = {
    "base": (0.1, 0.12, 0.11),
    "routed": (0.09, 0.12, 0.0902),
    "attached": (0.101, 0.121, 0.111),
    "routers that execute": (0.104, 0.123, 0.116),
}
"""What each round of a batch of one row took; decoding half as long, others in proportion."""

WHOLE: dict[str, Any] = {"depths": (0.1, 0.2), "choice": CERTIFIED}
"""What an evaluation has that was asked for all that there is."""


class Folder:
    """Writes the parts of a run folder; every part can be left out or replaced."""

    def __init__(self, path: Path, num_layers: int, seed: int) -> None:
        self.path = path
        self.num_layers = num_layers
        self.rng = random.Random(seed)
        self.model = {
            "id": "smollm2-135m",
            "revision": None,
            "class": "LlamaForCausalLM",
            "num_layers": num_layers,
            "hidden_size": 576,
            "fingerprint": "0123456789abcdef",
        }

    # How much a layer matters: the first two and the last most, as in real models.
    def kl(self, decisions: tuple[int, ...]) -> float:
        total = 0.0
        for layer, value in enumerate(decisions):
            important = layer < 2 or layer == self.num_layers - 1
            total += {0: 2.5 if important else 0.25, 1: 0.0, 2: 0.3}[value]
        return total

    def edited(self) -> tuple[int, ...]:
        decisions = list(full_decisions(self.num_layers))
        for _ in range(self.rng.choice((1, 1, 2, 3, 4))):
            decisions[self.rng.randrange(self.num_layers)] = self.rng.choice((0, 0, 2))
        return tuple(decisions)

    def search(self, questions: int = 40, simulations: int = 30) -> None:
        records = [self._searched(number, simulations) for number in range(questions)]
        self.searched = records
        manifest = new_manifest("search", model=self.model, config=SETTINGS, extra=PINNED)
        write_records(self.path / "search.jsonl", records, manifest)

    def _searched(self, number: int, simulations: int) -> SearchRecord:
        ease = self.rng.gauss(0.2, 1.0)
        tried = dict.fromkeys([full_decisions(self.num_layers)])
        tried.update(dict.fromkeys(self.edited() for _ in range(simulations)))
        paths = []
        for simulation, decisions in enumerate(d for d in tried if any(d)):
            margin = round(ease - self.kl(decisions) + self.rng.gauss(0, 0.4), 3)
            passed = sum(margin + self.rng.gauss(0, 0.5) > 0 for _ in range(4))
            paths.append(
                TriedPath(
                    decisions=decisions,
                    simulation=simulation,
                    reward=float(margin > 0),
                    margin=margin,
                    executions=executions(decisions),
                    retest=Retest(passed=passed, asked=4, margin=margin - 0.1, survived=passed >= 3)
                    if margin > 0
                    else None,
                )
            )
        return SearchRecord(
            id=f"train-{number}",
            task="arc_easy",
            question=question_text(number),
            prompt=f"Question: {question_text(number)}\nAnswer:",
            answer="it bends",
            reward="loglikelihood",
            num_layers=self.num_layers,
            paths=tuple(paths),
            seconds=0.25,
        )

    def supervision(self) -> None:
        chosen = targets(self.searched, SuperviseConfig())
        manifest = new_manifest(
            "supervision",
            model=self.model,
            config=SETTINGS,
            inputs=[self.path / "search.jsonl"],
            extra={**PINNED, "summary": chosen.summary},
        )
        write_records(self.path / "supervision.jsonl", chosen.records, manifest)

    def routers(self, epochs: int = 25, validation: bool = True) -> None:
        self.write(
            "routers/router_config.json",
            {
                "format_version": 1,
                "num_layers": self.num_layers,
                "hidden_size": 576,
                "num_windows": 8,
                "router_width": 128,
                "base_model": "smollm2-135m",
                "base_revision": None,
                "base_class": "LlamaForCausalLM",
                "base_fingerprint": self.model["fingerprint"],
                "label_counts": [[1, 8, 1]] * self.num_layers,
                "training": {"calibration": self.calibration()} if validation else {},
            },
        )
        lines = []
        for epoch in range(1, epochs + 1):
            learnt = 1 - math.exp(-epoch / 6)
            for split in ("train", "validation") if validation else ("train",):
                held = 0.55 if split == "validation" else 1.0
                line: dict[str, Any] = {
                    "epoch": epoch,
                    "split": split,
                    "routers_loss": 0.09 * math.exp(-epoch / 8) + (0.03 if held < 1 else 0.01),
                    "accuracy": 0.75 + 0.1 * learnt * held,
                    "macro_f1": 0.33 + 0.3 * learnt * held,
                    "f1_skip": 0.6 * learnt * held,
                    "f1_execute": 0.93 + 0.03 * learnt * held,
                    "f1_repeat": None if epoch < 3 else 0.25 * learnt * held,
                    "acc_skip": 0.5 * learnt * held,
                    "acc_repeat": 0.2 * learnt * held,
                    "avg_layers": self.num_layers * (1 - 0.08 * learnt),
                }
                if split == "train":
                    line["learning_rate"] = 1e-3 * (1 - epoch / (epochs + 1))
                lines.append(json.dumps(line))
        self.text("routers/metrics.jsonl", "\n".join(lines) + "\n")
        parts = {"train": 40, "validation": 12} if validation else {"train": 40}
        self.layers({part: self._confusions(part, size) for part, size in parts.items()}, epochs)

    def calibration(self) -> dict[str, Any]:
        """Return what is told of routers that are too sure."""
        sure = [0.5 + 0.03 * number for number in range(15)]
        bins = [{"decisions": 10, "confidence": c, "hits": c - 0.05} for c in sure]
        mended = [{"decisions": 10, "confidence": c - 0.04, "hits": c - 0.05} for c in sure]
        return {
            "temperature": 1.25,
            "num_decisions": 150,
            "nll_before": 0.5,
            "nll_after": 0.45,
            "reliability_before": bins,
            "reliability_after": mended,
            "ece_before": 0.05,
            "ece_after": 0.01,
            "bins": 15,
        }

    def layers(self, parts: dict[str, list[list[list[int]]]], epoch: int) -> None:
        """Write the confusions of the saved routers."""
        told = {
            part: {
                "examples": sum(map(sum, confusions[0])),
                "executions": sum(row[1] + 2 * row[2] for layer in confusions for row in layer),
                "loss": 0.5,
                "confusion": confusions,
            }
            for part, confusions in parts.items()
        }
        about = {"schema": "drllm.layers", "schema_version": 1, "epoch": epoch}
        self.write("routers/layers.json", about | told)

    def _confusions(self, part: str, size: int) -> list[list[list[int]]]:
        """Labels by layer as the targets', of which the routers hit three in four."""
        rng = random.Random(f"{part} {self.num_layers}")
        found = []
        for _ in range(self.num_layers):
            layer = [[0, 0, 0] for _ in range(3)]
            for label in rng.choices((0, 1, 2), (0.2, 0.75, 0.05), k=size):
                layer[label][label if rng.random() < 0.75 else 1] += 1
            found.append(layer)
        return found

    def evaluation(
        self,
        task: str = "arc_easy",
        questions: int = 60,
        accuracies: tuple[float, float, float] = (0.55, 0.5, 0.49),
        p: float | str | None = "exact",
        changes: dict[str, Any] | None = None,
        question: Callable[[int], str] = question_text,
        depths: tuple[float, ...] = (),
        choice: dict[str, Any] | None = None,
    ) -> None:
        """Write a result whose accuracies are exactly the given shares of right answers.

        With `depths`, routed and its baselines at these shares saved are there too.
        """
        right = {
            name: self._right(share, questions)
            for name, share in zip(("base", "routed", "permuted routes"), accuracies, strict=True)
        }
        right["last layers"] = self._right(0.5 * accuracies[1], questions)
        samples = []
        for number in range(questions):
            route = [
                0 if self.rng.random() < share else 2 if self.rng.random() < 0.02 else 1
                for share in self._habits()
            ]
            systems: dict[str, Any] = {
                name: {"correct": float(number in chosen), "gold_logprob": -1.2}
                for name, chosen in right.items()
            }
            systems["base"]["decisions"] = [1] * self.num_layers
            systems["routed"]["decisions"] = route
            for share in depths:
                for name in ("routed", "permuted routes", "last layers"):
                    point = f"{name}, {100 * share:g} % saved"
                    systems[point] = {"correct": float(number in right[name])}
            samples.append(
                {
                    "id": f"{task}-{number}",
                    "task": task,
                    "question": question(number),
                    "choices": ["it bends", "it sinks", "it rings", "it glows"],
                    "gold": number % 4,
                    "systems": systems,
                }
            )
        spent = [sum(s["systems"]["routed"]["decisions"]) for s in samples]
        mean = sum(spent) / questions
        won = len(right["routed"] - right["base"])
        lost = len(right["base"] - right["routed"])
        if p == "exact":
            p = mcnemar(won, lost)
        rows = [
            self._system("base", right, questions, float(self.num_layers), None, None, None),
            self._system("routed", right, questions, mean, p, won, lost),
            self._system("permuted routes", right, questions, mean, None, None, None),
            self._system("last layers", right, questions, mean, 0.001, 2, 20),
        ]
        curve = [self._point("base", 0.0, right, questions, rows)] if depths else []
        for name in ("routed", "permuted routes", "last layers") if depths else ():
            curve += [self._point(name, share, right, questions, rows) for share in depths]
        result = {
            "schema": "drllm.evaluation",
            "schema_version": 1,
            "task": task,
            "split": "test",
            "num_questions": questions,
            "num_layers": self.num_layers,
            "chance": 0.25,
            "model": self.model,
            "routers": "routers",
            "config": {"tasks": task, "seed": 7, "curve": "0.1,0.2" if depths else None},
            "inputs": {"routers.safetensors": "5" * 64},
            "runtime": RUNTIME,
            "kind": "choices",
            "metric": "acc",
            "num_fewshot": 0,
            "curve": curve,
            "choice": choice,
            "not_compared": {"LayerSkip": "needs weights of its own"},
            "systems": rows,
            "findings": ["No difference between routed and base is shown."],
            **PINNED,
            **(changes or {}),
        }
        self.write(f"eval/{task}.json", result)
        self.samples = [*getattr(self, "samples", []), *samples]
        self.text(
            "eval/samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in self.samples)
        )

    def latency(self, **changes: Any) -> None:
        """Write the times of base and routed, as an evaluation measures them."""
        timings, ratios, routers = [], [], []
        for phase, size in itertools.product(("prefill", "decode"), (1, 4, 16)):
            factor = size * (1.0 if phase == "prefill" else 0.5)
            times = {name: [factor * each for each in given] for name, given in SECONDS.items()}
            num_tokens = size * (16 if phase == "prefill" else 2)
            for name, seconds in times.items():
                executions = self.num_layers - (0.5 if name == "routed" else 0.0)
                median = statistics.median(seconds)
                timings.append(
                    {
                        "system": name,
                        "phase": phase,
                        "batch_size": size,
                        "num_tokens": num_tokens,
                        "executions": executions,
                        "seconds": seconds,
                        "median": median,
                        "tokens_per_second": num_tokens / median,
                    }
                )
            pairs = zip(times["routed"], times["base"], strict=True)
            ratios.append({"phase": phase, "batch_size": size, **spread([a / b for a, b in pairs])})
            if phase == "prefill":
                more = zip(times["routers that execute"], times["attached"], strict=True)
                routers.append({"batch_size": size, **spread([a - b for a, b in more])})
        values = {
            "schema": "drllm.latency",
            "schema_version": 1,
            "model": self.model,
            "config": {"tasks": "arc_easy", "seed": 7, "curve": None},
            "inputs": {"routers.safetensors": "5" * 64},
            "runtime": {**RUNTIME, "num_threads": 2},
            "machine": "Linux x86_64, Processor 9000, 2 cores",
            "num_prompts": 16,
            "prompt_tokens": 16,
            "new_tokens": 2,
            "systems": {name: f"what {name} is" for name in SECONDS},
            "timings": timings,
            "routed_to_base": ratios,
            "router_seconds": routers,
            **PINNED,
            **changes,
        }
        self.write("eval/latency.json", values)

    def _habits(self) -> list[float]:
        middle = self.num_layers / 2
        return [
            0.01
            if layer < 2 or layer == self.num_layers - 1
            else 0.02 + 0.3 * (layer > middle) / (1 + abs(layer - 0.7 * self.num_layers))
            for layer in range(self.num_layers)
        ]

    def _right(self, share: float, questions: int) -> set[int]:
        return set(self.rng.sample(range(questions), round(share * questions)))

    def _system(
        self,
        name: str,
        right: dict[str, set[int]],
        questions: int,
        mean: float,
        p: float | str | None,
        won: int | None,
        lost: int | None,
    ) -> dict[str, Any]:
        accuracy = len(right[name]) / questions
        baseline = name in BASELINES
        return {
            "name": name,
            "description": f"what {name} means",
            "source": f"the paper of {name}" if baseline else None,
            "fitted_on": "nothing" if baseline else None,
            "reads_question": False if baseline else None,
            "accuracy": accuracy,
            "interval": interval(accuracy, questions),
            "metrics": {"acc": accuracy, "acc_norm": accuracy / 2},
            "decode_executions": None,
            "prompt_flops": {"weights": 1.5e9 * mean, "attention": 2e7 * mean},
            "kv_bytes_per_token": 768 * mean,
            "text_loss": TEXT_LOSS[name],
            "against_base": None if name == "base" else differences(name, "base", right, questions),
            "routed_against": differences("routed", name, right, questions) if baseline else None,
            "executions": mean,
            "gold_logprob": -1.2,
            "seconds": 12.34,
            "draws": 10 if name == "permuted routes" else 1,
            "mcnemar_p": p,
            "mcnemar_p_holm": None,
            "won": won,
            "lost": lost,
            "unchanged_routes": 0.02 if name == "permuted routes" else None,
        }

    def _point(
        self,
        name: str,
        share: float,
        right: dict[str, set[int]],
        questions: int,
        rows: list[dict[str, Any]],
    ) -> dict[str, Any]:
        row = next(row for row in rows if row["name"] == name)
        return {
            "system": name,
            "setting": f"{100 * share:g} % saved" if share else "",
            "executions": (1 - share) * self.num_layers,
            "saved": share,
            **{key: row[key] for key in ("accuracy", "interval", "gold_logprob", "text_loss")},
            "against_base": None
            if name == "base"
            else differences(name, "base", right, questions, 1 + 5 * share),
            "routed_against": differences("routed", name, right, questions, 1 + 5 * share)
            if name in BASELINES
            else None,
        }

    def everything(self, **evaluation: Any) -> Path:
        self.text("run.yaml", "model: smollm2-135m\nseed: 0\n")
        self.search()
        self.supervision()
        self.routers()
        self.evaluation(**evaluation)
        self.latency()
        return self.path

    def write(self, name: str, values: Any) -> Path:
        return self.text(name, json.dumps(values))

    def text(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def whole() -> dict[str, Any]:
    """What to give `Folder.evaluation` for a curve and a choice."""
    return WHOLE


@pytest.fixture(scope="session")
def choices() -> dict[str, dict[str, Any]]:
    """Certified choices as a file holds them, by how they ended."""
    return CHOICES


@pytest.fixture(scope="session")
def text_of() -> Callable[..., str]:
    """A function that returns the Markdown about some folders, which takes no drawing."""

    def render(*folders: Path) -> str:
        return markdown.render(document([read_run(folder) for folder in folders]), "figures")

    return render


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Folder]:
    """Return a maker of run folders: `make_folder(name="run", num_layers=4, seed=0)`."""

    def make(name: str = "run", num_layers: int = 4, seed: int = 0) -> Folder:
        path = tmp_path / name
        path.mkdir()
        return Folder(path, num_layers, seed)

    return make


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return one run as read, of 12 layers."""
    path = tmp_path_factory.mktemp("read") / "run"
    path.mkdir()
    return read_run(Folder(path, 12, 3).everything(depths=(0.1, 0.2), choice=CERTIFIED))


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of one report with everything, of a model of 30 layers."""
    path = tmp_path_factory.mktemp("whole") / "run"
    path.mkdir()
    html, _ = write_report([Folder(path, 30, 1).everything(**WHOLE)])
    return html


@pytest.fixture(scope="session")
def report(page: Path) -> tuple[str, str]:
    """Return the HTML and the Markdown of that report, for tests that only look at it."""
    beside = page.with_suffix(".md")
    return page.read_text(encoding="utf-8"), beside.read_text(encoding="utf-8")
