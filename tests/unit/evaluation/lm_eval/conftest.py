"""Published sets in small: rows of the hub's schema and of data folders, all of them invented.

And the way from a task folder of ours to requests.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NUM_QUESTIONS = 32
AWKWARD = 'Why {{x}} and {y}? "<b>" it\'s é\n '
"""What templates, quotes and white space could trip over; a part of every question."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class PublishedSet:
    """A set in small.

    Attributes:
        hub: (repository, configuration, split) → rows.
        folder: Place below a data folder → rows of the same questions.
        file: The harness' task file, with `{part}` for sets in parts.
    """

    hub: dict[tuple[str, str | None, str], Rows]
    folder: dict[str, Rows] = field(default_factory=dict)
    file: str = ""


def _rows(make: Callable[[int], dict[str, Any]], count: int = NUM_QUESTIONS) -> Rows:
    return [make(place) for place in range(count)]


def _labelled(name: str, labels: Sequence[str]) -> Rows:
    return _rows(
        lambda n: {
            "id": f"{name}-{n}",
            "question": f"{name} {n}: {AWKWARD}",
            "question_concept": "a concept",
            "choices": {
                "text": [f"option {{{n}}} {label}" for label in labels],
                "label": list(labels),
            },
            "answerKey": labels[n % len(labels)],
        }
    )


def _mmlu(name: str, count: int) -> Rows:
    return _rows(
        lambda n: {
            "question": f"{name} {n}: {AWKWARD}",
            "subject": ("anatomy", "high_school_us_history")[n % 2],
            "choices": [f"{n}{letter}" for letter in "wxyz"],
            "answer": n % 4,
        },
        count,
    )


def _hellaswag(name: str) -> Rows:
    return _rows(
        lambda n: {
            "ind": n,
            "activity_label": "How to rest",
            "ctx_a": f"[header] {name} {n} [title] Find {{a}} seat.  Sit down.",
            "ctx_b": ("they close", "")[n % 2],
            "endings": [f" their {part} [step] now. " for part in ("eyes", "ears", "book", "bag")],
            "label": str(n % 4),
        }
    )


def _hellaswag_clean(name: str) -> Rows:
    """The rows above as a data folder has them, cleaned by hand."""
    return _rows(
        lambda n: {
            "ind": n,
            "query": f"How to rest: {name} {n}. Find {{a}} seat. Sit down."
            + (" They close", "")[n % 2],
            "choices": [f"their {part} now." for part in ("eyes", "ears", "book", "bag")],
            "label": n % 4,
        }
    )


def _squad(name: str) -> Rows:
    return _rows(
        lambda n: {
            "id": f"{name}-{n}",
            "title": "Mills",
            "context": f" The mill of {name} {n} stands by {{the}} Green River. ",
            "question": f"{name} {n}: {AWKWARD}",
            "answers": {
                "text": [] if n % 3 == 0 else ["by the river", "the Green River"],
                "answer_start": [] if n % 3 == 0 else [3, 6],
            },
        }
    )


def _gsm8k(name: str) -> Rows:
    return _rows(
        lambda n: {
            "question": f"{name} {n}: {AWKWARD}",
            "answer": f"It is {n} + 1 = <<{n}+1={n + 1}>>.\n#### {n + 1}",
        }
    )


def _piqa(name: str) -> Rows:
    return _rows(
        lambda n: {
            "goal": f"{name} {n}: {AWKWARD}",
            "sol1": f"Put {{a}} cosy on {n}.",
            "sol2": f"Add ice to {n}.",
            "label": n % 2,
        }
    )


WINOGRANDE = _rows(
    lambda n: {
        "sentence": f"Ann {{lent}} Eve {n} pens since _ had {n + 1} to spare. ",
        "option1": "Ann",
        "option2": "Eve",
        "answer": str(1 + n % 2),
    }
)


def _set(hub: str, file: str, folder: str, **rows: Rows) -> PublishedSet:
    """A set in one repository (`REPOSITORY:CONFIGURATION`), with the same rows in a data folder."""
    repository, _, config = hub.partition(":")
    return PublishedSet(
        hub={(repository, config or None, split): values for split, values in rows.items()},
        folder={f"{folder}/{split}": values for split, values in rows.items()},
        file=file,
    )


def _both(make: Callable[[str], Rows]) -> dict[str, Rows]:
    return {split: make(split) for split in ("train", "validation")}


def _arc(name: str, config: str) -> PublishedSet:
    rows = {
        "train": _labelled(f"{name} train", "ABCD"),
        "validation": _labelled(f"{name} test", "123"),
    }
    return _set(f"allenai/ai2_arc:{config}", f"arc/{name}.yaml", name, **rows)


CSQA = _both(lambda split: _labelled(f"csqa {split}", "ABCDE"))
MMLU = {"dev": _mmlu("dev", 10), "validation": _mmlu("validation", NUM_QUESTIONS)}
GSM8K = {split: _gsm8k(split) for split in ("train", "test")}

SETS: dict[str, PublishedSet] = {
    "arc_easy": _arc("arc_easy", "ARC-Easy"),
    "arc_challenge": _arc("arc_challenge", "ARC-Challenge"),
    "commonsense_qa": _set(
        "tau/commonsense_qa", "commonsense_qa/default.yaml", "commonsense_qa", **CSQA
    ),
    "commonsense_qa_cloze": _set(
        "tau/commonsense_qa", "arc/arc_easy.yaml", "commonsense_qa", **CSQA
    ),
    "gsm8k": _set("openai/gsm8k:main", "gsm8k/gsm8k.yaml", "gsm8k", **GSM8K),
    "hellaswag": PublishedSet(
        hub={("Rowan/hellaswag", None, s): rows for s, rows in _both(_hellaswag).items()},
        folder={f"hellaswag/{s}": rows for s, rows in _both(_hellaswag_clean).items()},
        file="hellaswag/hellaswag.yaml",
    ),
    "mmlu": _set("cais/mmlu:all", "mmlu/default/mmlu_{part}.yaml", "mmlu", **MMLU),
    "mmlu_cloze": _set("cais/mmlu:all", "mmlu/continuation/mmlu_{part}.yaml", "mmlu", **MMLU),
    "piqa": _set("baber/piqa", "piqa/piqa.yaml", "piqa", **_both(_piqa)),
    "squad_v2": _set("rajpurkar/squad_v2", "", "squad_v2", **_both(_squad)),
    "winogrande": _set(
        "allenai/winogrande:winogrande_xl",
        "winogrande/default.yaml",
        "winogrande",
        validation=WINOGRANDE,
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a `set_name` for every set."""
    if "set_name" in metafunc.fixturenames:
        metafunc.parametrize("set_name", SETS)


@pytest.fixture
def sets(hub):
    """The sets, all of them on the hub."""
    for published in SETS.values():
        hub.files.update(published.hub)
    return SETS


@pytest.fixture
def data_folder(sets, write_rows, tmp_path):
    """A function that writes sets as a data folder and returns it."""

    def write(*names: str) -> Path:
        for name in names:
            for place, rows in sets[name].folder.items():
                write_rows(f"data/{place}", rows)
        return tmp_path / "data"

    return write


@pytest.fixture
def load_folder(tmp_path):
    """A function that loads tasks of a task folder by the harness and builds their requests."""

    def load(*names: str, place: str = "tasks", defaults: bool = False) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=str(tmp_path / place), include_defaults=defaults)
            tasks: dict[str, Any] = manager.load(list(names))["tasks"]
            for task in tasks.values():
                task.set_fewshot_seed(1234)
                task.build_all_requests(rank=0, world_size=1)
            return tasks

    return load
