from __future__ import annotations

import pytest

from drllm.cli import main
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
    assert main(["ls", "architectures"]) == 0
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
    assert main(["ls", "tasks"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    named = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert named["piqa"].startswith("loglikelihood, letter")
    assert named["winogrande"].startswith("only evaluated")
    assert named["hellaswag"].startswith("loglikelihood ")


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("baselines", ["permuted-routes", "greedy-by-loss", "block-repeat", "program-predictor"]),
        ("strategies", ["tree", "sweep", "walk"]),
        ("targets", ["least_kl", "shortest", "largest_margin", "paper", "released"]),
        ("policies", ["full", "routers", "label-frequency"]),
        ("rewards", ["loglikelihood", "letter", "boxed", "exact"]),
    ],
)
def test_a_registry_is_listed_with_what_each_name_is(
    what: str, names: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["ls", what]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    told = {line[0]: line[1:] for line in lines}
    assert all(len(told[name]) > 2 for name in names)


def test_what_is_no_list_and_a_model_without_effect_are_refused(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["ls", "task"]) == 2
    assert "did you mean 'tasks'" in capsys.readouterr().err
    assert main(["ls", "tasks", "--model", "smollm2-135m"]) == 2
    assert "--model has no effect on the list of tasks" in capsys.readouterr().err
