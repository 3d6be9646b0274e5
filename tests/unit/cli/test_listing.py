from pathlib import Path

import pytest

from drllm.models import check
from drllm.models import families as table
from drllm.models.families import FAMILIES, REFUSED


def test_architectures_are_tried_with_class_status_difference_and_refit(drllm, monkeypatch):
    few = {family: FAMILIES[family] for family in ("gpt2", "lfm2")}
    for module in (table, check):  # not the table itself, whose order other tests read
        monkeypatch.setattr(module, "FAMILIES", few)
    said = drllm("ls architectures --try")
    lines = said.out.splitlines()
    [gpt2] = [line.split() for line in lines if line.startswith(" gpt2")]
    assert gpt2[:3] == ["gpt2", "GPT2LMHeadModel", "exact"]
    assert all(0 < float(number) < 1e-3 for number in gpt2[3:5])
    assert gpt2[5:] == ["yes"]
    [lfm2] = [line for line in lines if line.startswith(" lfm2")]
    assert lfm2.split()[:6] == ["lfm2", "Lfm2ForCausalLM", "refused", "–", "–", "–"]
    assert "conv" in lfm2
    assert "1 exact, 1 refused" in lines
    assert "2/2 families" in said.err


@pytest.mark.parametrize(
    ("family", "counts", "says"),
    [("gpt_neox", "1 exact", "GPTNeoXForCausalLM"), ("mamba", "1 refused", "K/V")],
)
def test_a_model_of_the_users_is_checked_alone_and_refusing_it_is_no_error(
    family, counts, says, drllm, tmp_path, tiny_model, tiny_tokenizer
):
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    out = drllm("ls architectures --model", tmp_path).out
    assert says in out
    assert counts in out.splitlines()


def test_families_are_listed_as_exact_or_refused_with_the_reason(drllm):
    lines = drllm("ls architectures").out.splitlines()
    assert "gpt2" in next(line for line in lines if line.startswith("exact"))
    [mamba] = [line for line in lines if line.startswith("refused") and "mamba" in line]
    assert "gpt2" not in mamba
    assert mamba.endswith(": some layers keep a state other than keys and values")


def test_the_page_on_architectures_counts_the_families_that_are_routed():
    page = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text(encoding="utf-8")
    routed = len(FAMILIES) - sum(map(len, list(REFUSED.values())[:2]))
    assert f"{routed} families are routed" in page


def test_tasks_are_listed_with_their_rewards_or_as_only_evaluated(drllm):
    lines = [line.split() for line in drllm("ls tasks").out.splitlines()]
    named = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert named["piqa"].startswith("loglikelihood, letter")
    assert named["mmlu_cloze"].startswith("only evaluated")
    assert named["hellaswag"].startswith("loglikelihood ")


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("baselines", ["permuted-routes", "greedy-by-loss", "sequence-router"]),
        ("strategies", ["tree", "walk"]),
        ("targets", ["least_kl", "shortest", "largest_margin", "paper", "released"]),
        ("policies", ["fixed", "full", "routers"]),
        ("rewards", ["loglikelihood", "letter", "boxed", "exact"]),
    ],
)
def test_a_registry_is_listed_with_what_each_name_is(what: str, names: list[str], drllm):
    lines = [line.split() for line in drllm("ls", what).out.splitlines() if line.strip()]
    told = {line[0]: line[1:] for line in lines}
    assert all(len(told[name]) > 2 for name in names)
