from __future__ import annotations

from drllm.evaluation.opponents import NOT_COMPARED, OPPONENTS
from drllm.evaluation.systems import DESCRIPTIONS


def test_every_opponent_of_a_comparison_is_in_the_table():
    assert {name for name in DESCRIPTIONS if name not in ("base", "routed")} <= set(OPPONENTS)


def test_every_opponent_says_in_a_line_what_it_is():
    for name, opponent in OPPONENTS.items():
        assert opponent.name == name
        for text in (opponent.description, opponent.source, opponent.fitted_on):
            assert text
            assert "\n" not in text


def test_what_is_not_compared_has_a_reason_and_is_no_opponent():
    assert set(NOT_COMPARED) == {"LayerSkip", "FlexiDepth"}
    assert all("needs" in reason for reason in NOT_COMPARED.values())
    assert not set(NOT_COMPARED) & set(OPPONENTS)
