"""The arithmetic of the report, against counts done by hand."""

from __future__ import annotations

from drllm.cost import executions
from drllm.paths import Decision
from drllm.records import SearchRecord, TriedPath
from drllm.reporting.results import Evaluation
from drllm.reporting.samples import Outcome, Sample
from drllm.reporting.summary import (
    choose_examples,
    edit_effects,
    mean_length,
    shares,
)


def tried(decisions: tuple[int, ...], reward: float, margin: float | None) -> TriedPath:
    return TriedPath(
        decisions=decisions,
        simulation=0,
        reward=reward,
        margin=margin,
        executions=executions(decisions),
    )


def searched(*paths: TriedPath) -> SearchRecord:
    return SearchRecord(
        id="q",
        task="t",
        question="Why?",
        prompt="Why?",
        answer="So",
        reward="loglikelihood",
        num_layers=3,
        paths=paths,
        seconds=1.0,
    )


def test_shares_are_counted_by_layer():
    rows = [(0, 1, 2), (1, 1, 2), (1, 1, 0), (1, 1, 1)]
    assert shares(rows, Decision.SKIP) == [0.25, 0.0, 0.25]
    assert shares(rows, Decision.REPEAT) == [0.0, 0.0, 0.5]


def test_effects_count_only_paths_with_that_single_edit():
    records = [
        searched(
            tried((1, 1, 1), 1.0, 0.5),
            tried((0, 1, 1), 0.0, -0.5),
            tried((0, 0, 1), 0.0, -9.0),  # two edits
            tried((2, 1, 1), 1.0, 0.75),  # another edit
        ),
        searched(tried((1, 1, 1), 0.0, -0.25), tried((0, 1, 1), 1.0, 0.25)),
    ]
    (skip,) = edit_effects(records, Decision.SKIP)
    assert (skip.layer, skip.questions, skip.reward, skip.margin) == (0, 2, 0.0, -0.25)
    (repeat,) = edit_effects(records, Decision.REPEAT)
    assert (repeat.layer, repeat.questions, repeat.reward, repeat.margin) == (0, 1, 0.0, 0.25)


def test_an_effect_without_margins_has_none():
    records = [searched(tried((1, 1, 1), 1.0, None), tried((1, 0, 1), 0.0, None))]
    (effect,) = edit_effects(records, Decision.SKIP)
    assert effect.reward == -1.0
    assert effect.margin is None


def test_no_rows_have_no_mean_length():
    assert mean_length([]) is None
    assert mean_length([(1, 0), (2, 2)]) == 2.5


def sample(name: str, base: float, routed: float, route: tuple[int, ...] | None) -> Sample:
    return Sample(
        id=name,
        question=f"question {name}",
        choices=("a", "b"),
        gold=0,
        outcomes={
            "base": Outcome(correct=base, gold_logprob=None, decisions=(1, 1, 1)),
            "routed": Outcome(correct=routed, gold_logprob=None, decisions=route),
        },
    )


def chosen(*samples: Sample) -> list[tuple[str, str]]:
    evaluation = Evaluation(
        task="t",
        split="test",
        num_questions=len(samples),
        num_layers=3,
        chance=0.5,
        systems=(),
        findings=(),
        samples=samples,
    )
    return [(kind, found.id) for kind, found in choose_examples(evaluation)]


def test_examples_are_the_first_won_the_first_lost_and_the_cheapest_unchanged():
    assert chosen(
        sample("same", 1, 1, (1, 1, 1)),
        sample("lost", 1, 0, (1, 0, 1)),
        sample("won", 0, 1, (1, 2, 1)),
        sample("won later", 0, 1, (0, 0, 1)),
        sample("cheap", 0, 0, (1, 0, 0)),
    ) == [
        ("First question won", "won"),
        ("First question lost", "lost"),
        ("Unchanged, fewest executions", "cheap"),
    ]


def test_missing_kinds_of_example_are_filled_with_the_first_others():
    assert chosen(
        sample("a", 1, 1, (1, 1, 1)),
        sample("b", 1, 1, (1, 0, 1)),
        sample("c", 0, 0, (1, 1, 1)),
        sample("d", 0, 0, (1, 1, 1)),
    ) == [
        ("Unchanged, fewest executions", "b"),
        ("First of the others", "a"),
        ("First of the others", "c"),
    ]


def test_questions_without_a_route_are_never_examples():
    assert chosen(sample("a", 0, 1, None), sample("b", 1, 1, (1, 1, 0))) == [
        ("Unchanged, fewest executions", "b")
    ]
