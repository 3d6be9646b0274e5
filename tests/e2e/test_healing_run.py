"""A recipe of a static path alone: tuned, healed, evaluated and reported, without routers."""

import pytest

from drllm.records.healed import read_healed
from drllm.records.results import read_evaluation
from drllm.records.static_paths import read_paths

RECIPE = """
model: {{model: {model}, device: cpu}}
tune: {{tasks: builtin_facts, num_fit: 16, num_judged: 16, max_skipped: 1, beam: 1, max_loss: 10.0}}
heal: {{path: skip1, tasks: builtin_facts, limit: 16, steps: 2, rank: 2, num_held_out: 4}}
evaluate: {{tasks: builtin_facts, limit: 8, num_texts: 4}}
"""


@pytest.mark.thorough
def test_a_recipe_heals_a_path_that_it_tunes_and_evaluates_it_without_routers(
    drllm, model_folder, tmp_path
):
    recipe, run = tmp_path / "paths.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(model=model_folder()))
    words = ("run", recipe, "--output-dir", run)
    assert "[2/4] heal" in drllm(*words).err
    assert not (run / "search.jsonl").exists()
    healed, tuned = read_healed(run / "healed" / "path.json"), read_paths(run / "paths.json")
    assert healed.steps == tuned.find("skip1", run).steps
    names = {system.name for system in read_evaluation(run / "eval" / "builtin_facts.json").systems}
    assert {"base", "healed:skip1"} <= names
    assert "Healed path" in (run / "report.md").read_text(encoding="utf-8")
    assert drllm(*words).err.count("already done") == 4
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 3"))
    assert drllm(*words).err.count("already done") == 1  # the tuning
    assert read_healed(run / "healed" / "path.json").curve[-1].step == 3


PATH_RECIPE = """
model: {{model: {model}, device: cpu}}
heal: {{path: "without:3", text: builtin_texts, limit: 16, steps: 2, rank: 2, num_held_out: 4}}
evaluate: {{tasks: builtin_facts, limit: 8, num_texts: 4, num_written: 3}}
"""


@pytest.mark.thorough
def test_a_recipe_heals_a_path_of_its_own_and_evaluates_it_plain_too(drllm, model_folder, tmp_path):
    recipe, run = tmp_path / "paths.yaml", tmp_path / "run"
    recipe.write_text(PATH_RECIPE.format(model=model_folder()))
    words = ("run", recipe, "--output-dir", run)
    printed = drllm(*words).out
    healed = read_healed(run / "healed" / "path.json")
    assert (healed.name, healed.texts) == ("without 3", ("builtin_texts",))
    evaluation = read_evaluation(run / "eval" / "builtin_facts.json")
    names = ["base", "without 3", "healed:without 3"]
    assert [system.name for system in evaluation.systems] == names
    assert [evaluation.is_healed(name) for name in names] == [False, False, True]
    assert len(evaluation.written) == 3
    for answers in evaluation.written:
        assert list(answers.answers) == names
    assert "skips layer 3, with healed weights" in printed
    assert drllm(*words).err.count("already done") == 3
