"""What a stage of a run is made from: if it changes, the stage runs again."""

import json

import pytest

from drllm.pipeline.manifest import RunManifest
from drllm.pipeline.recipes import read_recipe
from drllm.pipeline.stages import Run, make_stage
from drllm.work.listener import Listener

RECIPE = """
search: {tasks: QUESTIONS, limit: 2, reward: 'grade.py:right'}
evaluate:
  tasks: QUESTIONS
  paths: mine.json
  reward: grade.py:right
  baselines: sequence-router,block-influence
  supervision: targets.jsonl
"""


def write_questions(file, changed=None):
    """Write sums as questions, perhaps with another answer to one of them; return the file."""
    with file.open("w") as lines:
        for number in range(60):
            answer = "none" if number == changed else str(number)
            row = {"question": f"What is {number} + 0?", "answer": answer, "grader": "exact"}
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture
def made_from(tmp_path, monkeypatch):
    """A function that says what a stage is made from, in a folder with the files of a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grade.py").write_text("def right(example, text): return 1.0\n")
    (tmp_path / "mine.json").write_text('{"path": [0, 1, 2]}')
    (tmp_path / "targets.jsonl").write_text("{}\n")
    write_questions(tmp_path / "sums.jsonl")

    def make(stage, questions="sums.jsonl"):
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.replace("QUESTIONS", str(questions)))
        run = Run(
            recipe=read_recipe(file),
            folder=tmp_path / "run",
            manifest=RunManifest(),
            load=lambda: None,
            listener=Listener(),
        )
        return make_stage(stage, run).made_from

    return make


@pytest.mark.parametrize(
    ("stage", "file", "text"),
    [
        ("search", "grade.py", "def right(example, text): return 0.0\n"),
        ("evaluate", "grade.py", "def right(example, text): return 0.0\n"),
        ("evaluate", "mine.json", '{"path": [0, 2]}'),
        ("evaluate", "targets.jsonl", "{} \n"),
    ],
)
def test_another_content_of_a_file_that_the_recipe_names_runs_the_stage_again(
    made_from, tmp_path, stage, file, text
):
    before = made_from(stage)
    assert made_from(stage) == before
    (tmp_path / file).write_text(text)
    assert made_from(stage) != before


def test_other_questions_to_fit_on_run_an_evaluation_again(made_from, tmp_path):
    before = made_from("evaluate")
    for changed in range(60):
        folder = tmp_path / str(changed)
        folder.mkdir()
        after = made_from("evaluate", write_questions(folder / "sums.jsonl", changed))
        is_reported = after["questions"] != before["questions"]
        if not is_reported and after["other questions"] != before["other questions"]:
            return
    pytest.fail("no question that is only fitted on makes a difference")
