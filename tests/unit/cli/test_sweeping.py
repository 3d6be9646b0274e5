"""Sweep files: what they may hold, and what they are refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from drllm.errors import ConfigError
from drllm.pipeline.recipes import read_sweep

COMMON = "train: {num_epochs: 3}\nevaluate: {curve: '0.1', baselines: last-layers, epsilon: 2}\n"
SETTINGS = "settings:\n  plain: {}\n  sharp: {train: {gamma: 3.0}, supervise: {target: paper}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_setting_changes_what_it_says_and_nothing_else(tmp_path: Path):
    sweep = read_sweep(write(tmp_path, COMMON + SETTINGS))
    assert sweep.settings["plain"] == sweep.common
    sharp = sweep.settings["sharp"]
    assert (sharp.train.gamma, sharp.train.num_epochs) == (3.0, 3)
    assert sharp.supervise.target == "paper"
    assert sharp.evaluate == sweep.common.evaluate


def test_a_setting_is_chosen_on_select_by_the_routed_model_alone_maybe_on_fewer_questions(
    tmp_path: Path,
):
    text = COMMON + SETTINGS + "choose: {limit: 20, num-texts: 5}\n"
    sweep = read_sweep(write(tmp_path, text))
    config = sweep.choosing
    assert (config.split, config.baselines, config.curve) == ("select", "none", "0.1")
    assert config.epsilon is None
    assert (config.limit, config.num_texts) == (20, 5)
    assert {recipe.evaluate.limit for recipe in sweep.settings.values()} == {None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (COMMON, "'settings' is None; give at least two settings"),
        (COMMON + "settings: {one: {}}\n", "give at least two settings"),
        (COMMON + "settings: {a: {}, b: {train: {gama: 1}}}\n", "did you mean 'gamma'"),
        (COMMON + "settings: {a: {}, b: {trian: {gamma: 1}}}\n", "did you mean 'train'"),
        (COMMON + "settings: {a: {}, b: {search: {limit: 1}}}\n", "Valid: supervise, train"),
        (COMMON + "settings: {a: {}, b: 3}\n", "setting 'b' is 3; give sections"),
        (COMMON + "settings: {a: {}, b: {train: 3}}\n", "section 'train' is 3"),
        (COMMON + "settings: {a: {}, b: {}}\n", "settings 'a' and 'b' are the same"),
        (COMMON + "settings: {a: {}, ../b: {train: {gamma: 1}}}\n", "named '../b'"),
        (COMMON + SETTINGS + "choose: {curve: '0.2'}\n", "choose: unknown setting 'curve'"),
        (COMMON + SETTINGS + "choose: {limt: 9}\n", "did you mean 'limit'"),
        (COMMON + SETTINGS + "choose: {limit: few}\n", "'few'"),
        (COMMON + SETTINGS + "choose: 100\n", "section 'choose' is 100"),
        (SETTINGS, "a sweep compares at equal depths"),
        (
            "evaluate: {curve: '0.1', split: select}\n" + SETTINGS,
            "split is select, on which the setting is chosen",
        ),
        (
            "evaluate: {curve: '0.1', splits: builtin_facts=select}\n" + SETTINGS,
            "builtin_facts's split is select, on which the setting is chosen",
        ),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused_with_its_name(tmp_path: Path, text: str, says: str):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        read_sweep(path)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)
