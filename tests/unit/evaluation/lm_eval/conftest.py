"""Published sets in small: rows of the hub's schema and of data folders, all of them invented.

And the two ways from rows to requests: a task folder of ours, and the harness' own task file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NUM_QUESTIONS = 40
PLACES = range(NUM_QUESTIONS)
AWKWARD = 'Why {{x}} and {y}? "<b>" it\'s é\n '
"""What templates, quotes and white space could trip over; a part of every question."""

Rows = list[dict[str, Any]]
Requests = list[tuple[Any, ...]]


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


def _labelled(name: str, count: int, labels: Sequence[str]) -> Rows:
    return [
        {
            "id": f"{name}-{place}",
            "question": f"{name} {place}: {AWKWARD}",
            "question_concept": "a concept",
            "choices": {
                "text": [f"option {{{place}}} {label}" for label in labels],
                "label": list(labels),
            },
            "answerKey": labels[place % len(labels)],
        }
        for place in range(count)
    ]


def _mmlu(name: str, count: int) -> Rows:
    return [
        {
            "question": f"{name} {place}: {AWKWARD}",
            "subject": ("anatomy", "high_school_us_history")[place % 2],
            "choices": [f"{place}{letter}" for letter in "wxyz"],
            "answer": place % 4,
        }
        for place in range(count)
    ]


def _hellaswag(name: str) -> Rows:
    return [
        {
            "ind": place,
            "activity_label": "How to rest",
            "ctx_a": f"[header] {name} {place} [title] Find {{a}} seat.  Sit down.",
            "ctx_b": ("they close", "")[place % 2],
            "endings": [f" their {part} [step] now. " for part in ("eyes", "ears", "book", "bag")],
            "label": str(place % 4),
        }
        for place in PLACES
    ]


def _hellaswag_clean(name: str) -> Rows:
    """The rows above as a data folder has them, cleaned by hand."""
    return [
        {
            "ind": place,
            "query": f"How to rest: {name} {place}. Find {{a}} seat. Sit down."
            + (" They close", "")[place % 2],
            "choices": [f"their {part} now." for part in ("eyes", "ears", "book", "bag")],
            "label": place % 4,
        }
        for place in PLACES
    ]


def _gpqa() -> Rows:
    return [
        {
            "Question": f"What holds for body {place}? {AWKWARD}",
            "Correct Answer": f" It has  mass {place}.\n",
            "Incorrect Answer 1": f"It has [title] mass {place + 1}.",
            "Incorrect Answer 2": f"It has no {{mass}} {place}.",
            "Incorrect Answer 3": f"Nothing {place}.",
            "Explanation": "It is so.",
        }
        for place in PLACES
    ]


def _squad(name: str) -> Rows:
    return [
        {
            "id": f"{name}-{place}",
            "title": "Mills",
            "context": f" The mill of {name} {place} stands by {{the}} Green River. ",
            "question": f"{name} {place}: {AWKWARD}",
            "answers": {
                "text": [] if place % 3 == 0 else ["by the river", "the Green River"],
                "answer_start": [] if place % 3 == 0 else [3, 6],
            },
        }
        for place in PLACES
    ]


ARC_LABELS = ("A", "B", "C", "D")
GSM8K = {
    split: [
        {
            "question": f"{split} {place}: {AWKWARD}",
            "answer": f"It is {place} + 1 = <<{place}+1={place + 1}>>.\n#### {place + 1}",
        }
        for place in PLACES
    ]
    for split in ("train", "test")
}
PIQA = {
    split: [
        {
            "goal": f"{split} {place}: {AWKWARD}",
            "sol1": f"Put {{a}} cosy on {place}.",
            "sol2": f"Add ice to {place}.",
            "label": place % 2,
        }
        for place in PLACES
    ]
    for split in ("train", "validation")
}
WINOGRANDE = [
    {
        "sentence": f"Ann {{lent}} Eve {place} pens since _ had {place + 1} to spare. ",
        "option1": "Ann",
        "option2": "Eve",
        "answer": str(1 + place % 2),
    }
    for place in PLACES
]
TRUTHFULQA = [
    {
        "question": f"What happens on day {place}? {AWKWARD}",
        "mc1_targets": {
            "choices": [f"Nothing on {place}.", f"Rain on {place}.", "It {ends}."][: 2 + place % 2],
            "labels": [1, 0, 0][: 2 + place % 2],
        },
        "mc2_targets": {"choices": ["Nothing.", "Rain."], "labels": [1, 0]},
    }
    for place in PLACES
]
AIME = [
    {"ID": f"I-{place}", "Problem": f"Problem {place}: {AWKWARD}", "Answer": place}
    for place in PLACES
]
AGIEVAL = [
    {
        "query": f"Q: {place}? {AWKWARD} Answer Choices: (A){place} (B)no\nA: Among A through B,",
        "choices": [f"(A){place}", "(B)no"],
        "gold": [place % 2],
    }
    for place in PLACES
]
AGIEVAL_PARTS = (
    "aqua-rat",
    "gaokao-english",
    "logiqa-en",
    "lsat-ar",
    "lsat-lr",
    "lsat-rc",
    "sat-en-without-passage",
    "sat-en",
    "sat-math",
)


def _indexed(query: str, rows: Rows) -> Rows:
    """Rows of a data folder: `question`, `choices` and the index of the right one."""
    return [
        {"question": row[query], "choices": row["choices"], "answer": row["gold"][0]}
        for row in rows
    ]


def _gpqa_indexed() -> Rows:
    """The options in an order of the folder's own."""
    return [
        {
            "question": row["Question"],
            "choices": [row[f"Incorrect Answer {n}"] for n in (3, 1, 2)] + [row["Correct Answer"]],
            "answer": 3,
        }
        for row in _gpqa()
    ]


def _arc(name: str, config: str) -> PublishedSet:
    train = _labelled(f"{name} train", NUM_QUESTIONS, ARC_LABELS)
    test = _labelled(f"{name} test", NUM_QUESTIONS, ("1", "2", "3"))
    return PublishedSet(
        hub={
            ("allenai/ai2_arc", config, "train"): train,
            ("allenai/ai2_arc", config, "validation"): test,
        },
        folder={f"{name}/train": train, f"{name}/validation": test},
        file=f"arc/{name}.yaml",
    )


def _one_file(
    key: tuple[str, str | None, str], rows: Rows, place: str, in_folder: Rows, file: str
) -> PublishedSet:
    return PublishedSet(hub={key: rows}, folder={place: in_folder}, file=file)


def _train_and(
    repository: str, config: str | None, splits: Mapping[str, Rows], place: str, file: str
) -> PublishedSet:
    return PublishedSet(
        hub={(repository, config, split): rows for split, rows in splits.items()},
        folder={f"{place}/{split}": rows for split, rows in splits.items()},
        file=file,
    )


CSQA = {s: _labelled(f"csqa {s}", NUM_QUESTIONS, "ABCDE") for s in ("train", "validation")}
MMLU = {"dev": _mmlu("dev", 10), "validation": _mmlu("validation", NUM_QUESTIONS)}
SQUAD = {split: _squad(split) for split in ("train", "validation")}

SETS: dict[str, PublishedSet] = {
    "agieval": PublishedSet(
        hub={
            (f"hails/agieval-{part}", None, "test"): AGIEVAL[index :: len(AGIEVAL_PARTS)]
            for index, part in enumerate(AGIEVAL_PARTS)
        },
        folder={
            "agieval/test": _indexed(
                "query",
                [
                    row
                    for index in range(len(AGIEVAL_PARTS))
                    for row in AGIEVAL[index :: len(AGIEVAL_PARTS)]
                ],
            )
        },
        file="agieval/aqua-rat.yaml",
    ),
    "aime24": _one_file(
        ("Maxwell-Jia/AIME_2024", None, "train"),
        AIME,
        "aime24/test",
        [{"problem": row["Problem"], "answer": str(row["Answer"])} for row in AIME],
        "aime/aime24.yaml",
    ),
    "arc_easy": _arc("arc_easy", "ARC-Easy"),
    "arc_challenge": _arc("arc_challenge", "ARC-Challenge"),
    "commonsense_qa": _train_and(
        "tau/commonsense_qa", None, CSQA, "commonsense_qa", "commonsense_qa/default.yaml"
    ),
    "commonsense_qa_cloze": _train_and(
        "tau/commonsense_qa", None, CSQA, "commonsense_qa", "arc/arc_easy.yaml"
    ),
    "gpqa_diamond": _one_file(
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        _gpqa(),
        "gpqa_diamond/test",
        _gpqa_indexed(),
        "gpqa/zeroshot/gpqa_diamond_zeroshot.yaml",
    ),
    "gsm8k": _train_and("openai/gsm8k", "main", GSM8K, "gsm8k", "gsm8k/gsm8k.yaml"),
    "hellaswag": PublishedSet(
        hub={
            ("Rowan/hellaswag", None, split): _hellaswag(split) for split in ("train", "validation")
        },
        folder={f"hellaswag/{split}": _hellaswag_clean(split) for split in ("train", "validation")},
        file="hellaswag/hellaswag.yaml",
    ),
    "mmlu": _train_and("cais/mmlu", "all", MMLU, "mmlu", "mmlu/default/mmlu_{part}.yaml"),
    "mmlu_cloze": _train_and(
        "cais/mmlu", "all", MMLU, "mmlu", "mmlu/continuation/mmlu_{part}.yaml"
    ),
    "piqa": _train_and("baber/piqa", None, PIQA, "piqa", "piqa/piqa.yaml"),
    "squad_v2": _train_and("rajpurkar/squad_v2", None, SQUAD, "squad_v2", ""),
    "truthfulqa": _one_file(
        ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
        TRUTHFULQA,
        "truthfulqa/validation",
        TRUTHFULQA,
        "truthfulqa/truthfulqa_mc1.yaml",
    ),
    "winogrande": _one_file(
        ("allenai/winogrande", "winogrande_xl", "validation"),
        WINOGRANDE,
        "winogrande/validation",
        WINOGRANDE,
        "winogrande/default.yaml",
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a `set_name` for every set."""
    if "set_name" in metafunc.fixturenames:
        metafunc.parametrize("set_name", SETS)


@pytest.fixture
def sets(hub: Any) -> dict[str, PublishedSet]:
    """The sets, all of them on the hub."""
    for published in SETS.values():
        hub.files.update(published.hub)
    return SETS


@pytest.fixture
def data_folder(sets: dict[str, PublishedSet], write_rows: Callable[..., Path], tmp_path: Path):
    """A function that writes sets as a data folder and returns it."""

    def write(*names: str) -> Path:
        for name in names:
            for place, rows in sets[name].folder.items():
                write_rows(f"data/{place}", rows)
        return tmp_path / "data"

    return write


@pytest.fixture
def loaded() -> Callable[..., dict[str, Any]]:
    """A function that loads tasks of a task folder by the harness and builds their requests."""

    def load(folder: Path, *names: str, defaults: bool = False) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=str(folder), include_defaults=defaults)
            tasks: dict[str, Any] = manager.load(list(names))["tasks"]
            return {name: _built(task) for name, task in tasks.items()}

    return load


@pytest.fixture
def by_the_harness() -> Callable[..., Requests]:
    """A function that renders rows by a task file of the harness, apart from where they are."""

    def render(
        file: str, asked: Rows, shown: Rows, num_fewshot: int | None, **changes: Any
    ) -> Requests:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
            import lm_eval.tasks
            from lm_eval.api.task import ConfigurableTask
            from lm_eval.tasks._yaml_loader import load_yaml

            config = load_yaml(Path(lm_eval.tasks.__file__).parent / file)
            config.pop("tag", None)
            rows = {"asked": asked, "shown": shown or asked}
            sets = datasets.DatasetDict(
                {use: datasets.Dataset.from_list(part) for use, part in rows.items()}
            )
            config |= {
                "custom_dataset": lambda **_: sets,
                "training_split": None,
                "validation_split": None,
                "test_split": "asked",
                "fewshot_split": "shown",
                **changes,
            }
            if num_fewshot is not None:
                config["num_fewshot"] = num_fewshot
            return requests_of(_built(ConfigurableTask(config=config)))

    return render


def _built(task: Any) -> Any:
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    return task


def requests_of(task: Any) -> Requests:
    return [instance.args for instance in task.instances]


@pytest.fixture(name="requests_of")
def requests_of_fixture() -> Callable[[Any], Requests]:
    """A function that returns the arguments of every request of a task."""
    return requests_of
