"""PIQA: the prompt is the harness' own, and a label that is neither option is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.piqa import PIQA

ROW = {"goal": "Keep {{tea}} warm", "sol1": "Put a cosy on it.", "sol2": "Add {ice}.", "label": 0}


def test_the_prompt_is_what_the_harness_renders(rendered_by_the_harness) -> None:
    prompt = PIQA.prompt(PIQA.read(ROW, "1"), "loglikelihood")
    ours = [(prompt.text, text) for text in prompt.continuations]
    assert ours == rendered_by_the_harness([ROW], "piqa/piqa.yaml")


def test_every_training_question_that_is_not_reported_is_used_once(hub: Any) -> None:
    rows = [{**ROW, "goal": f"Goal {number}"} for number in range(40)]
    hub.files["baber/piqa", None, "train"] = rows
    hub.files["baber/piqa", None, "validation"] = rows[:5]
    splits = {split: PIQA.examples(split) for split in SPLITS}
    assert len(splits["test"]) == 5
    trained = [example.question for split in SPLITS[:3] for example in splits[split]]
    assert sorted(trained) == sorted(str(row["goal"]) for row in rows[5:])


@pytest.mark.parametrize("label", [-1, 2, "0", True, None])
def test_a_broken_row_is_named(tmp_path: Path, write_rows: Any, label: Any) -> None:
    write_rows("piqa/validation", [{**ROW, "label": label}])
    with pytest.raises(TaskError, match=f"line 1: 'label' is {label!r}; expected 0 or 1"):
        PIQA.examples("test", tmp_path)
