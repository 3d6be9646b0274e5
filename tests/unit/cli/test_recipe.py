import sys
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import yaml

import drllm
from drllm.cli import main, running
from drllm.config import EvaluateConfig, ModelConfig
from drllm.errors import ConfigError, ModelError, RecordError
from drllm.pipeline import folder as run_folders
from drllm.pipeline.folder import begin_stage, run_recipe
from drllm.pipeline.manifest import RunManifest, StageState, read_run_manifest
from drllm.pipeline.model import open_model_lazily
from drllm.pipeline.recipes import Recipe, read_recipe
from drllm.pipeline.stages import Run
from drllm.records.codec import sha256, write_json
from drllm.records.places import only_writer
from drllm.tasks.registry import get_tasks
from drllm.work.listener import Listener
from run_folder import TESTED, RunFolderWriter

RECIPES = Path(drllm.__file__).parent / "cli" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))

EVALUATE = "evaluate: {tasks: builtin_facts}\n"
PATHS_ALONE = "evaluate: {tasks: builtin_facts, paths: 'without:1'}\n"
ROUTERS = "search: {tasks: builtin_facts, limit: 2}\n"
CURVE = PATHS_ALONE.replace("evaluate: {", "evaluate: {curve: '0.1', ")


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_there_are_recipes():
    assert {path.stem for path in FILES} >= {"demo_full", "arc_easy_smollm2"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_comes_with_the_project_is_understood(path: Path):
    recipe = read_recipe(path)
    if recipe.has_routers:
        assert get_tasks(recipe.search.dataset)
    assert get_tasks(recipe.evaluate.tasks)
    assert recipe.evaluate.split == "test"
    assert recipe.search.split == "search"


def test_full_is_for_the_recipe_that_has_a_longer_form(capsys):
    assert main(["run", "paper_4k", "--full"]) == 2
    assert "'paper_4k' has no longer form" in capsys.readouterr().err


def test_the_driver_of_ray_loads_no_model(tmp_path, monkeypatch, capsys):
    """A model that can't be loaded isn't missed before Ray is, which comes first."""
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (broken / name).write_text("")
    search = "search: {dataset: builtin_facts, executor: ray, limit: 2}\n"
    path = write(tmp_path, f"model: {{model: {broken}}}\n" + EVALUATE + search)
    assert main(["run", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    assert 'pip install "ray>=2.40.0"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trials", "status"), [(TESTED.trials[:1], 0), (TESTED.trials[1:], 1), ((), 0)]
)
def test_the_status_of_a_run_says_whether_the_test_of_a_drop_passed(
    trials, status, tmp_path, monkeypatch, capsys
):
    drop_test = None
    if trials:
        drop_test = msgspec.structs.replace(TESTED, trials=trials, untested=())
    RunFolderWriter(tmp_path / "out", 4, 0).evaluation(drop_test=drop_test)
    monkeypatch.setattr(running, "check_model", lambda settings: None)
    monkeypatch.setattr(running, "run_recipe", lambda *_: {})
    recipe = write(tmp_path, EVALUATE)
    assert main(["run", str(recipe), "--output-dir", str(tmp_path / "out")]) == status
    assert "arc_easy" in capsys.readouterr().out


def test_names_may_have_dashes_and_the_published_spelling(tmp_path: Path):
    path = write(tmp_path, "model: {model-id: owner/name}\ntrain: {num-epochs: 3}\n")
    recipe = read_recipe(path)
    assert recipe.model.model == "owner/name"
    assert recipe.train.num_epochs == 3


def test_a_number_is_a_text_where_the_setting_is_one_also_when_written_out(tmp_path: Path):
    path = write(tmp_path, "model: {revision: 1.10}\nevaluate: {curve: 0.1, limit: 5}\ntrain: ~\n")
    recipe = read_recipe(path)
    assert recipe.model.revision == "1.10"
    assert (recipe.evaluate.curve, recipe.evaluate.limit) == ("0.1", 5)
    text = recipe.to_yaml()
    assert "output_dir" not in yaml.safe_load(text)["search"]
    assert read_recipe(write(tmp_path, text)) == recipe


def test_a_data_folder_on_the_line_wins_over_the_recipe(tmp_path: Path):
    path = write(tmp_path, "search: {data_dir: here}\n")
    recipe = read_recipe(path, "there")
    assert (recipe.search.data_dir, recipe.evaluate.data_dir) == ("there", "there")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("evaluate: {paths: 'without:1'}\n", "evaluate: no task is given"),
        (f"{EVALUATE}search: {{limit: 2}}\n", "search: no task is given"),
        (CURVE, "no effect without routers"),
        (f"{ROUTERS}{EVALUATE[:-2]}, latency: true, executor: ray}}", "--latency times the model"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_before_anything_is_loaded(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        read_recipe(write(tmp_path, text)).check()


def test_a_path_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    recipe = read_recipe(write(tmp_path, f"{ROUTERS}{EVALUATE[:-2]}, paths: missing.json}}"))
    with pytest.raises(RecordError, match=r"missing\.json doesn't exist"):
        recipe.check()


def test_targets_that_are_not_there_are_refused_before_any_stage_unless_the_run_makes_them(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folders, "_run_stages", lambda names, _: dict.fromkeys(names, ""))
    evaluate = f"{EVALUATE[:-2]}, baselines: sequence-router, supervision: out/%s}}\n"

    missing = read_recipe(write(tmp_path, ROUTERS + evaluate % "missing.jsonl"))
    with pytest.raises(RecordError, match=r"^out/missing\.jsonl doesn't exist"):
        run_recipe(missing, tmp_path / "out", Listener())

    made_by_the_run = read_recipe(write(tmp_path, ROUTERS + evaluate % "supervision.jsonl"))
    assert "evaluate" in run_recipe(made_by_the_run, tmp_path / "out", Listener())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {gama: 1}\n", "did you mean 'gamma'"),
        ("trian: {gamma: 1}\n", "did you mean 'train'"),
        ("on: {}\n", "unknown section 'True'"),  # true to YAML
        ("train: 3\n", "section 'train' is 3"),
        ("evaluate: {limit: few}\n", "'few'"),
        ("search: {tasks: a, dataset: b}\n", "'dataset' is given twice"),
        ("train: {num-epochs: 1, num_epochs: 2}\n", "'num_epochs' is given twice"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_its_name(tmp_path: Path, text: str, says: str):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        read_recipe(path)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.fixture
def done(tmp_path: Path) -> RunManifest:
    """What a folder says in which one stage is done."""
    (tmp_path / "out.txt").write_text("result")
    stage = StageState(made_from={"seed": 0}, outputs={"out.txt": sha256(tmp_path / "out.txt")})
    write_json(tmp_path / "run.manifest.json", RunManifest(stages={"train": stage}))
    return read_run_manifest(tmp_path)


def test_a_stage_is_done_if_it_was_made_from_the_same_and_its_files_are_unchanged(done, tmp_path):
    assert done.is_done("train", {"seed": 0}, tmp_path)
    assert not done.is_done("evaluate", {}, tmp_path)
    assert not done.is_done("train", {"seed": 1}, tmp_path)
    (tmp_path / "out.txt").write_text("Result")
    assert not done.is_done("train", {"seed": 0}, tmp_path)
    (tmp_path / "out.txt").unlink()
    assert not done.is_done("train", {"seed": 0}, tmp_path)


def test_a_stage_that_began_and_did_not_end_is_not_done(tmp_path: Path):
    manifest = RunManifest(stages={"train": StageState(made_from={})})
    assert not manifest.is_done("train", {}, tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "; delete"),
        ("[]", "; delete"),
        ("{}x", "; delete"),
        ('{"schema": "drllm.run", "stages": {"a": 1}}', "; delete"),
        ('{"schema": "drllm.search"}', "drllm.search"),
        ('{"schema_version": 99}', "99"),
    ],
)
def test_a_broken_foreign_or_future_manifest_is_refused(tmp_path: Path, text: str, says: str):
    (tmp_path / "run.manifest.json").write_text(text)
    with pytest.raises(RecordError, match=rf"run\.manifest\.json.*{says}"):
        read_run_manifest(tmp_path)


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("model", "trust_remote_code: true"),
        ("search", "trust-task-code: true"),
        ("evaluate", "trust_task_code: true"),
        ("search", "reward: grade.py:right"),
        ("evaluate", "reward: 'exact,/tmp/grade.py:right'"),
    ],
)
def test_a_recipe_that_lets_code_run_is_refused_unless_it_is_trusted(tmp_path, section, setting):
    path = write(tmp_path, f"{section}: {{{setting}}}\n")
    with pytest.raises(ConfigError, match=rf"{section}: .*--trust-code"):
        read_recipe(path)
    read_recipe(path, trusts_code=True)


def test_a_settings_file_that_lets_code_run_is_refused(tmp_path, capsys):
    (tmp_path / "grade.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for setting in ("trust_task_code: true", f"reward: {tmp_path}/grade.py:right"):
        file = write(tmp_path, setting)
        status = main(["search", "--tasks", "builtin_facts", "--config", str(file)])
        assert status == 2
        assert "give the flag on the command line" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_what_a_stage_did_not_write_is_never_deleted(tmp_path: Path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    folder.mkdir()
    for place in (
        outside / "mine.txt",
        tmp_path / "absolute.txt",
        folder / "old.txt",
        folder / "foreign.txt",
    ):
        place.write_text("x")
    (folder / "link").symlink_to(outside)
    names = ["../outside/mine.txt", "link/mine.txt", str(tmp_path / "absolute.txt"), "old.txt"]
    outputs = dict.fromkeys(names, "0")
    stage = StageState(made_from={"seed": 0}, outputs=outputs)
    write_json(folder / "run.manifest.json", RunManifest(stages={"evaluate": stage}))

    with open_model_lazily(ModelConfig(), Listener()) as load:
        run = Run(
            recipe=Recipe(),
            folder=folder,
            manifest=read_run_manifest(folder),
            load=load,
            listener=Listener(),
        )
        begin_stage("evaluate", {"seed": 1}, run)

    assert (outside / "mine.txt").exists()
    assert (tmp_path / "absolute.txt").exists()
    assert (folder / "foreign.txt").exists()
    assert not (folder / "old.txt").exists()
    assert read_run_manifest(folder).stages["evaluate"].outputs == {}


@pytest.fixture
def old_folder(tmp_path):
    """A run folder with the results of an evaluation with other settings."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "old.json").write_text("{}")
    state = StageState(made_from={"seed": 0}, outputs={"old.json": "0"})
    write_json(folder / "run.manifest.json", RunManifest(stages={"evaluate": state}))
    return folder


RECIPE_OF_PATHS = Recipe(
    evaluate=EvaluateConfig(tasks="builtin_facts", paths="without:1"),
    has_routers=False,
)


def test_a_model_that_cannot_be_loaded_costs_no_earlier_result(old_folder, monkeypatch):
    @contextmanager
    def open_no_model(config, listener):
        def load():
            raise ModelError("there is no such device")

        yield load

    monkeypatch.setattr(run_folders, "open_model_lazily", open_no_model)
    with pytest.raises(ModelError, match="no such device"):
        run_recipe(RECIPE_OF_PATHS, old_folder, Listener())
    assert (old_folder / "old.json").read_text() == "{}"


def test_a_second_run_in_a_folder_is_refused(old_folder):
    with (
        only_writer(old_folder, "run", "--output-dir"),
        pytest.raises(RecordError, match="another run is writing to"),
    ):
        run_recipe(RECIPE_OF_PATHS, old_folder, Listener())
    assert (old_folder / "old.json").exists()
