"""KL against a plain model that lists the path's layers, and torch's own KL divergence."""

import pytest
import torch

from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.answers import AnswerBatch
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request
from slow_way import FULL, kls_alone, never, prefixes, some_pairs

TOLERANCE = 2e-5
"""Nats a token, on KLs of 0.1 to 10. 4e-6 was measured."""

STEM = [60, 61, 62, 63, 64, 65, 66, 67, 68]
OWN = [[5, 6, 7, 8, 9], [20], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
CONTINUATIONS = [[[10], [11, 12, 13]], [[30, 31, 32, 33], [34]], [[50, 51], [52, 53]]]
PROMPTS = {"apart": OWN, "one beginning": [STEM + own for own in OWN]}


def measured(routed, tokenizer, contexts, pairs, reward, **options):
    """Return the KL of each pair by one way of asking."""
    gb = options.pop("gb", 1.0)
    if reward == "choices":
        questions = [Request(c, more) for c, more in zip(contexts, CONTINUATIONS, strict=True)]
        batch = ChoiceBatch(routed, questions, gb, **options)
        return [score.kl for score in batch.scores(pairs, kl=True)], batch
    batch = AnswerBatch(routed, tokenizer, contexts, gb, **options)
    answers = batch.answers(pairs, [3] * len(pairs), never, kl=True)
    return [answer.kl for answer in answers], batch


@pytest.mark.parametrize("reward", ["choices", "answers"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_kl_is_the_mean_kl_from_the_full_path_over_the_prompt(
    tiny_llama, tiny_tokenizer, reward, prompts
):
    model, contexts = tiny_llama(eos_token_id=None), PROMPTS[prompts]
    pairs = some_pairs(20)
    expected = kls_alone(model, contexts, pairs)
    assert min(expected) > 0.01, "the paths must do some KL"
    kls, _ = measured(RoutedModel(model), tiny_tokenizer, contexts, pairs, reward)
    assert expected == pytest.approx(kls, abs=TOLERANCE)


@pytest.mark.parametrize("reward", ["choices", "answers"])
def test_the_full_path_does_no_kl(tiny_llama, tiny_tokenizer, reward):
    pairs = [(0, FULL), (1, (1, 1, 0, 1, 1, 1)), (2, FULL), (1, FULL)]
    kls, _ = measured(RoutedModel(tiny_llama()), tiny_tokenizer, OWN, pairs, reward)
    assert [kls[place] for place in (0, 2, 3)] == [0.0, 0.0, 0.0]
    assert kls[1] > 0.01


@pytest.mark.parametrize("reward", ["choices", "answers"])
def test_kl_does_not_depend_on_what_memory_holds_or_how_paths_are_split(
    tiny_llama, tiny_tokenizer, reward
):
    routed, contexts = RoutedModel(tiny_llama(eos_token_id=None)), PROMPTS["one beginning"]
    pairs = some_pairs(12, seed=1)
    at_once, _ = measured(routed, tiny_tokenizer, contexts, pairs, reward)
    # 10 kB hold the distributions of one row at most: those of the others come anew.
    split, batch = measured(
        routed, tiny_tokenizer, contexts, pairs, reward, gb=10e-6, paths_per_pass=1
    )
    assert at_once == pytest.approx(split, abs=TOLERANCE)
    assert batch.states.num_bytes <= 10e3


@pytest.mark.parametrize("reward", ["choices", "answers"])
def test_nothing_is_measured_unless_asked_for(tiny_llama, tiny_tokenizer, reward):
    routed, pairs = RoutedModel(tiny_llama(eos_token_id=None)), some_pairs(4)
    kls, with_it = measured(routed, tiny_tokenizer, OWN, pairs, reward)
    assert None not in kls
    if reward == "choices":
        questions = [Request(c, more) for c, more in zip(OWN, CONTINUATIONS, strict=True)]
        without = ChoiceBatch(routed, questions, 1.0)
        assert {score.kl for score in without.scores(pairs)} == {None}
    else:
        without = AnswerBatch(routed, tiny_tokenizer, OWN, 1.0)
        found = without.answers(pairs, [3] * 4, never)
        assert {answer.kl for answer in found} == {None}
    full = {(row, FULL) for row, _ in pairs}
    assert len(prefixes(pairs)) == without.states.executions_run, "no full path is run beside"
    assert len(prefixes([*pairs, *full])) == with_it.states.executions_run


@pytest.mark.parametrize("broken", ["path", "full path"])
def test_what_overflows_has_no_kl(tiny_llama, tiny_tokenizer, broken):
    model = tiny_llama(eos_token_id=None)
    batch = AnswerBatch(RoutedModel(model), tiny_tokenizer, OWN, 1.0)
    path = (1, 1, 1, 1, 1, 2)
    if broken == "path":  # the last layer's second run is all that is then left to run
        [full] = batch.answers([(0, FULL)], [1], never, kl=True)
        assert full.kl == 0.0
    model.model.layers[5].mlp.register_forward_hook(lambda _m, _a, out: out * float("inf"))
    [answer] = batch.answers([(0, path)], [1], never, kl=True)
    assert answer.kl is None


def test_kl_in_half_precision_is_computed_in_float32(tiny_llama, tiny_tokenizer):
    model = tiny_llama().to(torch.bfloat16)
    pairs = some_pairs(6)
    expected = kls_alone(model, OWN, pairs)
    kls, _ = measured(RoutedModel(model), tiny_tokenizer, OWN, pairs, "choices")
    # bfloat16 has 8 bits: batched arithmetic differs from a row alone by about a hundredth.
    assert expected == pytest.approx(kls, rel=0.1)
