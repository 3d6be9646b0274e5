"""Planners: what they read, how they are followed and trained, the router and the predictor."""

import itertools
import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from drllm.errors import RecordError
from drllm.evaluation.baselines.fitting.planners import (
    FULL_PATH_WEIGHT,
    LONGEST,
    MAXIMUM_PATHS,
    SequenceRouter,
    UpFrontPolicy,
    best_programs,
    find_bias,
    first_inputs,
    program_losses,
    programs_of,
    segments_of,
    train_predictor,
    train_sequence_router,
)
from drllm.models.routers.depth_control import routes_of
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question


@pytest.fixture(scope="module")
def prompts(some_prompts):
    return some_prompts(40)


@pytest.fixture(scope="module")
def planner(routed, prompts):
    router = SequenceRouter(first_inputs(routed, prompts), routed.num_layers)
    router.linear.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return router


def test_what_is_read_is_the_mean_embedding_of_each_prompt_alone(model, routed, prompts):
    found = first_inputs(routed, prompts)
    for prompt, row in zip(prompts, found, strict=True):
        expected = model.model.embed_tokens(torch.tensor(prompt)).mean(dim=0)
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_the_policy_follows_the_plans_of_each_prompt(routed, planner, prompts, bias):
    expected = planner.plans(first_inputs(routed, prompts), bias)
    routes = routes_of(routed, UpFrontPolicy(planner, bias), prompts, batch_size=7)
    assert torch.equal(routes, expected)
    assert len(set(map(tuple, routes.tolist()))) > 10


def test_a_scored_continuation_is_not_read(routed, planner, prompts):
    questions = [Question(prompt, [[10, 11, 12], [13], [14, 15]]) for prompt in prompts[:6]]
    policy = UpFrontPolicy(planner)
    _, routes = ChoiceBatch(routed, questions, 1.0).routed_scores(policy)
    assert torch.equal(routes, routes_of(routed, policy, prompts[:6]))


@pytest.mark.parametrize("executions", [1.2, 2.0, 3.3, 4.0, 6.5])
def test_the_bias_gives_the_wanted_executions_when_the_policy_runs(
    routed, planner, prompts, executions
):
    found = find_bias(planner, first_inputs(routed, prompts), executions)
    assert found.executions == pytest.approx(executions, abs=1 / len(prompts))
    routes = routes_of(routed, UpFrontPolicy(planner, found.value), prompts)
    assert float(routes.sum(dim=1).double().mean()) == found.executions


def test_a_row_that_would_skip_everything_runs_the_last_layer(planner):
    assert planner.plans(torch.zeros(2, 32), 1000.0).tolist() == [[0, 0, 0, 1]] * 2


def test_scaled_inputs_have_mean_0_and_deviation_1_but_where_nothing_varies():
    inputs = 3 + 0.01 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    inputs[:, 2] = 7.0
    scaled = SequenceRouter(inputs, 4).scaled(inputs)
    assert scaled[:, 2].tolist() == [0.0] * 200
    others = scaled[:, [0, 1, 3, 4]]
    torch.testing.assert_close(others.mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(others.std(dim=0, correction=0), torch.ones(4))


N, D, L = 200, 24, 10


@pytest.fixture(scope="module")
def examples():
    """Prompts of three kinds, each with decisions of its own."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (N,), generator=generator)
    plans = torch.multinomial(
        torch.tensor([0.3, 0.6, 0.1]), 3 * L, replacement=True, generator=generator
    ).view(3, L)
    inputs = 0.02 * torch.randn(N, D, generator=generator)
    inputs[:, :3] += 0.1 * torch.eye(3)[kinds]
    return inputs, plans[kinds]


def test_decisions_that_follow_from_the_prompt_are_learned(examples):
    inputs, labels = examples
    router = train_sequence_router(inputs[:150], labels[:150])
    found = router.plans(inputs[150:], 0.0)
    assert float((found == labels[150:]).double().mean()) > 0.95


def test_the_same_seed_trains_the_same_planner_and_another_seed_another(examples, searched):
    records = [searched(row, [((1, 1, 1), 1), ((1, 0, row % 3), 1)]) for row in range(N)]
    before = torch.get_rng_state()
    for train, learned in (
        (train_sequence_router, examples[1]),
        (train_predictor, programs_of(records)),
    ):
        first, again, other = (
            parameters_to_vector(train(examples[0], learned, seed=seed, num_epochs=2).parameters())
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state()), "the global generator stays as it was"


def test_a_step_is_that_of_adamw_on_the_mean_cross_entropy(examples):
    inputs, labels = examples
    found = train_sequence_router(inputs, labels, num_epochs=1, batch_size=N, held_out=0)
    weight = torch.zeros(3 * L, D, requires_grad=True)
    scaled = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0, correction=0)
    loss = 0.0
    for row in range(N):
        logits = (weight @ scaled[row]).view(L, 3)
        for layer in range(L):
            loss = loss - logits[layer].log_softmax(0)[labels[row, layer]] / (N * L)
    loss.backward()
    clear = weight.grad.abs() > 1e-5
    assert float(clear.double().mean()) > 0.5
    # The first step of Adam goes by the gradient's sign, as far as the learning rate.
    expected = -3e-3 * weight.grad.sign()
    torch.testing.assert_close(found.linear.weight[clear], expected[clear], atol=1e-5, rtol=0)


def test_the_rate_falls_to_zero_over_all_steps(examples, monkeypatch):
    rates = []
    real = torch.optim.AdamW.step

    def noting(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    train_sequence_router(*examples, num_epochs=2, learning_rate=0.5, held_out=0.25)
    steps = 2 * math.ceil(0.75 * N / 16)
    assert rates == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    )


def test_the_weights_kept_are_those_that_do_best_on_examples_held_out():
    """With labels that nothing foretells, learning longer only does harm."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, D, generator=generator)
    labels = torch.randint(3, (60, L), generator=generator)
    fresh_inputs = torch.randn(500, D, generator=generator)
    fresh_labels = torch.randint(3, (500, L), generator=generator)

    def loss(held_out):
        router = train_sequence_router(
            inputs, labels, num_epochs=300, learning_rate=0.05, held_out=held_out
        )
        logits = router(fresh_inputs).flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, fresh_labels.flatten()))

    assert loss(0.2) < 0.5 * loss(0.0)


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


NUM, SIZE = 120, 16


@pytest.fixture
def searches(record):
    """Prompts of three kinds; each kind has a valid program of its own."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (NUM,), generator=generator)
    inputs = 0.02 * torch.randn(NUM, SIZE, generator=generator)
    inputs[:, :3] += 0.1 * torch.eye(3)[kinds]
    own = [(1, 0, 0, 1, 1, 1), (1, 1, 2, 1, 1, 1), (0, 1, 1, 1, 1, 0)]
    records = [
        record(row, [own[kind]], [FULL, own[(kind + 1) % 3]])
        for row, kind in enumerate(kinds.tolist())
    ]
    return inputs, records, torch.tensor(own)[kinds]


def test_programs_that_follow_from_the_prompt_are_learned(searches):
    inputs, records, labels = searches
    predictor = train_predictor(inputs[:90], programs_of(records[:90]))
    found = predictor.plans(inputs[90:], 0.0)
    assert float((found == labels[90:]).all(dim=1).double().mean()) > 0.9


def test_where_a_shorter_path_is_valid_the_full_path_counts_less(searches, record):
    inputs, _, _ = searches
    records = [record(row, [FULL, (1, 0, 1, 1, 1, 1)]) for row in range(NUM)]
    predictor = train_predictor(inputs, programs_of(records))
    assert predictor.plans(inputs, 0.0).tolist() == [[1, 0, 1, 1, 1, 1]] * NUM


def test_questions_without_a_valid_path_teach_nothing(searches, record):
    inputs, records, _ = searches
    some = [r if row % 2 else record(row, [], [FULL]) for row, r in enumerate(records)]
    first = train_predictor(inputs, programs_of(some), num_epochs=2)
    again = train_predictor(inputs[1::2], programs_of(records[1::2]), num_epochs=2)
    assert torch.equal(first.queries, again.queries)
