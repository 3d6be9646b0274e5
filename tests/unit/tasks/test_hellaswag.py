"""HellaSwag: raw rows are cleaned as the harness cleans them; clean rows stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drllm.errors import TaskError
from drllm.tasks.hellaswag import HELLASWAG

RAW = {
    "ind": 1,
    "activity_label": "How to {{rest}}",
    "ctx_a": "[header] How to rest [title] Find a  seat. Sit   down.",
    "ctx_b": "then THEY [step] close",
    "endings": [" their eyes [title] Sleep. ", "[substeps] it", "their {ears}", "the book."],
    "label": "2",
}
CLEAN = {"ind": 1, "query": "Rest: They", "choices": [" a ", "b", "c", "d"], "label": 3}


@pytest.fixture
def cleaned_by_the_harness() -> dict[str, Any]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from lm_eval.tasks.hellaswag.utils import process_docs

        cleaned: dict[str, Any] = process_docs(datasets.Dataset.from_list([RAW]))[0]
    return cleaned


def test_a_raw_row_is_cleaned_as_the_harness_cleans_it(
    cleaned_by_the_harness: dict[str, Any],
) -> None:
    example = HELLASWAG.read(RAW, "1")
    assert example is not None
    assert example.question == cleaned_by_the_harness["query"]
    assert list(example.choices) == cleaned_by_the_harness["choices"]
    assert example.gold == cleaned_by_the_harness["gold"] == 2


def test_the_text_alone_is_shown_and_its_endings_are_scored() -> None:
    example = HELLASWAG.read(CLEAN, "1")
    assert example is not None
    prompt = HELLASWAG.prompt(example, "loglikelihood")
    assert (prompt.text, prompt.gold) == ("Rest: They", 3)
    assert prompt.continuations == ("  a ", " b", " c", " d")
    retests = HELLASWAG.retests(example, "loglikelihood")
    assert len({retest.text for retest in retests}) == 4
    assert all("Rest: They" in retest.text for retest in retests)
    with pytest.raises(TaskError, match="it takes loglikelihood"):
        HELLASWAG.prompt(example, "letter")


def test_a_row_is_no_question_where_cleaning_leaves_nothing_of_an_ending() -> None:
    assert HELLASWAG.read({**RAW, "endings": ["a", "[step]", "c", "d"]}, "1") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "'label' is ''; expected an index from 0 to 3"),
        ({"label": "4"}, "'label' is '4'"),
        ({"label": -1}, "'label' is -1"),
        ({"ctx_b": None}, "'ctx_b' is None; expected text"),
        ({"endings": []}, "'endings' has 0 entries"),
    ],
)
def test_a_broken_row_is_named(
    tmp_path: Path, write_rows: Any, change: dict[str, Any], message: str
) -> None:
    write_rows("hellaswag/validation", [RAW, {**RAW, **change}])
    with pytest.raises(TaskError, match=f"line 2: {message}"):
        HELLASWAG.examples("test", tmp_path)


def test_the_real_part_is_read_whole(data_dir: Path) -> None:
    examples = HELLASWAG.examples("test", data_dir)
    assert len(examples) == 1000
    assert {len(example.choices) for example in examples} == {4}
