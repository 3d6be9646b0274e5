"""The baselines by name, and what is refused of the settings that name them."""

import os
import subprocess
import sys

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError
from drllm.evaluation.baselines.base import (
    check_baseline_settings,
    list_baselines,
    needs_targets,
    select_baselines,
)

NAMES = [
    *("permuted routes", "random decisions", "label frequency", "last layers", "evenly spaced"),
    *("block influence", "greedy by loss", "greedy by answers", "confidence exit"),
    "sequence router",
]


def test_baselines_are_found_by_their_modules_in_the_order_of_tables():
    assert select_baselines("all") == NAMES == [baseline.name for baseline in list_baselines()]
    assert select_baselines("none") == []
    assert select_baselines("quick") == NAMES[:5]
    assert select_baselines("sequence_router, last-layers") == ["last layers", "sequence router"]


def test_baselines_are_listed_without_torch():
    code = (
        "import sys\nfrom drllm.evaluation.baselines.base import list_baselines\n"
        "assert len(list_baselines()) == 10\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_a_name_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown baseline 'sleb'.* greedy-by-loss"):
        select_baselines("sleb")


def test_files_are_asked_for_where_a_baseline_is_fitted_on_them():
    assert not needs_targets("quick")
    assert needs_targets("all")
    check_baseline_settings(EvaluateConfig(baselines="sequence-router", supervision="x"))
    with pytest.raises(ConfigError, match=r"--supervision x has no effect .* sequence-router"):
        check_baseline_settings(EvaluateConfig(baselines="block-influence", supervision="x"))


def test_draws_that_no_baseline_has_a_use_for_are_refused():
    said = "--num-random-draws 9 has no effect .*; leave it out, or add permuted-routes"
    with pytest.raises(ConfigError, match=said):
        check_baseline_settings(EvaluateConfig(num_random_draws=9, baselines="last-layers"))
    check_baseline_settings(EvaluateConfig(num_random_draws=9))


def test_every_baseline_says_in_a_line_what_it_is():
    for baseline in list_baselines():
        for text in (baseline.description, baseline.source, baseline.fitted_on):
            assert text
            assert "\n" not in text
    reading = {baseline.name for baseline in list_baselines() if baseline.reads_question}
    assert reading == {"confidence exit", "sequence router"}
