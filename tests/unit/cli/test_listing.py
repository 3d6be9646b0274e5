from __future__ import annotations

import pytest

from drllm.cli import main
from drllm.cli.listing import list_what
from drllm.cli.terminal import Terminal
from drllm.errors import ConfigError
from drllm.models import check


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_tokenizer):
    """A function that saves a tiny model of a family with a tokenizer."""

    def save(family: str):
        place = tmp_path / family
        tiny_model(family).save_pretrained(place)
        tiny_tokenizer.save_pretrained(place)
        return str(place)

    return save


def test_architectures_are_listed_with_class_status_and_difference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    few = {name: check.FAMILIES[name] for name in ("gpt2", "lfm2")}
    monkeypatch.setattr(check, "FAMILIES", few)
    list_what("architectures", Terminal())
    out, err = capsys.readouterr()
    lines = out.splitlines()
    [gpt2] = [line.split() for line in lines if line.startswith(" gpt2")]
    assert gpt2[:3] == ["gpt2", "GPT2LMHeadModel", "exact"]
    assert all(0 < float(number) < 1e-3 for number in gpt2[3:])
    [lfm2] = [line for line in lines if line.startswith(" lfm2")]
    assert lfm2.split()[:5] == ["lfm2", "Lfm2ForCausalLM", "refused", "–", "–"]
    assert "conv" in lfm2
    assert "1 exact, 1 refused" in lines
    assert "2 of 2 families" in err


def test_a_model_of_the_users_is_checked_alone(folder, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", "architectures", "--model", folder("gpt_neox")]) == 0
    out = capsys.readouterr().out
    assert "GPTNeoXForCausalLM" in out
    assert "1 exact" in out.splitlines()


def test_a_model_of_the_users_that_cannot_be_routed_is_no_error(
    folder, capsys: pytest.CaptureFixture[str]
):
    assert main(["ls", "architectures", "--model", folder("mamba")]) == 0
    out = capsys.readouterr().out
    assert "1 refused" in out.splitlines()
    assert "K/V" in out


def test_tasks_are_listed_with_their_rewards_or_as_only_evaluated(
    capsys: pytest.CaptureFixture[str],
):
    list_what("tasks", Terminal())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    named = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert named["piqa"].startswith("loglikelihood, letter")
    assert named["winogrande"].startswith("only evaluated")
    assert named["hellaswag"].startswith("loglikelihood ")


@pytest.mark.parametrize("what", ["tasks", "models"])
def test_a_model_is_refused_where_it_has_no_effect(what: str):
    with pytest.raises(ConfigError, match=rf"--model has no effect on the list of {what}"):
        list_what(what, Terminal(), "smollm2-135m")


def test_an_unknown_list_is_an_error_with_the_lists_there_are():
    with pytest.raises(
        ConfigError, match="Valid: architectures, baselines, models, policies, tasks"
    ):
        list_what("archi", Terminal())


def test_baselines_are_listed_with_what_they_are_fitted_on_and_those_that_are_not_compared(capsys):
    list_what("baselines", Terminal())
    said = capsys.readouterr().out
    for name in ("permuted-routes", "greedy-by-loss", "block-repeat", "program-predictor"):
        assert name in said
    assert "Not compared: LayerSkip" in said
