import dataclasses

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
from drllm.config.settings import flag_of, from_dict
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


def test_the_search_settings_are_the_papers():
    config = SearchConfig()

    assert (config.num_simulations, config.budget) == (50, 2.0)
    assert (config.exploration_constant, config.length_penalty) == (1.8, 3.0)
    assert config.random_child_probability == 0.1


def test_the_training_settings_are_the_papers():
    config = TrainConfig()

    assert (config.num_epochs, config.learning_rate, config.weight_decay) == (25, 1e-3, 0.01)
    assert (config.warmup_steps, config.gradient_accumulation) == (500, 16)
    assert (config.num_windows, config.router_width) == (8, 128)
    assert (config.gamma, config.beta) == (2.0, 0.999)


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_has_one_line_of_help(group):
    for declared in dataclasses.fields(group):
        text = declared.metadata["help"]
        assert 0 < len(text) <= 80, declared.name
        assert "\n" not in text


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
                assert str(caught.value).startswith(flag_of(declared.name))
        if rules["choices"]:
            with pytest.raises(ConfigError, match=f"{flag_of(declared.name)}: .*Valid: "):
                group(**{declared.name: "no such choice"})
        edges = [bound for bound, step, _ in wrong if bound is not None and step]
        for value in [declared.default, *edges, *(rules["choices"] or ())]:
            assert getattr(group(**{declared.name: value}), declared.name) == value


@pytest.mark.parametrize("group", GROUPS)
def test_settings_come_back_from_plain_types(group):
    assert from_dict(group, group().to_dict(), "here") == group()


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchConfig().budget = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 10**4000, 2**63 + 1])
def test_a_number_that_is_not_finite_or_too_large_is_refused(value):
    with pytest.raises(ConfigError, match=r"--budget is .*; give a finite number"):
        SearchConfig(budget=value)


@pytest.mark.parametrize("value", ["", " ", "a\0b"])
def test_a_text_that_names_nothing_is_refused(value):
    with pytest.raises(ConfigError, match="--data-dir is "):
        SearchConfig(data_dir=value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("num_simulations", "50", "give a whole number"),
        ("num_simulations", 50.0, "give a whole number"),
        ("num_simulations", True, "give a whole number"),
        ("num_simulations", None, "give a whole number"),
        ("limit", "all", "give a whole number or nothing"),
        ("budget", "2", "give a number"),
        ("budget", [2.0], "give a number"),
        ("dataset", 5, "give text"),
        ("data_dir", False, "give text or nothing"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, wanted):
    with pytest.raises(ConfigError, match=wanted):
        SearchConfig(**{name: value})


def test_a_number_without_a_point_is_a_number():
    assert SearchConfig(budget=2).budget == 2


def test_a_number_in_a_switch_is_refused():
    with pytest.raises(ConfigError, match=r"--trust-remote-code is 1; give true or false"):
        ModelConfig(trust_remote_code=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cdua", "gpu", "cuda:", "cpu:x", "meta"])
def test_an_unknown_device_is_refused_with_the_list(name):
    with pytest.raises(
        ConfigError, match=r"--device: unknown device .*Valid: auto, cpu, cuda, mps"
    ):
        ModelConfig(device=name)


def test_an_unknown_setting_comes_with_its_place_and_the_nearest():
    with pytest.raises(ConfigError, match="search: unknown setting 'buget'; did you mean 'budget'"):
        from_dict(SearchConfig, {"buget": 2.0}, "search")


@pytest.mark.parametrize(
    ("given", "knob"),
    [
        ({}, None),
        ({"depth_bias": 0.0}, None),
        ({"depth_bias": -0.1}, "depth_bias"),
        ({"router_penalty": 0.0}, "router_penalty"),
        ({"static_routing": True}, "static_routing"),
        ({"target_executions": 20, "calibration": "prompts.jsonl"}, "target_executions"),
    ],
)
def test_the_depth_control_says_which_knob_is_turned(given, knob):
    assert DepthConfig(**given).knob() == knob


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"depth_bias": 1.0, "router_penalty": 0.5},
            "--depth-bias and --router-penalty are given, but only one of them can set the depth",
        ),
        (
            {"target_executions": 20.0, "calibration": "x.jsonl", "static_routing": True},
            "--target-executions and --static-routing are given",
        ),
        (
            {"depth_bias": 1.0, "router_penalty": 0.5, "static_routing": True},
            "--depth-bias, --router-penalty and --static-routing are given",
        ),
        ({"target_executions": 20.5}, "--target-executions 20.5 needs prompts to look on; give"),
        ({"calibration": "x.jsonl"}, "--calibration x.jsonl has no effect without --target-exec"),
    ],
)
def test_knobs_that_contradict_one_another_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        DepthConfig(**given).knob()


def test_a_reward_that_is_not_there_is_refused_in_a_list_too():
    assert SearchConfig(reward="letter,boxed").reward == "letter,boxed"
    with pytest.raises(ConfigError, match="--reward: unknown value 'leter'; did you mean 'letter'"):
        SearchConfig(reward="boxed,leter")


def test_some_tasks_may_have_limits_of_their_own():
    config = EvaluateConfig(limit=200, limits="gsm8k=30, arc_easy=all")
    assert [config.limit_of(task) for task in ("gsm8k", "arc_easy", "mmlu")] == [30, None, 200]


@pytest.mark.parametrize("limits", ["gsm8k", "gsm8k=0", "=3", "a=1,a=2", "a=x"])
def test_what_is_no_limit_is_refused(limits):
    with pytest.raises(ConfigError, match=r"--limits: .* doesn't fit"):
        EvaluateConfig(limits=limits).limit_of("a")


def test_some_tasks_may_have_splits_of_their_own():
    config = EvaluateConfig(splits="gsm8k=select")
    assert [config.split_of(task) for task in ("gsm8k", "mmlu")] == ["select", "test"]
    with pytest.raises(ConfigError, match="'gsm8k=train' doesn't fit; give TASK= and search, fit"):
        EvaluateConfig(splits="gsm8k=train").split_of("gsm8k")


IDLE = [(group, declared) for group, declared in FIELDS if declared.metadata["idle"]]


@pytest.mark.parametrize(("group", "declared"), IDLE, ids=[f.name for _, f in IDLE])
def test_a_setting_that_another_leaves_without_effect_is_refused(group, declared):
    other, value = declared.metadata["idle"]
    rules = declared.metadata
    given = True if declared.default is False else 0.5 if rules["above"] == 0 else rules["minimum"]
    assert given != declared.default
    default = next(f.default for f in dataclasses.fields(group) if f.name == other)
    group(**{declared.name: given}, **({other: 0.5} if default == value else {})).check_effects()
    group(**{other: value}).check_effects()
    with pytest.raises(ConfigError, match="has no effect with --" + other.replace("_", "-")):
        group(**{declared.name: given, other: value}).check_effects()
