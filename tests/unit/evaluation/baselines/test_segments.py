from __future__ import annotations

import itertools

import pytest
import torch

from drllm.errors import RecordError
from drllm.evaluation.baselines.fitting.planners import (
    FULL_PATH_WEIGHT,
    LONGEST,
    MAXIMUM_PATHS,
    best_programs,
    program_losses,
    programs_of,
    segments_of,
    train_predictor,
)


@pytest.fixture
def record(searched):
    """A function that returns one question's search: the full path first, in whichever list."""

    def make(number, valid, invalid=()):
        tried = sorted([*((d, 1.0) for d in valid), *((d, 0.0) for d in invalid)])
        tried.sort(key=lambda pair: pair[0] != (1,) * len(pair[0]))
        return searched(number, tried)

    return make


def every_program(num_layers):
    """All ways of cutting layers into segments with operations: lists of (decision, length)."""
    if num_layers == 0:
        yield []
    for decision, longest in LONGEST.items():
        for length in range(1, min(longest, num_layers) + 1):
            for rest in every_program(num_layers - length):
                yield [(int(decision), length), *rest]


def decisions_of(program):
    return tuple(decision for decision, length in program for _ in range(length))


def test_segments_are_the_fewest_that_give_the_decisions():
    programs = {}
    for program in every_program(6):
        programs.setdefault(decisions_of(program), []).append(program)
    assert set(programs) == set(itertools.product(range(3), repeat=6))
    for decisions, ways in programs.items():
        found = segments_of(decisions)
        starts = [start for start, _ in found]
        lengths = [b - a for a, b in zip(starts, [*starts[1:], 6], strict=True)]
        program = [(d, length) for (_, d), length in zip(found, lengths, strict=True)]
        assert program in ways
        fewest = min(map(len, ways))
        longest_first = max([length for _, length in way] for way in ways if len(way) == fewest)
        assert [length for _, length in program] == longest_first


FULL, SHORT, LONG = (1,) * 6, (1, 0, 1, 1, 1, 1), (1, 2, 1, 1, 1, 1)


def test_every_valid_program_is_learned_with_its_weight(record):
    first = record(0, [FULL, SHORT], [LONG])
    others = [record(2, [FULL, LONG], [SHORT]), record(3, [SHORT, LONG], [FULL])]
    found = programs_of([first, record(1, [], [FULL, SHORT]), *others])
    assert found.questions.tolist() == [0, 2, 3]
    less = FULL_PATH_WEIGHT / 2
    assert found.starts[:, 0].tolist() == pytest.approx([0.5 + less, 1.0, 1.0])
    assert found.starts[0].tolist() == pytest.approx([0.5 + less, 0.5, 0.5, 0.0, less, 0.0])
    # The full path has two segments, the shorter one three: layers 0, 1, and 2 to 5.
    assert found.operations[0, 0].tolist() == pytest.approx([0.0, 0.5 / 3 + less / 2, 0.0])
    assert found.operations[0, 1].tolist() == pytest.approx([0.5 / 3, 0.0, 0.0])
    assert found.operations.sum(dim=(1, 2)).tolist() == pytest.approx(found.starts[:, 0].tolist())


def test_of_many_valid_programs_some_are_drawn(record):
    many = [d for d in itertools.product((0, 1), repeat=6) if any(d)]
    records = [record(0, many)]
    found = programs_of(records)
    assert len(many) > MAXIMUM_PATHS
    # Each of the fifty weighs 1/50, the full path less if it was drawn.
    assert any(
        float(found.starts[0, 0]) == pytest.approx(1 - less / MAXIMUM_PATHS)
        for less in (0.0, 1 - FULL_PATH_WEIGHT)
    )
    assert torch.equal(found.starts, programs_of(records).starts)
    assert not torch.equal(found.operations, programs_of(records, seed=1).operations)


def test_a_log_without_a_program_to_learn_is_refused(record):
    with pytest.raises(RecordError, match="no question of these search records has a valid path"):
        programs_of([record(0, [], [FULL])])


def random_logits(num_rows, num_layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    starts = 2 * torch.randn(num_rows, num_layers, generator=generator, dtype=torch.float64)
    shape = (num_rows, num_layers, 3)
    return starts, 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bias", [0.0, 0.8, -0.8])
def test_the_best_program_equals_that_of_trying_all_of_them(bias):
    starts, operations = random_logits(10, 6)
    found = best_programs(starts, operations, bias)
    start, inside = starts.sigmoid().log().tolist(), (-starts).sigmoid().log().tolist()
    operation = operations.log_softmax(-1).tolist()
    for row in range(10):
        scores = {}
        for program in every_program(6):
            score, layer = 0.0, 0
            for decision, length in program:
                score += start[row][layer] if layer else 0.0
                score += sum(inside[row][layer + 1 : layer + length])
                score += operation[row][layer][decision] - bias * decision * length
                layer += length
            scores[tuple(program)] = score
        best = max(scores, key=scores.get)
        assert tuple(found[row].tolist()) == decisions_of(best)


def test_executions_only_fall_as_the_price_rises():
    starts, operations = random_logits(30, 12, seed=1)
    counts = [best_programs(starts, operations, b).sum(dim=1) for b in torch.arange(-3, 3, 0.1)]
    for dearer, cheaper in itertools.pairwise(counts):
        assert bool((cheaper <= dearer).all())
    assert int(counts[0].sum()) > int(counts[-1].sum())


def test_the_loss_equals_that_of_one_program_and_one_layer_at_a_time(record):
    starts, operations = random_logits(2, 6, seed=2)
    valid = [[FULL, SHORT, LONG], [LONG, (0, 0, 1, 1, 1, 0)]]
    programs = programs_of([record(0, valid[0]), record(1, valid[1], [FULL])])
    found = program_losses(starts, operations, programs, torch.tensor([0, 1]))
    for row, of_question in enumerate(valid):
        expected = 0.0
        for decisions in of_question:
            first = dict(segments_of(decisions))
            of_starts = [
                -float((starts[row, i] if i in first else -starts[row, i]).sigmoid().log())
                for i in range(1, 6)
            ]
            each = [-float(operations[row, i].softmax(0)[d].log()) for i, d in first.items()]
            weight = (FULL_PATH_WEIGHT if decisions == FULL else 1.0) / len(of_question)
            expected += weight * (sum(of_starts) / 5 + sum(each) / len(first))
        assert float(found[row]) == pytest.approx(expected)


N, D = 120, 16


@pytest.fixture
def examples(record):
    """Prompts of three kinds; each kind has a valid program of its own."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (N,), generator=generator)
    inputs = 0.02 * torch.randn(N, D, generator=generator)
    inputs[:, :3] += 0.1 * torch.eye(3)[kinds]
    own = [(1, 0, 0, 1, 1, 1), (1, 1, 2, 1, 1, 1), (0, 1, 1, 1, 1, 0)]
    records = [
        record(row, [own[kind]], [FULL, own[(kind + 1) % 3]])
        for row, kind in enumerate(kinds.tolist())
    ]
    return inputs, records, torch.tensor(own)[kinds]


def test_programs_that_follow_from_the_prompt_are_learned(examples):
    inputs, records, labels = examples
    predictor = train_predictor(inputs[:90], programs_of(records[:90]))
    found = predictor.plans(inputs[90:], 0.0)
    assert float((found == labels[90:]).all(dim=1).double().mean()) > 0.9


def test_where_a_shorter_path_is_valid_the_full_path_counts_less(examples, record):
    inputs, _, _ = examples
    records = [record(row, [FULL, (1, 0, 1, 1, 1, 1)]) for row in range(N)]
    predictor = train_predictor(inputs, programs_of(records))
    assert predictor.plans(inputs, 0.0).tolist() == [[1, 0, 1, 1, 1, 1]] * N


def test_questions_without_a_valid_path_teach_nothing(examples, record):
    inputs, records, _ = examples
    some = [r if row % 2 else record(row, [], [FULL]) for row, r in enumerate(records)]
    first = train_predictor(inputs, programs_of(some), num_epochs=2)
    again = train_predictor(inputs[1::2], programs_of(records[1::2]), num_epochs=2)
    assert torch.equal(first.queries, again.queries)
