import pytest
import torch

from drllm.training.trainer import hold_out, make_generator, shuffle_batches


def texts(number: int) -> list[str]:
    return [f"question {row}" for row in range(number)]


def test_the_parts_share_no_target_and_leave_none_out():
    trained, held_out = hold_out(texts(500), 0.1, seed=0)
    assert sorted(trained + held_out) == list(range(500))
    assert 25 < len(held_out) < 80


def test_more_targets_never_move_a_question_to_the_other_side():
    _, few = hold_out(texts(200), 0.1, seed=0)
    _, many = hold_out(texts(400), 0.1, seed=0)
    assert few == [row for row in many if row < 200]


def test_targets_of_one_question_stay_together():
    questions = [*texts(50), *(f"  Question   {row} " for row in range(50))]
    trained, held_out = hold_out(questions, 0.2, seed=0)
    assert held_out
    assert {row % 50 for row in held_out}.isdisjoint(row % 50 for row in trained)


def test_another_seed_holds_out_other_questions():
    assert hold_out(texts(200), 0.1, seed=0) != hold_out(texts(200), 0.1, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_ten_targets_are_enough_to_hold_out_one(seed):
    trained, held_out = hold_out(texts(10), 1e-9, seed=seed)
    assert len(held_out) == 1
    assert len(trained) == 9


@pytest.mark.parametrize(
    ("number", "fraction"), [(9, 0.5), (1, 0.5), (100, 0.0)], ids=["few", "one", "fraction 0"]
)
def test_nothing_is_held_out_of_few_targets_or_at_fraction_zero(number, fraction):
    assert hold_out(texts(number), fraction, seed=0) == (list(range(number)), [])


def test_targets_that_are_all_of_one_question_are_all_trained_on():
    assert hold_out(["the same"] * 20, 0.5, seed=0) == (list(range(20)), [])


def test_an_epoch_visits_every_target_once():
    batches = list(shuffle_batches([3, 5, 8, 9, 11], 2, seed=0, epoch=1))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(row for batch in batches for row in batch) == [3, 5, 8, 9, 11]


def test_the_order_is_a_function_of_seed_and_epoch():
    rows = list(range(50))
    first = list(shuffle_batches(rows, 8, seed=0, epoch=1))
    assert first == list(shuffle_batches(rows, 8, seed=0, epoch=1))
    assert first != list(shuffle_batches(rows, 8, seed=0, epoch=2))
    assert first != list(shuffle_batches(rows, 8, seed=1, epoch=1))


def test_what_is_drawn_depends_on_the_purpose_and_every_number():
    drawn = {
        torch.rand((), generator=make_generator(*seeds)).item()
        for seeds in [("a", 1, 2), ("b", 1, 2), ("a", 1, 3), ("a", 12), ("a", 1, 2)]
    }
    assert len(drawn) == 4
