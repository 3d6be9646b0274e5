"""The benchmarks run, and what they write says what was compared; no times are checked."""

import itertools
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drllm.config import ModelConfig, SearchConfig
from drllm.model.load import load
from drllm.models.routed_model import RoutedModel
from drllm.tasks.registry import get_task

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NOT_OF_TWO_WAYS = {
    *("learning", "serving"),  # what models answer
    *("all", "gpu"),  # made of others
    *("bypass", "refit"),  # losses, not times
    "quantised",  # several ways beside one
    "make_builtin_texts",  # makes a file
}
WITHOUT_COMPARISONS = {"driver", "search_quality"}  # figures other than times
SCRIPTS = sorted(file for file in BENCHMARKS.glob("*.py") if file.stem not in NOT_OF_TWO_WAYS)
NUM_LAYERS = 12


@pytest.fixture(scope="module")
def quality(benchmark):
    return benchmark("search_quality")


@pytest.fixture(scope="module")
def tiny_folder(model_folder):
    return model_folder(num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def figures_of(benchmark, tiny_folder, tmp_path_factory):
    """A function that runs a quick benchmark on a tiny model, and returns what it writes."""

    def run(name, *words, folder=tiny_folder):
        file = tmp_path_factory.mktemp("benchmark") / "figures.json"
        fixed = ["--quick", "--json", str(file), "--model", str(folder)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *fixed, *words])
            benchmark(name).main()
        return json.loads(file.read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def one_question(tiny_folder):
    """A function that returns a routed model, a task and some of its questions."""

    def make(number):
        base = load(ModelConfig(model=str(tiny_folder), dtype="float32", device="cpu"))
        task = get_task("builtin_facts")
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        return routed, task, task.examples("search")[:number]

    return make


@pytest.fixture(scope="module")
def generation(figures_of):
    """What the benchmark of generation writes."""
    return figures_of("generate")


@pytest.mark.thorough
def test_every_comparison_has_its_figure_and_limit(generation):
    ways = ("prefill_batch_1", "prefill_batch_8", "decode_batch_1", "decode_batch_8")
    expected = dict.fromkeys(ways, 1.02) | {"routers_prefill_batch_1": 1.01}
    for way in ("prefill", "decode"):
        for k in (3, 6, 10):
            for num_rows in (1, 8):
                limit = pytest.approx(1.03 * (1 - k / 12))
                expected[f"{way}_batch_{num_rows}_skip_{k}_of_12"] = limit
            shortened = f"{way}_shortened_without_{k}_of_12"  # the head stays, so less is saved
            assert 1 - 0.8 * k / 12 < generation["limits"][shortened] < 1
            expected[shortened] = generation["limits"][shortened]
    assert generation["limits"] == expected
    assert generation["is_met"].keys() == expected.keys()
    assert {*ways, "routers_prefill_batch_1"} <= generation["overhead"].keys()
    assert len(generation["speedup"]) == 4
    figures = generation["overhead"] | generation["share_of_the_time"] | generation["speedup"]
    assert figures == {name: middle for name, (_, middle, _) in generation["quartiles"].items()}


@pytest.mark.thorough
def test_rows_store_their_plans_byte_by_byte_and_answer_the_same_in_any_batch(generation):
    assert len(generation["stored"]) == 5
    for count in generation["stored"]:
        assert count["is_exact"], count
    skipped = next(c for c in generation["stored"] if c["case"] == "1 prompt, 10 layers skipped")
    assert skipped["bytes"] * NUM_LAYERS == skipped["bytes_untouched"] * (NUM_LAYERS - 10)
    assert set(generation["answers_that_differ"].values()) == {0}, "grouped and mixed batches"
    assert len(generation["share_of_the_bound"]) == 6
    assert min(generation["share_of_the_bound"].values()) > 0


@pytest.mark.parametrize("script", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_a_benchmark_names_nothing_that_is_gone(script, benchmark):
    assert benchmark(script).main


def test_a_missed_limit_is_said_plainly(benchmark):
    figure = benchmark("generate").Figure
    assert str(figure("a", "decode", [1.01, 1.05, 1.06], 1.03)).endswith("MISSED")
    assert str(figure("a", "decode", [1.01, 1.03, 1.06], 1.03)).endswith("met")


@pytest.fixture(scope="module")
def strategies(figures_of):
    return figures_of("search_quality")


@pytest.mark.thorough
def test_strategies_spend_nearly_the_same_executions_and_the_re_test_only_takes_away(strategies):
    assert strategies["strategies"].keys() == {"tree", "walk"}
    assert strategies["speedup"].keys() == {"tree / walk"}
    allowance = strategies["executions_a_question"]
    for figures in itertools.chain(*strategies["strategies"].values()):
        # Less than one more path of 2L executions is left over.
        assert allowance - 2 * NUM_LAYERS < figures["executions"] <= allowance
        for name in ("valid", "saving", "improving"):
            assert figures[f"{name} after"] <= figures[name] <= strategies["questions"]
        assert figures["shortest"] <= figures["shortest after"] <= NUM_LAYERS


def test_the_executions_counted_are_those_that_the_evaluator_runs(quality, one_question):
    routed, task, examples = one_question(1)
    for strategy in ("tree", "walk"):
        config = SearchConfig(strategy=strategy, num_simulations=10_000)
        result = quality.search(routed, examples, task, config, 120)
        (row,) = result["rows"]
        assert result["executions_run"] == row["executions"] <= 120
        assert len(row["paths"]) > 5


def test_the_least_that_a_search_runs_is_what_nothing_is_run_twice_for(benchmark):
    benchmark("search")
    from common.bound import least_to_search

    prompts = [[0] * 8 + [1, 2], [0] * 8 + [3, 4, 5]]
    answers = {(0, (1, 1, 1)): (7, 8), (0, (1, 1, 0)): (7, 9), (1, (1, 1, 1)): (5,)}
    least = least_to_search(prompts, [0, 0], answers)
    # Layers 0 and 1 on what both begin with, and on their own tokens; layer 2 on the last tokens;
    # all three on the token 7, which both paths of the first question read.
    assert least.layers == 8 * 2 + (2 * 2 + 1) + (3 * 2 + 1) + 3
    assert least.head == 3 + 2


def test_a_question_counts_as_saving_only_where_a_shorter_right_path_survived(quality):
    survived = {"survived": True, "margin": 0.5}
    full = {"decisions": [1, 1, 1], "reward": 1.0, "margin": 1.0, "kl": 0.0, "retest": survived}
    lucky = full | {"decisions": [1, 0, 1], "retest": survived | {"survived": False}}
    row = {"paths": [full, lucky]}

    assert quality.has_saving(row, survived=False)
    assert not quality.has_saving(row, survived=True)
    assert quality.find_shortest(row, survived=False) == 2
    assert quality.find_shortest(row, survived=True) == 3
    assert [quality.count_saving_paths(row, survived=after) for after in (False, True)] == [1, 0]
    assert quality.find_kl_of_shortest(row) is None
    assert not quality.has_improving(row, survived=False)


def test_strategies_are_compared_question_by_question(quality):
    def row(*decisions, full_is_right=True):
        path = {"reward": 1.0, "retest": {"survived": True}}
        full = {"decisions": [1, 1, 1], "reward": float(full_is_right), "retest": None}
        return {"paths": [full, path | {"decisions": [*decisions]}]}

    ours = [[row(0, 0, 1), row(1, 1, 2, full_is_right=False)], [row(0, 1, 1), row(0, 1, 1)]]
    theirs = [[row(0, 1, 1), row(1, 1, 2)], [row(1, 1, 1), row(1, 1, 1)]]

    assert quality.compare_strategies(ours, theirs) == {
        "saved_ratio": 4.0,  # (1.5 + 0.5) / 2 layers against (0.5 + 0) / 2
        "saved_more": 0.75,
        "saved_more_interval": (0.5, 1.0),
        "saving": {"won": 0, "lost": 0, "p": 1.0},
        "improving": {"won": 1, "lost": 0, "p": 1.0},
    }


def test_a_strategy_can_come_with_settings(quality):
    assert quality.strategy_settings("walk") == {"strategy": "walk"}
    assert quality.strategy_settings("tree:length_penalty=0+budget=1.5") == {
        "strategy": "tree",
        "length_penalty": 0,
        "budget": 1.5,
    }


def test_blocks_that_are_done_are_read_and_those_of_other_settings_are_not(
    quality, tiny_folder, one_question, tmp_path, monkeypatch
):
    routed, task, examples = one_question(2)
    options = Namespace(strategies=["tree", "walk"], seeds=[0, 1], block_size=1, executions=30)
    options.model, options.output_dir = str(tiny_folder), tmp_path
    first = quality.search_all(routed, task, examples, options)
    with monkeypatch.context() as patch:
        patch.setattr(quality, "search", None)  # whoever searches now fails
        assert quality.search_all(routed, task, examples, options) == first
    options.executions = 50
    assert quality.search_all(routed, task, examples, options) != first


@pytest.fixture(scope="module")
def evaluator(figures_of):
    """What the benchmark of the evaluator writes."""
    return figures_of("search", "--questions", "3", "--paths", "4", "--sample", "12")


@pytest.mark.thorough
def test_the_evaluator_is_compared_on_every_reward_and_comes_to_the_same_verdicts(evaluator):
    rewards = {"loglikelihood", "letter", "boxed"}
    assert rewards == evaluator["speedup"].keys() == evaluator["kl_overhead"].keys()
    for result in evaluator["results"]:
        assert result["paths"] == result["verdicts_compared"] == 12
        assert result["speedup"] == evaluator["speedup"][result["reward"]]
        assert sum(result["parts"].values()) == pytest.approx(1)
        assert result["parts"]["layers, prompts"] > 0
        assert result["parts"]["handling states"] > 0
    assert set(evaluator["verdicts_that_differ"].values()) == {0}


@pytest.mark.thorough
def test_executions_lie_between_those_of_a_perfect_sharer_and_those_asked(evaluator):
    for result in evaluator["results"]:
        shares = result["executions_a_path"]
        assert 0 < shares["run"] <= shares["perfect_sharer"] * (1 + 1e-9)
        assert shares["perfect_sharer"] < shares["asked"]


@pytest.fixture(scope="module")
def training(benchmark, figures_of, model_folder):
    """What the benchmark of the training writes; of the sizes only two."""
    script = benchmark("training")
    sizes_of = script.sizes_of
    words = ["--questions", "12", "--double", "--scale", "--targets", "14"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "sizes_of", lambda whole: sizes_of(whole)[:2])
        return figures_of("training", *words, folder=model_folder())


@pytest.mark.thorough
def test_training_with_the_base_model_in_the_loop_has_the_losses_of_ours(training):
    result = training["result"]
    assert (result["questions"], result["epochs"]) == (12, 25)
    assert 0 <= max(result["relative_differences"]) < 1e-5  # float32
    assert list(result["rounded_otherwise"]) == [
        *(f"{size} prompts a pass" for size in (1, 2, 16)),
        "float64",
    ]
    assert len(result["by_rounding_alone"]) == len(result["relative_differences"])
    assert 0 < result["by_rounding_alone"][-1] < 1e-5
    assert result["losses_are_equal"] is True
    assert 0 <= max(result["in_double"]) < 1e-12
    assert "torch.float32" in training["machine"]  # what the times are of
    assert result["last_loss"] > 0


def test_what_rounding_does_is_the_most_of_all_samples_and_of_all_epochs_so_far(benchmark):
    samples = [[1e-8, 3e-6, 2e-9, 1e-3], [2e-8, 1e-6, 1e-6, 4e-3]]
    assert benchmark("training").furthest_so_far(samples) == [2e-8, 3e-6, 3e-6, 4e-3]


@pytest.mark.parametrize(
    ("found", "are_equal"),
    [
        ([9e-5, 9e-5, 9e-3], True),
        ([1.1e-4, 0, 0], False),
        ([0, 0, 1.1e-2], False),
        ([0, math.nan, 0], False),
    ],
)
def test_losses_are_equal_that_differ_by_little_or_by_ten_times_what_rounding_does(
    benchmark, found, are_equal
):
    assert benchmark("training").are_equal(found, [1e-8, 1e-6, 1e-3]) is are_equal


@pytest.mark.thorough
def test_the_bound_is_made_of_epochs_batches_and_routers(training):
    result = training["result"]
    assert training["speedup"] == result["speedup"] < result["bound"]
    assert result["ours_s"] == pytest.approx(result["pass_s"] + result["fit_s"])
    factors = (result["epochs"], result["batch_1_loses"], result["routers_in_the_loop"])
    assert math.prod(factors) == pytest.approx(result["bound"])


def test_a_fit_is_measured_at_parts_of_each_side(benchmark):
    whole, *parts = benchmark("training").sizes_of((4000, 30, 576))
    assert whole == (4000, 30, 576)
    assert parts == [(2000, 30, 576), (4000, 15, 576), (4000, 30, 288), (1000, 30, 576)]


@pytest.mark.thorough
def test_each_fit_has_its_time_and_the_memory_of_a_process_of_its_own(training):
    sizes = [(point["N"], point["L"], point["D"]) for point in training["scale"]]
    assert sizes == [(14, 4, 32), (7, 4, 32)]
    first, second = training["scale"]
    assert first["share_of_time"] == 1
    assert second["share_of_time"] == second["seconds"] / first["seconds"]
    assert first["features_gib"] * 2**30 > 4 * 14 * 4 * 8 * 32  # float32
    for point in training["scale"]:
        if sys.platform == "linux":
            assert 0 < point["own_gib"] < point["peak_gib"]


def test_the_driver_is_measured_on_batches_that_are_ready_made(benchmark, tmp_path):
    driver, config = benchmark("driver"), SearchConfig()
    questions = driver.collect_questions([driver.ManyQuestions(40)], config)
    batches = driver.split_into_batches(questions, config.block_size)
    results = {batch.number: driver.make_records(batch.questions) for batch in batches}
    workers = driver.make_workers(driver.ReadyExecutor(results))
    assert len(driver.run_search(workers, questions, config, tmp_path, driver.BatchClock())) == 40
    assert {len(question.retests) for question in questions} == {4}
    worker = driver.ReadyWorker()
    assert worker.load(None, None)[0] == driver.IDENTITY
    assert worker.run(batches[0], None).records == results[0].records


def test_both_evaluators_read_the_worked_examples_anew_in_each_repeat(
    benchmark, tiny_folder, monkeypatch
):
    script = benchmark("evaluation")
    base = load(ModelConfig(model=str(tiny_folder), dtype="float32", device="cpu"))
    sizes = {"repeats": 2, "questions": 4, "answers": 4, "answer_tokens": 2, "batch_size": 2}
    time_answers = script.time_answers
    num_read = {script.RoutedLM: [], script.HFLM: []}  # tokens of each run

    def count_tokens(lm, *arguments):
        count = 0

        def add(_model, _arguments, inputs):
            nonlocal count
            count += inputs["input_ids"].numel()

        hook = lm.model.register_forward_pre_hook(add, with_kwargs=True)
        timed = time_answers(lm, *arguments)
        hook.remove()
        num_read[type(lm)].append(count)
        return timed

    monkeypatch.setattr(script, "SHOTS", 1)  # the tiny model has no room for more
    monkeypatch.setattr(script, "time_answers", count_tokens)
    result = script.compare(
        base, "builtin_arithmetic", sizes, None, script.common.time.process_time
    )
    assert result["verdicts_that_differ"] == 0
    theirs, ours = num_read[script.HFLM], num_read[script.RoutedLM]
    assert len(set(theirs)) == 1
    assert len(theirs) == 3
    # Of each repeat one run is without routers and shares what prompts begin with, one is with.
    # Behind the repeats one without routers is profiled.
    with_routers, without = sorted(set(ours), reverse=True)
    assert (ours.count(with_routers), ours.count(without)) == (3, 4)


def test_baselines_give_up_the_layers_that_a_peer_library_does(figures_of):
    pytest.importorskip("economize", reason="the peer library isn't installed")
    figures = figures_of("baselines", "--skipped", "4")
    assert figures["speedup"].keys() == {"block influence", "by loss"}
    result = figures["result"]
    assert result["equal_by_influence"]
    assert result["equal_by_loss"]
    assert result["largest_difference_of_influence"] < 1e-6
    assert len(result["runs"][0]["ours"]["by_loss"]) == 4


def test_kinds_of_text_count_the_same_in_the_loss_of_fewer_bits_and_do_not_widen_its_interval(
    benchmark,
):
    script = benchmark("quantised")
    measured = {
        (script.FULL, script.FLOAT32): script.Measurement(1, losses={"a": [1.0] * 3, "b": [4.0]}),
        (script.FULL, script.INT8): script.Measurement(1, losses={"a": [1.5] * 3, "b": [6.5]}),
    }
    _, row = script.summarise(measured)
    assert (row["loss_increase"], *row["interval"]) == pytest.approx((1.5, 1.5, 1.5))


def test_what_a_bypass_takes_back_is_measured_by_rank_and_number_of_skips(figures_of, tmp_path):
    files = []
    for name, word in (("fit", "apple"), ("measured", "plum")):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "kind.jsonl"
        texts = [f"{word} number {number} of many" for number in range(60)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files.append(str(file))
    words = ["--text", files[0], "--held-out", files[1], "--skips", "2,3", "--ranks", "2,1000"]
    figures = figures_of("bypass", *words, "--on-routes", "2")
    on_all = [row for row in figures["rows"] if row["which"] == "routes"]
    assert [row["skips"] for row in on_all] == [2] * 3 + [3] * 3
    assert [row["routes"] for row in on_all] == [6] * 6
    assert "rank 2 fitted on routes" in {row["way"] for row in on_all}
    for row in figures["rows"]:
        low, high = row["interval"]
        assert low <= row["recovered"] <= high
        assert 0 <= row["better_on"] <= 1
    small, full, _on_routes = figures["fits"].values()
    assert 0 < small["counted"] < full["counted"]
    assert small["seconds"] > 0
    assert small["measured"] > 0


def test_the_interval_of_a_share_ends_at_one_where_no_part_exceeds_its_whole(benchmark):
    script = benchmark("bypass")
    wholes = [0.1] * 40 + [8.0, 9.0]  # a few routes lose nearly all
    parts = [0.02] * 40 + [7.5, 8.8]
    share, (low, high) = script.divide_means(parts, wholes)
    assert share == pytest.approx(sum(parts) / sum(wholes))
    assert 0.19 < low < share < high < 1
    same, interval = script.divide_means([value / 2 for value in wholes], wholes)
    assert (same, *interval) == pytest.approx((0.5, 0.5, 0.5))


def test_each_route_of_each_draw_has_a_text_of_its_own_or_the_draw_is_refused(benchmark):
    script = benchmark("bypass")
    kinds = {kind: [(kind, number) for number in range(10)] for kind in (1, 2)}
    texts = [text for draw in range(3) for text in script.choose_texts(kinds, 5, draw)]
    assert len(set(texts)) == 15
    assert script.choose_texts(kinds, 7, 0)[:5] == texts[:5]  # more routes leave draw 0 its texts
    with pytest.raises(SystemExit, match="--draw 3 of 5 routes needs 12 texts of each kind, and 1"):
        script.choose_texts(kinds, 5, 3)


def test_more_routes_of_a_bypass_are_measured_beside_those_that_are_kept(
    benchmark, tiny_folder, tmp_path, monkeypatch
):
    script = benchmark("bypass")
    base = load(ModelConfig(model=str(tiny_folder), dtype="float32", device="cpu"))
    texts = [(5, 6, 7), (8, 9, 10), (11, 12, 13)]
    routes = [(1, 0) + (1,) * (NUM_LAYERS - 2)] * 3
    fit_texts = [(3, 4)]
    first = script.Measurer(base, fit_texts, texts[:2], tmp_path).measure("plain", None, routes[:2])
    read = []
    score = script.score

    def count(routed, requests, *settings, **options):
        read.extend(requests)
        return score(routed, requests, *settings, **options)

    monkeypatch.setattr(script, "score", count)
    more = script.Measurer(base, fit_texts, texts, tmp_path).measure("plain", None, routes)
    assert more[:2] == first
    assert len(read) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_quick_run_on_the_real_model_writes_what_every_benchmark_must(smollm2, script, tmp_path):
    if script.stem == "baselines":
        pytest.importorskip("economize", reason="the peer library isn't installed")
    file = tmp_path / "figures.json"
    child = subprocess.run(
        [sys.executable, script, "--quick", "--json", file], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert {"repeats", "ours", "theirs", "machine"} <= figures.keys()
    assert figures.keys() & {"speedup", "overhead"}
    if script.stem not in WITHOUT_COMPARISONS:
        for row in figures["comparisons"]:
            assert row["speedup"] > 0
            assert row["bound"] is None or row["share"] == row["speedup"] / row["bound"]


@pytest.mark.thorough
def test_layers_and_bits_are_compared_in_size_seconds_and_loss(figures_of, tmp_path):
    file = tmp_path / "numbers.jsonl"
    texts = [f"number {number} of many" for number in range(4)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    figures = figures_of("quantised", "--skip", "3-5", "--text", str(file))
    full, shorter = figures["rows"][:: len(figures["rows"]) // 2]
    assert (full["path"], shorter["path"]) == ("full path", "shorter path")
    assert shorter["megabytes"] < full["megabytes"]
    assert full["loss_increase"] == 0
    assert shorter["interval"][0] <= shorter["loss_increase"] <= shorter["interval"][1]
    assert full["speedup"].keys() == {
        "read, rows: 1",
        "write, rows: 1",
        "read, rows: 8",
        "write, rows: 8",
    }
    bounds = {row["what"]: row["bound"] for row in figures["comparisons"]}
    assert bounds["read, rows: 1: shorter path, float32"] > 1


@pytest.fixture
def on_gpu(benchmark, tiny_base, tmp_path, monkeypatch):
    """A function that runs `make gpu` on a tiny shape on the processor; figures and status."""
    script = benchmark("gpu")
    monkeypatch.setattr(script.shapes, "load", lambda _config: tiny_base())

    def run(*words):
        fixed = ["--device", "cpu", "--dtype", "float32", "--exact-shape", "tiny"]
        fixed += ["--shapes", "tiny", "--output-dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *fixed, *words])
        status = 0
        try:
            script.main()
        except SystemExit as end:
            status = end.code
        return json.loads((tmp_path / "gpu.json").read_text()), status

    return run


def test_the_check_on_a_gpu_says_what_is_exact_and_what_was_not_reached(on_gpu, tmp_path):
    figures, status = on_gpu("--minutes", "0")
    assert status == 1  # nothing was timed
    assert len(figures["exactness"]) == 4
    assert all(row["every_layer"] and row["plan"] for row in figures["exactness"])
    assert {row["ended"] for row in figures["times"].values()} == {"not reached"}
    page = (tmp_path / "gpu.md").read_text()
    assert "| bfloat16 | 32 | equal | equal |" in page


@pytest.mark.thorough
def test_the_benchmarks_on_a_gpu_run_on_random_weights_in_processes_of_their_own(
    benchmark, smollm2, tmp_path
):
    script = benchmark("gpu")
    options = Namespace(output_dir=tmp_path, device="cpu", dtype="float32")
    for name in ("features", "search"):
        row = script.run_benchmark(name, "tiny", options, seconds=300)
        assert row["ended"] == "done", (tmp_path / f"{name}-tiny.log").read_text()
        assert row["figures"]["comparisons"]


def test_a_difference_or_a_wait_too_many_is_a_failure(benchmark):
    script = benchmark("gpu")
    exact = {"dtype": "float32", "batch_size": 1, "every_layer": True, "plan": True}
    waits = {"counted": True, "prefill": 3, "prefill_bound": 4, "step": 0, "step_bound": 0}
    figures = {"exactness": [exact], "waits": waits, "times": {}}
    assert script.passes(figures)
    assert not script.passes({**figures, "exactness": [{**exact, "plan": False}]})
    assert not script.passes({**figures, "waits": {**waits, "step": 1}})
    failed = {"generate, 1b": {"ended": "failed, see log", "seconds": 1.0}}
    assert not script.passes({**figures, "times": failed})


def test_a_benchmark_that_was_timed_on_one_shape_counts_as_timed(benchmark):
    script = benchmark("gpu")
    done, late = {"ended": "done", "seconds": 1.0}, {"ended": "not reached", "seconds": 0.0}
    times = {"training, 1b": done, "training, 8b": late, "search, 1b": late}
    assert script.list_untimed({"times": times}) == ["search"]


def test_a_shape_that_is_unknown_is_named_with_the_others(benchmark):
    with pytest.raises(SystemExit, match="no shape '2b'; give one of tiny, 1b, 3b, 8b"):
        benchmark("gpu").shapes.make_base("2b", "cpu", "float32")


@pytest.fixture
def everything(benchmark, tiny_folder, tmp_path, monkeypatch):
    """A function that measures everything on a tiny model; the steps, and the exit status."""

    def run(*words):
        file = tmp_path / "figures.json"
        fixed = ["--quick", "--json", str(file), "--output-dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["all.py", *fixed, "--model", str(tiny_folder), *words])
        try:
            benchmark("all").main()
        except SystemExit as end:
            return json.loads(file.read_text())["steps"], end.code
        return json.loads(file.read_text())["steps"], 0

    return run


def test_steps_for_which_no_time_is_left_are_named_and_those_that_miss_others_fail(everything):
    steps, status = everything("--minutes", "0")
    assert (status, {row["ended"] for row in steps.values()}) == (0, {"not reached"})
    assert {"training", "routers"} <= steps.keys()  # the benchmark, and what the commands train
    steps, status = everything("--only", "routing")
    assert status == 1
    assert steps["routing"]["ended"].startswith("failed")


@pytest.mark.thorough
def test_everything_is_measured_in_steps_that_are_not_repeated(everything):
    names = "shrinking,targets,routers,routing"
    steps, status = everything("--only", names)
    assert {row["ended"] for row in steps.values()} == {"done"}
    assert status == 0
    full, short = steps["shrinking"]["figures"]["models"]
    assert len(short["layers"]) < len(full["layers"]) == NUM_LAYERS
    assert steps["routing"]["figures"]["num_questions"] == 8
    steps, status = everything("--only", names)
    assert {row["ended"] for row in steps.values()} == {"already done"}


@pytest.fixture
def serve(benchmark, figures_of, tmp_path, monkeypatch):
    """A function that runs the benchmark of serving, in which transformers stands in for llama.cpp.

    It returns the figures.
    """
    engine = benchmark("serving").llama_cpp

    def load_stand_in(file):
        model = AutoModelForCausalLM.from_pretrained(file.parent).eval()
        model.close = lambda: None
        return model

    @torch.no_grad()
    def write(model, prompt, num_tokens):
        tokens = list(prompt)
        for _ in range(num_tokens):  # like llama.cpp, also past the end of the text
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
        return tokens[len(prompt) :]

    monkeypatch.setattr(torch, "set_num_threads", lambda _number: None)
    monkeypatch.setattr(engine, "check_checkout", lambda _parser, _folder: None)
    monkeypatch.setattr(engine, "convert", lambda folder, _checkout: folder / "model.gguf")
    monkeypatch.setattr(engine, "load", load_stand_in)
    monkeypatch.setattr(engine, "generate", write)
    return lambda *words: figures_of("serving", "--llama-cpp", str(tmp_path), *words)


def test_a_shorter_model_is_served_and_reported(serve):
    figures = serve("--skip", "3,5")
    assert figures["skipped"] == [3, 5]
    assert figures["equal"] == {"full": 3, "path": 3}
    for row in figures["comparisons"]:
        assert row["bound"] > 1
        assert figures["overhead"][row["what"].split(", ")[1]] == 1 / row["speedup"]


def test_the_shorter_model_lacks_the_named_layers_or_a_sixth(benchmark):
    benchmark("serving")
    import common

    small, smaller = Namespace(num_layers=12), Namespace(num_layers=4)
    default = Namespace(skip=None)
    assert common.list_skipped(default, small) == [6, 7]
    assert common.list_skipped(default, smaller) == [2]
    assert common.list_skipped(Namespace(skip="3"), small) == [3]


@pytest.mark.thorough
@pytest.mark.skipif(
    find_spec("llama_cpp") is None or "LLAMA_CPP" not in os.environ,
    reason="llama-cpp-python isn't installed, or LLAMA_CPP names no checkout (make test-llama-cpp)",
)
def test_llama_cpp_says_what_transformers_says_of_an_exported_path(smollm2, tmp_path):
    file = tmp_path / "figures.json"
    words = ["--llama-cpp", os.environ["LLAMA_CPP"], "--prompts", "20", "--json", str(file)]
    script = [sys.executable, BENCHMARKS / "serving.py", *words]
    child = subprocess.run(script, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert json.loads(file.read_text())["equal"] == {"full": 20, "path": 20}
