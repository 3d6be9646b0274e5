import dataclasses
import math

import pytest

from drllm.config import (
    DepthConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
)
from drllm.config.fields import from_dict, to_flag
from drllm.errors import ConfigError

GROUPS = [
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
    GenerateConfig,
    DepthConfig,
    EvaluateConfig,
]
FIELDS = [(group, declared) for group in GROUPS for declared in dataclasses.fields(group)]


def test_a_warm_up_above_one_step_is_a_whole_number_of_steps():
    assert [TrainConfig(warmup_steps=n).warmup_steps for n in (0, 0.1, 1, 500)] == [0, 0.1, 1, 500]
    with pytest.raises(ConfigError, match=r"--warmup-steps is 2\.5; give a whole number of steps"):
        TrainConfig(warmup_steps=2.5)


def test_the_settings_of_search_and_training_are_the_papers():
    search, train = SearchConfig(), TrainConfig()
    assert (search.num_simulations, search.budget) == (50, 2.0)
    assert (search.exploration_constant, search.length_penalty) == (1.8, 3.0)
    assert search.random_child_probability == 0.1
    assert (train.num_epochs, train.learning_rate, train.weight_decay) == (25, 1e-3, 0.01)
    assert train.gradient_accumulation == 16
    assert (train.num_windows, train.router_width) == (8, 128)
    assert (train.gamma, train.beta) == (2.0, 0.999)


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_has_a_line_of_help_and_a_group_comes_back_from_plain_types(group):
    for declared in dataclasses.fields(group):
        text = declared.metadata["help"]
        assert text.strip() == text != ""
        assert not text.endswith(".")
    assert from_dict(group, group().to_dict(), "here") == group()


@pytest.mark.parametrize("group", GROUPS)
def test_every_bound_is_kept_and_belongs_to_what_is_accepted(group):
    for declared in dataclasses.fields(group):
        rules = declared.metadata
        wrong = [
            (rules["minimum"], -1, "at least"),
            (rules["maximum"], 1, "at most"),
            (rules["above"], 0, "above"),
        ]
        for bound, step, wanted in wrong:
            if bound is not None:
                with pytest.raises(ConfigError, match=f"--.*{wanted} {bound}") as caught:
                    group(**{declared.name: bound + step})
                assert str(caught.value).startswith(to_flag(declared.name))
        if rules["choices"]:
            with pytest.raises(ConfigError, match=f"{to_flag(declared.name)}: .*Valid: "):
                group(**{declared.name: "no such choice"})
        edges = [bound for bound, step, _ in wrong if bound is not None and step]
        for value in [declared.default, *edges, *(rules["choices"] or ())]:
            assert getattr(group(**{declared.name: value}), declared.name) == value


WHOLE, FINITE = "give a whole number", "give a finite number"
UNKNOWN_DEVICE = "unknown device .*Valid: auto, cpu, cuda, mps"


@pytest.mark.parametrize(
    ("group", "name", "value", "said"),
    [
        *((SearchConfig, "budget", value, FINITE) for value in (math.nan, -math.inf)),
        *((SearchConfig, "budget", value, FINITE) for value in (10**4000, 2**63 + 1)),
        *((SearchConfig, "budget", value, "give a number") for value in ("2", [2.0])),
        *((SearchConfig, "num_simulations", value, WHOLE) for value in ("50", 50.0, True, None)),
        (SearchConfig, "limit", "all", "give a whole number or nothing"),
        (SearchConfig, "data_dir", False, "give text or nothing"),
        *((SearchConfig, "data_dir", value, "give a text") for value in ("", " ", "a\0b")),
        (SearchConfig, "reward", "boxed,leter", "unknown value 'leter'; did you mean 'letter'"),
        (ModelConfig, "trust_remote_code", 1, "give true or false"),
        *((ModelConfig, "device", value, UNKNOWN_DEVICE) for value in ("cdua", "gpu", "cuda:")),
        *((ModelConfig, "device", value, UNKNOWN_DEVICE) for value in ("cpu:x", "meta")),
        (GenerateConfig, "temperature", 1e-40, "or 0 for greedy decoding"),  # overflows
    ],
)
def test_a_value_that_does_not_fit_is_refused(group, name, value, said):
    with pytest.raises(ConfigError, match=f"^{to_flag(name)}(:| is) .*{said}"):
        group(**{name: value})


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (SearchConfig, "limit", "x" * 100_000),
        (SearchConfig, "limit", ["x"] * 100_000),
        (SearchConfig, "data_dir", "\0" * 100_000),
        (SearchConfig, "reward", "x" * 100_000),
        (ModelConfig, "device", "x" * 100_000),
    ],
)
def test_of_a_long_value_a_message_shows_the_beginning(group, name, value):
    with pytest.raises(ConfigError, match="…") as caught:
        group(**{name: value})
    assert len(str(caught.value)) < 500


def test_a_message_has_the_flag_that_help_shows():
    with pytest.raises(ConfigError, match=r"^--tasks is 5; give text"):
        SearchConfig(dataset=5)


def test_a_number_without_a_point_and_a_list_of_rewards_fit():
    assert SearchConfig(budget=2).budget == 2
    assert SearchConfig(reward="letter,boxed").reward == "letter,boxed"


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({}, None),
        ({"depth_bias": 0.0}, None),
        ({"depth_bias": -0.1}, "depth_bias"),
        ({"router_penalty": 0.0}, "router_penalty"),
        ({"static_routing": True}, "static_routing"),
        ({"target_executions": 20, "calibration": "prompts.jsonl"}, "target_executions"),
    ],
)
def test_the_setting_that_changes_the_depth_is_found(given, setting):
    assert DepthConfig(**given).find_setting() == setting


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"depth_bias": 1.0, "router_penalty": 0.5},
            "--depth-bias and --router-penalty would each set the depth",
        ),
        (
            {"target_executions": 20.0, "calibration": "x.jsonl", "static_routing": True},
            "--target-executions and --static-routing would each set",
        ),
        (
            {"depth_bias": 1.0, "router_penalty": 0.5, "static_routing": True},
            "--depth-bias and --router-penalty and --static-routing would each set",
        ),
        ({"target_executions": 20.5}, "--target-executions 20.5 needs prompts; give a file"),
        ({"calibration": "x.jsonl"}, "--calibration x.jsonl has no effect without --target-exec"),
    ],
)
def test_depth_settings_that_contradict_one_another_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        DepthConfig(**given).check_combination()


@pytest.mark.parametrize(
    ("settings", "is_timed"),
    [
        ({}, False),
        ({"latency": True}, True),
        ({"latency_rounds": 5}, True),
        ({"latency_rounds": 0}, False),
        ({"latency": True, "latency_rounds": 0}, False),
        ({"latency_rounds": 5, "latency_read": 16, "latency_seconds": 90.0}, True),
    ],
)
def test_asking_for_rounds_asks_for_the_time_and_no_rounds_for_none(settings, is_timed):
    config = EvaluateConfig(**settings)
    config.check_effects()
    assert config.latency == is_timed


IDLE = [(group, declared) for group, declared in FIELDS if declared.metadata["no_effect_if"]]


@pytest.mark.parametrize(("group", "declared"), IDLE, ids=[f.name for _, f in IDLE])
def test_a_setting_that_another_leaves_without_effect_is_refused(group, declared):
    other, value = declared.metadata["no_effect_if"]
    rules = declared.metadata
    given = True if declared.default is False else 0.5 if rules["above"] == 0 else rules["minimum"]
    given = "auto" if given is None else given
    assert given != declared.default
    switch = next(f for f in dataclasses.fields(group) if f.name == other)
    some = {"curve": "0.1", "target_executions": 2.0, "reward": "own.py:reward"}
    some = some.get(other, True if other == "latency" else 0.5)
    options = [some] if switch.metadata["choices"] is None else switch.metadata["choices"]
    on = next(option for option in options if option != value)
    group(**{declared.name: given, other: on}).check_effects()
    group(**{other: value}).check_effects()
    with pytest.raises(ConfigError, match="no effect with(out)? --" + other.replace("_", "-")):
        group(**{declared.name: given, other: value}).check_effects()
