"""What is made of the systems of a task: curve, seeds and findings."""

import random
from types import SimpleNamespace

import pytest

from drllm.config import EvaluateConfig
from drllm.evaluation.findings import describe_seeds
from drllm.evaluation.judge import build_evaluation, correct_tables, list_drop_candidates
from drllm.evaluation.outcomes import SeedRuns, SystemRun, TaskRuns
from drllm.evaluation.plan import name_depth
from drllm.evaluation.tables import build_curve, build_table, compare_seeds
from drllm.paths import StaticPath
from drllm.records.manifest import new_manifest
from drllm.statistics.exclusion import DropTest, Limits, TaskTest, Trial, exclude_drop
from drllm.statistics.intervals import wilson_interval
from drllm.statistics.paired import paired_interval

RIGHT_80 = [1.0] * 80 + [0.0] * 20
RIGHT_50 = [1.0] * 50 + [0.0] * 50
HEADER = new_manifest("evaluation", model={}, config={})
HEADER |= {"runtime": {}, "routers": "routers", "routers_sha256": "0"}


def run(name, correct, setting="", executions=27.0, losses=(), num_routes=7, **values):
    routes = [[(1, 2, place % num_routes) for place in range(len(correct))]]
    return SystemRun(
        name=name,
        setting=setting,
        executions=30.0 if name == "base" else executions,
        correct=list(correct),
        gold_logprob=values.pop("gold", [-1.0] * len(correct)),
        text_loss=list(losses),
        metrics={"acc": list(correct)},
        routes=values.pop("routes", routes),
        **values,
    )


def runs(*systems, chance=0.25, seeds=(), notes=()):
    task = SimpleNamespace(
        name="a_task", chance=chance, kind="choices", metric="acc", num_fewshot=0
    )
    task.num_questions, task.num_available, task.not_asked = len(systems[0].correct), None, {}
    return TaskRuns(
        rendered=SimpleNamespace(task=task, ids=list(range(task.num_questions))),
        systems=systems,
        notes=notes,
        config=EvaluateConfig(),
        num_layers=30,
        shape="it has experts",
        seeds=seeds,
    )


def evaluation(*systems, **options):
    found = runs(*systems, **options)
    table = build_table(found)
    return build_evaluation(found, table, build_curve(found, table), HEADER)


def said(*systems, **options):
    return " ".join(evaluation(*systems, **options).findings)


@pytest.mark.parametrize(
    ("base", "routed", "shown"), [(RIGHT_80, RIGHT_50, "lower"), (RIGHT_50, RIGHT_80, "higher")]
)
def test_findings_are_the_sentences_of_the_verdicts(base, routed, shown):
    gold = [-1.5 + place / 1000 for place in range(100)]
    found = evaluation(
        run("base", base, losses=[3.3] * 40),
        run("routed", routed, gold=gold, losses=[5.0 + place / 99 for place in range(40)]),
    )
    against = found.routed.against_base
    assert against.accuracy.shown == shown
    assert against.gold_logprob.shown == "lower"
    assert against.text_loss.shown == "higher"  # users read it: a loss that rises is said
    assert found.headline == found.write_headline()
    verdicts = (against.accuracy, against.text_loss, against.gold_logprob)
    assert found.findings == tuple(verdict.sentence() for verdict in verdicts)


@pytest.mark.parametrize("permuted", [[0.05] * 50 + [0.0] * 50, [0.5] * 100])
def test_nothing_is_claimed_where_the_base_may_be_guessing(permuted):
    base, routed = ([1.0] * right + [0.0] * (100 - right) for right in (20, 60))
    found = evaluation(run("base", base), run("routed", routed), run("permuted routes", permuted))
    assert "may be guessing" in found.headline
    assert "not shown to be above chance (25.0 %)" in found.findings[0]
    assert "no verdict (base is not shown to be above chance)" in found.findings[1]
    for system in found.systems[1:]:
        assert system.against_base.accuracy.shown == "guessing"
    assert found.systems[2].routed_against.accuracy.shown == "guessing"
    assert "shown to be better" not in " ".join(found.findings)
    assert "is excluded" not in " ".join(found.findings)


@pytest.mark.parametrize(
    ("executions", "words"),
    [
        (27.0, "Use routing (27 of 30 layers)"),
        (33.0, "Don't use routing (33 of 30 layers): it saves no layers"),
    ],
)
def test_saved_and_spent_executions_are_told_apart(executions, words):
    systems = run("base", RIGHT_50), run("routed", RIGHT_50, executions=executions)
    assert evaluation(*systems).headline.startswith(words)


@pytest.mark.parametrize(
    ("permuted", "shown"), [([0.5] * 50 + [0.0] * 50, "higher"), (RIGHT_80, "lower")]
)
def test_routes_permuted_over_the_questions_decide_whether_reading_matters(permuted, shown):
    others = run("permuted routes", permuted, routes=[[(0, 0, 0)] * 100])
    found = evaluation(run("base", RIGHT_50), run("routed", RIGHT_50), others)
    verdict = found.systems[2].routed_against.accuracy
    assert verdict.shown == shown
    said = verdict.sentence("routed", "its own routes permuted over the questions")
    assert said in found.findings


@pytest.mark.parametrize(("unchanged", "is_said"), [(1, False), (12, True)])
def test_routes_that_the_permutation_left_in_place_are_mentioned(unchanged, is_said):
    routed = run("routed", RIGHT_50)
    routes = [
        route if place < unchanged else (0, 0, 0) for place, route in enumerate(routed.routes[0])
    ]
    permuted = run("permuted routes", RIGHT_50, routes=[routes])
    text = said(run("base", RIGHT_50), routed, permuted)
    assert ("12.0 % of the questions kept their route by chance" in text) == is_said


def test_a_single_route_for_all_questions_makes_permuting_say_nothing():
    routed = run("routed", RIGHT_50, num_routes=1)
    text = said(run("base", RIGHT_50), routed, run("permuted routes", RIGHT_50))
    assert "All questions took one route, so permuting says nothing." in text


def test_notes_of_the_task_and_of_systems_and_what_is_not_derived_are_said_once():
    systems = (run("base", RIGHT_50), run("routed", RIGHT_50, notes=["runs slowly"]))
    assert evaluation(*systems, notes=["a note", "a note"]).notes == (
        "A note.",
        "FLOPs and K/V bytes are not derived: it has experts.",
        "Routed: runs slowly.",
    )


def beside_routers(routed=27.4, drop_test=None):
    """Return an evaluation in which one path is much more accurate, the other nearer."""
    right = [1.0] * 95 + [0.0] * 5
    paths = {name: StaticPath(range(n)) for name, n in (("best", 29), ("near", 28), ("far", 20))}
    systems = [
        run(
            name, right if name == "best" else RIGHT_50, executions=len(p.layers), path=p, routes=[]
        )
        for name, p in paths.items()
    ]
    routed = run("routed", RIGHT_80, executions=routed, losses=[3.2] * 40)
    found = runs(run("base", RIGHT_50, losses=[3.3] * 40), routed, *systems)
    steps = {name: path.layers for name, path in paths.items()}
    table = build_table(found)
    header = HEADER | {"paths": steps}
    return build_evaluation(found, table, build_curve(found, table), header, drop_test)


def test_a_depth_that_no_task_has_is_a_candidate_that_was_not_evaluated():
    found = runs(run("base", RIGHT_50), run("routed", RIGHT_50))
    tables = {"a_task": build_table(found)}
    curves = {"a_task": build_curve(found, build_table(found))}
    candidates = list_drop_candidates(tables, curves, [name_depth(0.9)])
    assert candidates == {"routed, 90 % saved": {"a_task": None}}
    test = exclude_drop(candidates, Limits(max_drop=50))
    assert test.chosen is None
    assert "it was not evaluated" in test.sentence()
    assert list(list_drop_candidates(tables, curves)) == ["routed"]


def test_beside_routers_a_path_is_named_that_no_score_has_picked():
    assert beside_routers().best_path.name == "near"
    assert beside_routers(routed=21.0).best_path.name == "far"
    trial = Trial(name="far", tasks=(TaskTest(task="a_task"),))
    found = beside_routers(drop_test=DropTest(limits=Limits(max_drop=50), trials=(trial,)))
    assert found.best_path.name == "far"
    assert found.headline.startswith("Use path far (")
    assert found.headline_system is found.best_path


def test_the_headline_is_about_routing_if_it_answers_better_and_the_findings_about_both():
    found = beside_routers()
    path = found.best_path
    assert found.headline_system is found.routed
    assert found.headline.startswith("Use routing (27.4 of 30 layers): it answers better")
    assert "path near (28 of 30 layers)" in found.headline
    for name, differences in (("routed", found.routed), ("path near", path)):
        assert differences.against_base.accuracy.sentence(name) in found.findings
        text_loss = differences.against_base.text_loss
        assert text_loss is None or text_loss.sentence(name) in found.findings
    assert path.routed_against.accuracy.sentence("routed", "path near") in found.findings


def test_rows_hold_accuracy_interval_and_differences_to_base_and_routed():
    base, routed = run("base", RIGHT_80), run("routed", RIGHT_50)
    found = evaluation(base, routed, run("last layers", RIGHT_80))
    assert [each.against_base is None for each in found.systems] == [True, False, False]
    assert [each.routed_against is None for each in found.systems] == [True, True, False]
    assert found.base.interval == wilson_interval(80, 100)
    assert found.systems[2].routed_against.accuracy.interval == paired_interval(0, 30, 100)


def test_a_curve_has_base_first_and_each_system_from_the_most_executions_to_the_fewest():
    base, routed = run("base", RIGHT_80), run("routed", RIGHT_50)
    at_depths = [
        run(name, RIGHT_50, setting, executions)
        for setting, executions in (("20 % saved", 24.0), ("10 % saved", 27.0))
        for name in ("routed", "last layers")
    ]
    curve = evaluation(base, routed, *at_depths).curve
    assert [point.name for point in curve] == [
        "base",
        "routed, 10 % saved",
        "routed, 20 % saved",
        "last layers, 10 % saved",
        "last layers, 20 % saved",
    ]
    assert [point.routed_against is None for point in curve] == [True] * 3 + [False] * 2
    assert curve[3].routed_against.accuracy.mean == 0.0
    assert evaluation(base, routed).curve == ()


def test_tables_of_several_tasks_are_corrected_system_by_system():
    found = runs(run("base", RIGHT_50), run("routed", RIGHT_80))
    tables = correct_tables([build_table(found), build_table(found)])
    [first, second] = [table[1].against_base.accuracy for table in tables]
    assert first.p_corrected == second.p_corrected == 2 * first.p
    assert first.num_tests == 2
    assert tables[0][0].against_base is None
    [alone] = correct_tables([build_table(found)])
    assert alone == list(build_table(found))


def seeds_of(base, routed, permuted):
    return compare_seeds(runs(base, chance=-1.0), SeedRuns(routed, permuted))


def at(correct, name="routed", executions=9.0):
    gold = [-value for value in correct]
    return run(name, correct, "10 % saved", executions, gold=gold)


def test_the_interval_over_questions_does_not_know_how_far_seeds_lie_apart():
    # Each seed is right everywhere or nowhere: the mean is the same on every question.
    seeds = seeds_of(at([0.0] * 20, "base"), [at([1.0] * 20), at([0.0] * 20)], [])
    assert seeds.against_base.accuracy.interval == (0.5, 0.5)
    assert seeds.accuracy.deviation > 0.7
    assert (seeds.accuracy.lowest, seeds.accuracy.highest) == (0.0, 1.0)


def test_averaging_over_seeds_narrows_the_interval_only_as_far_as_they_disagree():
    rng = random.Random(0)
    alike = [float(rng.random() < 0.5) for _ in range(200)]
    apart = [[float(rng.random() < 0.5) for _ in range(200)] for _ in range(4)]

    def width(by_seed):
        base = at([0.0] * 200, "base")
        seeds = seeds_of(base, [at(values) for values in by_seed], [])
        low, high = seeds.against_base.gold_logprob.interval
        return high - low

    assert width([alike] * 4) == pytest.approx(width([alike]))
    assert width(apart) == pytest.approx(width([alike]) / 2, rel=0.2)


def test_differences_are_those_of_the_mean_over_seeds_question_by_question():
    routed = [at([1.0, 1.0, 0.0, 1.0], executions=8.0), at([0.0, 1.0, 0.0, 0.0])]
    permuted = [at([0.0, 0.0, 0.0, 1.0]), at([0.0, 0.0, 1.0, 1.0])]
    seeds = seeds_of(at([0.0, 1.0, 0.0, 1.0], "base"), routed, permuted)
    assert (seeds.setting, seeds.num_seeds) == ("10 % saved", 2)
    assert seeds.executions.mean == 8.5
    assert seeds.against_base.accuracy.mean == 0.0
    assert seeds.against_permuted.accuracy.mean == pytest.approx(0.125)
    assert (seeds.text_loss, seeds.against_base.text_loss) == (None, None)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_the_sentence_on_seeds_holds_the_spread_and_both_differences(num_seeds):
    routed = [at([0.5, 1.0, 0.0, 1.0]), at([0.0, 1.0, 0.5, 0.0])][:num_seeds]
    seeds = seeds_of(at([0.0, 1.0, 0.0, 1.0], "base"), routed, routed)
    text = describe_seeds(seeds)
    assert text.startswith(f"Routers of {num_seeds} seeds at 10 % saved: accuracy")
    assert ("standard deviation" in text) == (num_seeds > 1)
    assert seeds.against_base.accuracy.sentence("their mean", "base") in text
    permuted = seeds.against_permuted.accuracy
    assert permuted.sentence("their mean", "their own routes permuted") in text
