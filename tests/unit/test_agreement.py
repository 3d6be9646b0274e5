"""Counts of hits add up, and baselines are what deciding label by label would score."""

import itertools
import math
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drllm.agreement import (
    ALWAYS_EXECUTE,
    LABEL_FREQUENCY,
    LAYER_MAJORITY,
    Counts,
    add_baselines,
    compare_by_layer,
    compute_metrics,
    count_baselines,
    count_expected,
    judge_routers,
)

ROUNDING = 1e-12
"""float64: sums of a few products in another order."""
NAMES = ("skip", "execute", "repeat")

cells = st.integers(0, 1000)
confusions = st.tuples(*[st.tuples(cells, cells, cells)] * 3)
counts = st.builds(
    Counts,
    confusion=st.tuples(confusions, confusions),
    executions=cells,
    examples=cells,
    loss=cells.map(float),
)


def count_pairs(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Counts:
    """Count label paths and decisions one by one."""
    layers = [[[0] * 3 for _ in range(3)] for _ in pairs[0][0]]
    for labels, decided in pairs:
        for layer, label, decision in zip(layers, labels, decided, strict=True):
            layer[label][decision] += 1
    return Counts(
        confusion=tuple(tuple(tuple(row) for row in layer) for layer in layers),
        executions=sum(max(1, sum(decided)) for _, decided in pairs),
        examples=len(pairs),
        loss=None,
    )


def some_labels(seed: int, rows: int = 7, layers: int = 3) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.choices((0, 1, 2), (3, 5, 1), k=layers)) for _ in range(rows)]


def labels_of(rows: list[tuple[int, ...]]) -> list[list[float]]:
    return [[float(layer.count(value)) for value in range(3)] for layer in zip(*rows, strict=True)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(counts, counts, counts)
def test_counts_add_up_in_any_order_from_nothing(one, two, three):
    assert (one + two) + three == one + (two + three)
    assert one + two == two + one
    assert Counts() + one == one == one + Counts()


def test_counts_of_other_depths_do_not_add_up():
    with pytest.raises(ValueError, match="shorter"):
        count_pairs([((1, 1), (1, 1))]) + count_pairs([((1,), (1,))])


@pytest.mark.parametrize("seed", range(3))
def test_constant_baselines_equal_a_count_label_by_label(seed):
    trained, held_out = some_labels(seed, rows=11), some_labels(seed + 50)
    result = count_baselines(labels_of(held_out), labels_of(trained))
    columns = list(zip(*trained, strict=True))
    commonest = tuple(max((1, 0, 2), key=column.count) for column in columns)
    for name, decided in ((ALWAYS_EXECUTE, (1, 1, 1)), (LAYER_MAJORITY, commonest)):
        assert result[name] == count_pairs([(labels, decided) for labels in held_out])


@pytest.mark.parametrize("seed", range(3))
def test_the_label_frequency_is_the_mean_over_all_draws_by_their_probability(seed):
    trained, held_out = some_labels(seed, rows=5), some_labels(seed + 50)
    shares = [[n / 5 for n in layer] for layer in labels_of(trained)]
    expected = [[[0.0] * 3 for _ in range(3)] for _ in range(3)]
    executions = 0.0
    for decided in itertools.product(range(3), repeat=3):
        chance = math.prod(shares[layer][value] for layer, value in enumerate(decided))
        one = count_pairs([(labels, decided) for labels in held_out])
        executions += chance * one.executions
        for layer, label, value in itertools.product(range(3), repeat=3):
            expected[layer][label][value] += chance * one.confusion[layer][label][value]
    result = count_baselines(labels_of(held_out), labels_of(trained))[LABEL_FREQUENCY]
    assert result.executions == pytest.approx(executions, rel=ROUNDING)
    for layer, expected_layer in zip(result.confusion, expected, strict=True):
        for row, expected_row in zip(layer, expected_layer, strict=True):
            assert row == pytest.approx(expected_row, rel=ROUNDING)


def test_always_execute_scores_as_counted_by_hand():
    result = compute_metrics(
        count_baselines([[1, 3, 0], [0, 4, 0]], [[1, 0, 0], [0, 0, 1]])[ALWAYS_EXECUTE]
    )
    assert result["accuracy"] == 7 / 8
    assert result["f1_execute"] == pytest.approx(14 / 15)
    assert result["f1_skip"] == 0.0
    assert result["f1_repeat"] is None  # neither a label nor decided
    assert result["macro_f1"] == pytest.approx(7 / 15)
    assert result["acc_skip"] == 0.0
    assert result["acc_repeat"] is result["routers_loss"] is None
    assert result["avg_layers"] == 2.0


def test_drawing_only_skips_still_costs_one_execution():
    assert count_expected([[1, 3, 0], [0, 4, 0]], [[1.0, 0.0, 0.0]] * 2).executions == 4


TRAINED = [(1, 1)] * 6 + [(0, 1)] * 2
JUDGED = [(1, 1), (1, 1), (0, 1), (1, 0)]


def judge_pairs(decided: list[tuple[int, ...]], times: int) -> str:
    trained = labels_of(TRAINED)
    pairs = list(zip(JUDGED * times, decided * times, strict=True))
    return judge_routers(
        {
            "train": add_baselines(count_pairs([(row, row) for row in TRAINED]), trained),
            "validation": add_baselines(count_pairs(pairs), trained),
        }
    )


@pytest.mark.parametrize(
    ("decided", "points", "claim"),
    [
        (JUDGED, "+25.0", "it is shown to be better; macro-F1 1.000 against 0.4"),
        ([(1, 1)] * 4, "0.0", "no difference is shown"),
        ([(0, 1), (1, 1), (0, 1), (0, 0)], "0.0", "; macro-F1 0.733 against 0.4"),
        ([(0, 0)] * 4, "−50.0", "it is shown to be worse; macro-F1 0.2"),
    ],
)
def test_the_verdict_is_that_of_the_paired_test_with_macro_f1_beside_it(decided, points, claim):
    sentence = judge_pairs(decided, 200)
    assert sentence.startswith(f"Accuracy of routers minus always execute: {points} points (95 %")
    assert "; 800 held-out targets, p = " in sentence
    assert claim in sentence
    assert sentence.endswith(" (label frequency).")


@pytest.mark.parametrize("times", [1, 2])
def test_too_few_held_out_targets_carry_no_verdict_but_the_number_that_would_do(times):
    sentence = judge_pairs(JUDGED, times)
    assert "; inconclusive: about " in sentence
    assert int(sentence.split("about ")[1].split()[0]) > 4 * times
    assert "better" not in sentence


def difference_in(sentence: str) -> tuple[float, float, float]:
    """The difference that a sentence prints and the ends of its interval, in points."""
    number = r"([−+]?[\d.]+)"
    result = re.search(rf"{number} points \(95 % interval {number} to {number};", sentence)
    difference, low, high = (float(text.replace("−", "-")) for text in result.groups())
    return difference, low, high


def test_the_printed_difference_is_that_of_the_accuracies_even_of_a_single_target():
    """Of 18 labels routers hit 13, always execute hits 17: accuracies of 0.722 and 0.944."""
    labels = (0,) + (1,) * 17
    decisions = (1,) + (0,) * 4 + (1,) * 13
    systems = add_baselines(count_pairs([(labels, decisions)]), labels_of([(1,) * 18] * 3))
    accuracies = [
        compute_metrics(systems[name])["accuracy"] for name in ("routers", ALWAYS_EXECUTE)
    ]
    assert accuracies == pytest.approx([13 / 18, 17 / 18])
    sentence = judge_routers({"validation": systems})
    assert difference_in(sentence)[0] == -22.2
    assert "; inconclusive: about " in sentence
    assert "won" not in sentence


@pytest.mark.parametrize("seed", range(5))
def test_the_printed_difference_and_its_interval_agree_with_the_accuracies(seed):
    pairs = list(zip(some_labels(seed + 50), some_labels(seed + 100), strict=True))
    systems = add_baselines(count_pairs(pairs), labels_of(some_labels(seed, rows=40)))
    accuracy = {name: compute_metrics(counts)["accuracy"] for name, counts in systems.items()}
    best = max(accuracy[ALWAYS_EXECUTE], accuracy[LAYER_MAJORITY])
    difference, low, high = difference_in(judge_routers({"validation": systems}))
    assert difference == pytest.approx(100 * (accuracy["routers"] - best), abs=0.051)
    assert low < difference < high


def test_no_held_out_targets_carry_no_verdict():
    few = add_baselines(count_pairs([(row, row) for row in JUDGED]), labels_of(TRAINED))
    sentence = judge_routers({"train": few})
    assert sentence.startswith("No targets were held out, so nothing says whether the routers beat")


def test_layers_at_which_routers_hit_more_than_the_majority_are_counted():
    systems = add_baselines(count_pairs([((0, 1), (0, 0)), ((1, 1), (1, 1))]), labels_of(TRAINED))
    assert compare_by_layer(systems) == (
        "The routers hit more labels than the layer's majority at 1 of 2 layers, fewer at 1."
    )
