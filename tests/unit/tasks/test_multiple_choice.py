"""ARC: the prompt is the harness' own, the splits are disjoint, broken files are named."""

from __future__ import annotations

import gzip
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.records import question_key, split_of
from drllm.tasks.base import Example, get_task
from drllm.tasks.multiple_choice import ARC_CHALLENGE, ARC_EASY, example_of

ROWS = [
    {
        "id": f"q{number}",
        "question": f"Question {number}?",
        "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    }
    for number in range(40)
]


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """A data folder with small ARC-Easy files."""
    write(tmp_path / "arc_easy" / "train.jsonl", ROWS)
    write(tmp_path / "arc_easy" / "validation.jsonl", [{**ROWS[0], "question": "Another?"}])
    return tmp_path


def example(*choices: str, gold: int = 0, question: str = "Why?") -> Example:
    return Example(
        id="1", task="t", question=question, choices=choices, gold=gold, answer=choices[gold]
    )


def rendered_by_the_harness(name: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Context and continuation of every request of the harness' own zero-shot task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import lm_eval.tasks
        import yaml
        from lm_eval.api.task import ConfigurableTask

        folder = Path(lm_eval.tasks.__file__).parent / "arc"
        config = yaml.safe_load((folder / "arc_easy.yaml").read_text())
        if name != "arc_easy":
            config.update(yaml.safe_load((folder / f"{name}.yaml").read_text()))
            assert config.pop("include") == "arc_easy.yaml"
        loaded = datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}
        )
        task = ConfigurableTask(
            config={**config, "custom_dataset": lambda **_: loaded, "num_fewshot": 0}
        )
        task.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def ours(examples: list[Example]) -> list[tuple[str, str]]:
    prompts = [ARC_EASY.prompt(example, "loglikelihood") for example in examples]
    return [(prompt.text, text) for prompt in prompts for text in prompt.continuations]


def test_the_prompt_is_what_the_harness_renders_for_awkward_texts() -> None:
    rows = [
        {
            "id": "1",
            "question": ' What is {{x}} in {question}?\nIt\'s "<b>" é \n ',
            "choices": {"text": ["a {b}", " c", "d\n"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        }
    ]
    examples = [example_of(row, "arc_easy") for row in rows]
    assert ours(examples) == rendered_by_the_harness("arc_easy", rows)


@pytest.mark.parametrize("task", [ARC_EASY, ARC_CHALLENGE], ids=lambda task: task.name)
def test_the_prompts_of_the_real_set_are_what_the_harness_renders(
    task: Any, data_dir: Path
) -> None:
    with gzip.open(data_dir / task.name / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    examples = task.examples("test", data_dir)
    assert ours(examples) == rendered_by_the_harness(task.name, rows)
    assert [example.gold for example in examples] == [
        row["choices"]["label"].index(row["answerKey"]) for row in rows
    ]


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_no_question_of_the_real_sets_is_in_two_splits(name: str, data_dir: Path) -> None:
    splits = {split: get_task(name).examples(split, data_dir) for split in SPLITS}
    keys = Counter(
        question_key(example.question) for examples in splits.values() for example in examples
    )
    assert max(keys.values()) == 1
    sizes = {split: len(examples) for split, examples in splits.items()}
    train = sizes["search"] + sizes["fit"] + sizes["select"]
    assert sizes["test"] == {"arc_easy": 570, "arc_challenge": 299}[name]
    assert train == {"arc_easy": 2243, "arc_challenge": 1118}[name]
    assert 0.55 < sizes["search"] / train < 0.65


def test_no_real_training_question_is_in_the_test_of_the_other_set(data_dir: Path) -> None:
    test = {question_key(e.question) for e in ARC_CHALLENGE.examples("test", data_dir)}
    for split in ("search", "fit", "select"):
        assert not test & {question_key(e.question) for e in ARC_EASY.examples(split, data_dir)}


def test_a_split_keeps_the_files_order_and_the_first_of_equal_questions(arc: Path) -> None:
    copy = {**ROWS[0], "id": "copy", "question": "  question 0? ", "answerKey": "1"}
    write(arc / "arc_easy" / "train.jsonl", [*ROWS, copy])
    found = [e.id for split in SPLITS[:3] for e in ARC_EASY.examples(split, arc)]
    assert sorted(found) == sorted(row["id"] for row in ROWS)
    search = [e.id for e in ARC_EASY.examples("search", arc)]
    expected = [r["id"] for r in ROWS if split_of(str(r["question"]), "train") == "search"]
    assert search == expected


def test_a_training_question_that_is_in_the_test_is_left_out(arc: Path) -> None:
    write(arc / "arc_challenge" / "validation.jsonl", [{**ROWS[5], "question": "QUESTION 5?"}])
    found = [e.id for split in SPLITS[:3] for e in ARC_EASY.examples(split, arc)]
    assert "q5" not in found
    assert len(found) == len(ROWS) - 1


def test_gzipped_files_are_read_too(arc: Path) -> None:
    plain = arc / "arc_easy" / "train.jsonl"
    expected = ARC_EASY.examples("search", arc)
    with gzip.open(plain.with_name("train.jsonl.gz"), "wt", encoding="utf-8") as file:
        file.write(plain.read_text())
    plain.unlink()
    assert ARC_EASY.examples("search", arc) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "4"}, "'answerKey' is '4'; expected one of 1, 2, 3"),
        ({"question": " "}, "'question' is empty"),
        ({"choices": ["a"]}, "expected an object with 'text' and 'label'"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "'label' has 1 entries"),
        ({"choices": {"text": ["a", 2], "label": ["A", "B"]}}, "'text' holds 2"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "have the labels A, A"),
        ({"id": 7}, "'id' is 7"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(
    arc: Path, change: dict[str, Any], message: str
) -> None:
    path = arc / "arc_easy" / "train.jsonl"
    write(path, [ROWS[0], {**ROWS[1], **change}])
    with pytest.raises(TaskError) as caught:
        ARC_EASY.examples("search", arc)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "1"\n', "line 1: not JSON"),
        ("[1]\n", "line 1: '[1]' is not a JSON object"),
        ("", "is empty"),
    ],
)
def test_a_broken_file_is_named(arc: Path, text: str, message: str) -> None:
    (arc / "arc_easy" / "validation.jsonl").write_text(text)
    with pytest.raises(TaskError, match=message.replace("[", r"\[")):
        ARC_EASY.examples("test", arc)


def test_a_cut_off_gzip_file_is_named(arc: Path) -> None:
    path = arc / "arc_easy" / "validation.jsonl"
    path.unlink()
    whole = gzip.compress(json.dumps(ROWS[0]).encode())
    path.with_name("validation.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(TaskError, match=r"validation\.jsonl\.gz can't be read"):
        ARC_EASY.examples("test", arc)


def test_a_missing_folder_or_file_is_named_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is not a folder"):
        ARC_EASY.examples("test", tmp_path / "absent")
    with pytest.raises(TaskError) as caught:
        ARC_EASY.examples("test", tmp_path)
    assert str(tmp_path / "arc_easy" / "validation.jsonl") in str(caught.value)


def test_without_data_and_network_one_line_names_the_flag() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets  # noqa: F401  (its first import warns)
    with pytest.raises(TaskError, match="--data-dir") as caught:
        ARC_EASY.examples("test")
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_refused_with_the_nearest(arc: Path) -> None:
    with pytest.raises(TaskError, match="did you mean 'search'"):
        ARC_EASY.examples("serch", arc)


def test_loglikelihood_is_retested_in_three_other_templates_and_by_character() -> None:
    asked = example("ice", "fire", gold=1)
    prompt = ARC_EASY.prompt(asked, "loglikelihood")
    retests = ARC_EASY.retests(asked, "loglikelihood")
    assert [retest.normalised for retest in retests] == [False, False, False, True]
    assert len({prompt.text, *(retest.text for retest in retests)}) == 4
    assert retests[3].text == prompt.text
    for retest in retests:
        assert "Why?" in retest.text
        assert (retest.continuations, retest.gold) == ((" ice", " fire"), 1)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_letters_are_retested_in_every_other_rotation(count: int) -> None:
    choices = [f"choice{index}" for index in range(count)]
    asked = example(*choices, gold=1)
    prompts = [ARC_EASY.prompt(asked, "letter"), *ARC_EASY.retests(asked, "letter")]
    assert prompts[0].answer == "B"
    assert sorted(prompt.answer for prompt in prompts) == list("ABCDE"[:count])
    for prompt in prompts:
        assert f"\n{prompt.answer}. choice1\n" in prompt.text
        assert all(prompt.text.count(f". {choice}\n") == 1 for choice in choices)
        assert (prompt.letters, prompt.chat) == ("ABCDE"[:count], True)
        assert prompt.text.endswith("Answer:")


def test_a_reward_that_does_not_fit_is_refused() -> None:
    for ask in (ARC_EASY.prompt, ARC_EASY.retests):
        with pytest.raises(TaskError, match="loglikelihood, letter"):
            ask(example("a", "b"), "boxed")
