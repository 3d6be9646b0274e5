"""A run folder as the stages leave it, small, seeded, and with numbers that hang together."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
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
from drllm.reporting import write_report
from drllm.reporting.run import Run, read_run
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
    def damage(self, decisions: tuple[int, ...]) -> float:
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
            margin = round(ease - self.damage(decisions) + self.rng.gauss(0, 0.4), 3)
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
                "training": {},
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

    def evaluation(
        self,
        task: str = "arc_easy",
        questions: int = 60,
        accuracies: tuple[float, float, float] = (0.55, 0.5, 0.49),
        p: float | str | None = "exact",
        changes: dict[str, Any] | None = None,
        question: Callable[[int], str] = question_text,
    ) -> None:
        """Write a result whose accuracies are exactly the given shares of right answers."""
        right = {
            name: self._right(share, questions)
            for name, share in zip(("base", "routed", "permuted routes"), accuracies, strict=True)
        }
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
        ]
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
            "config": {"seed": 7},
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
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / questions)
        return {
            "name": name,
            "description": f"what {name} means",
            "accuracy": accuracy,
            "interval": [max(0.0, accuracy - half), min(1.0, accuracy + half)],
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

    def everything(self, **evaluation: Any) -> Path:
        self.text("run.yaml", "model: smollm2-135m\nseed: 0\n")
        self.search()
        self.supervision()
        self.routers()
        self.evaluation(**evaluation)
        return self.path

    def write(self, name: str, values: Any) -> Path:
        return self.text(name, json.dumps(values))

    def text(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


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
    return read_run(Folder(path, 12, 3).everything())


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the HTML and the Markdown of one report, for tests that only look at it."""
    path = tmp_path_factory.mktemp("whole") / "run"
    path.mkdir()
    html, md = write_report([Folder(path, 30, 1).everything()])
    return html.read_text(encoding="utf-8"), md.read_text(encoding="utf-8")
