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


def new_run(folder, manifest=None):
    """Return a run of `recipe.yaml` in a folder."""
    return Run(
        recipe=read_recipe(folder / "recipe.yaml", trusts_code=True),
        folder=folder / "run",
        manifest=manifest or RunManifest(),
        load=lambda: None,
        listener=Listener(),
    )


@pytest.fixture
def made_from(tmp_path, monkeypatch):
    """A function that says what a stage is made from, in a folder with the files of a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grade.py").write_text("def right(example, text): return 1.0\n")
    (tmp_path / "mine.json").write_text('{"path": [0, 1, 2]}')
    (tmp_path / "targets.jsonl").write_text("{}\n")
    write_questions(tmp_path / "sums.jsonl")

    def make(stage, questions="sums.jsonl"):
        text = RECIPE.replace("QUESTIONS", str(questions))
        (tmp_path / "recipe.yaml").write_text(text)
        return make_stage(stage, new_run(tmp_path)).made_from

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


def test_other_worked_examples_run_a_search_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = "search: {tasks: sums.jsonl, num_fewshot: 1}\nevaluate: {tasks: sums.jsonl}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)

    def make():
        return make_stage("search", new_run(tmp_path)).made_from

    write_questions(tmp_path / "sums.jsonl")
    before = make()
    for changed in range(60):
        write_questions(tmp_path / "sums.jsonl", changed)
        after = make()
        if after["questions"] == before["questions"] and after != before:
            return
    pytest.fail("no worked example makes a difference")


def test_more_seconds_for_the_measurement_of_time_run_an_evaluation_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "sums.jsonl")

    def make(settings):
        evaluate = f"evaluate: {{tasks: sums.jsonl, {settings}}}"
        text = f"search: {{tasks: sums.jsonl}}\n{evaluate}\n"
        (tmp_path / "recipe.yaml").write_text(text)
        return make_stage("evaluate", new_run(tmp_path)).made_from

    timed = make("latency: true")
    assert "time" not in timed  # an older run with the default isn't repeated
    assert make("latency: true, latency_seconds: 60") != timed
    assert make("latency: true, seed: 0") == timed
