"""Trackers are told of a training under known names, and change nothing about it."""

import sys
import time
from dataclasses import replace

import pytest
from small import IDENTITY, QUICK, BrokenOffError, make_features, stop_at

from drllm.errors import ConfigError
from drllm.models.routers.checkpoint import load_routers
from drllm.training import CHECKPOINT_FILE
from drllm.training.stage import train_seed
from drllm.training.trackers import FOLDER, RUN_FILE, check_trackers

TENSORBOARD, WANDB = (replace(QUICK, report_to=name) for name in ("tensorboard", "wandb"))
FEATURES = make_features(40)
SINGLE = 1e-6
"""TensorBoard keeps float32."""
DEFINED = ("routers_loss", "accuracy", "macro_f1", "f1_execute", "avg_layers", "learning_rate")


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """W&B without a network or a trace in the user's home; each run with what it is told."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    start, runs = wandb.init, []

    def init(**options):
        run, history = start(**options), []
        log = run.log
        run.log = lambda values, **step: (history.append(values), log(values, **step))
        runs.append((run.id, dict(run.config), history))
        return run

    monkeypatch.setattr(wandb, "init", init)
    return runs


def scalars(folder) -> dict[str, dict[int, float]]:
    """Every curve that TensorBoard shows of a folder: name → step → value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / FOLDER / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


@pytest.mark.parametrize(
    "tracker", ["tensorboard", pytest.param("wandb", marks=pytest.mark.thorough)]
)
def test_a_tracker_changes_no_file_of_the_routers(tmp_path, tracker, request):
    pytest.importorskip(tracker)
    if tracker == "wandb":
        request.getfixturevalue("offline")
    plain = train_seed(FEATURES, IDENTITY, QUICK, tmp_path / "plain" / "routers")
    tracked = replace(QUICK, report_to=tracker)
    assert plain == train_seed(FEATURES, IDENTITY, tracked, tmp_path / "tracked" / "routers")
    for path in (tmp_path / "plain" / "routers").iterdir():
        assert path.read_bytes() == (tmp_path / "tracked" / "routers" / path.name).read_bytes()
    assert not (tmp_path / "tracked" / "routers" / RUN_FILE).exists()
    assert (tmp_path / "tracked" / "routers" / FOLDER).is_dir()


def test_tensorboard_is_told_of_every_step_and_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    rows = train_seed(FEATURES, IDENTITY, TENSORBOARD, tmp_path)
    trained = load_routers(tmp_path).config.training
    steps = trained["steps"] // QUICK.num_epochs
    curves = scalars(tmp_path)
    for row in rows:
        for name in DEFINED:
            if name in row:
                value = curves[f"{row['split']}/{name}"][row["epoch"] * steps]
                assert value == pytest.approx(row[name], rel=SINGLE)
    assert list(curves["step/macro_f1"]) == list(range(1, trained["steps"] + 1))
    # An epoch's loss is that of its steps, weighted by their examples.
    sizes = [4] * (steps - 1) + [trained["num_trained"] - 4 * (steps - 1)]
    first = [curves["step/routers_loss"][step] for step in range(1, steps + 1)]
    mean = sum(n * loss for n, loss in zip(sizes, first, strict=True)) / sum(sizes)
    assert mean == pytest.approx(rows[0]["routers_loss"], rel=SINGLE)


def interrupted(config, folder) -> None:
    with pytest.raises(BrokenOffError):
        train_seed(FEATURES, IDENTITY, config, folder, listener=stop_at(15))
    assert (folder / CHECKPOINT_FILE).exists()


@pytest.mark.thorough
def test_a_resumed_training_goes_on_in_the_same_curves_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train_seed(FEATURES, IDENTITY, TENSORBOARD, tmp_path / "whole")
    interrupted(TENSORBOARD, tmp_path / "broken")
    time.sleep(1.1)  # TensorBoard reads files in the order of their names: seconds, then process
    train_seed(FEATURES, IDENTITY, TENSORBOARD, tmp_path / "broken")
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "broken")


@pytest.mark.thorough
def test_wandb_offline_keeps_settings_and_curves(tmp_path, offline):
    rows = train_seed(FEATURES, IDENTITY, WANDB, tmp_path)
    ((_, config, history),) = offline
    assert list(tmp_path.glob(f"{FOLDER}/wandb/offline-run-*/*.wandb"))
    settings = {name: v for name, v in QUICK.decisive().items() if v is not None}
    assert settings.items() <= config.items()
    losses = [line["step/routers_loss"] for line in history if "step/routers_loss" in line]
    assert len(losses) == load_routers(tmp_path).config.training["steps"]
    for split in ("train", "validation"):
        name = f"{split}/macro_f1"
        values = [line[name] for line in history if name in line]
        assert values == [row["macro_f1"] for row in rows if row["split"] == split]


@pytest.mark.thorough
def test_wandb_offline_goes_on_under_the_same_id_in_a_second_folder(tmp_path, offline):
    interrupted(WANDB, tmp_path)
    train_seed(FEATURES, IDENTITY, WANDB, tmp_path)
    first, second = offline
    assert first[0] == second[0] != ""
    assert len(list(tmp_path.glob(f"{FOLDER}/wandb/offline-run-*/*.wandb"))) == 2


@pytest.mark.thorough
def test_a_wandb_run_of_the_caller_is_left_alone(tmp_path, offline):
    import wandb

    own = wandb.init(project="own", dir=str(tmp_path))
    train_seed(make_features(), IDENTITY, WANDB, tmp_path / "routers")
    assert wandb.run is own
    own.log({"still": 1})  # it would be refused after an end
    own.finish()


@pytest.mark.parametrize(("name", "install"), [("wandb", '.*"wandb>='), ("mlflow", "mlflow")])
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(
    monkeypatch, name, install
):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"--report-to .*{name}, .* pip install {install}"):
        check_trackers([name])


def test_a_tracker_that_cannot_start_is_named_in_one_line(tmp_path, monkeypatch, offline):
    import wandb

    def refuse(**_):
        raise wandb.Error("no key\nis there")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match="--report-to wandb can't start: no key is there; fix"):
        train_seed(make_features(), IDENTITY, WANDB, tmp_path)


def test_names_are_told_apart_by_commas_each_once():
    tracked = replace(QUICK, report_to="wandb, tensorboard,wandb")
    assert (tracked.trackers, QUICK.trackers) == (["wandb", "tensorboard"], [])
