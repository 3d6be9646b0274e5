"""The search stage on a tiny model: what is recorded, re-tested, committed and resumed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil

import pytest

import drllm
from drllm.config import SearchConfig
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.models.routed import RoutedModel
from drllm.paths import full_decisions
from drllm.records import manifest_path, read_search, write_atomically
from drllm.search.evaluator import BlockEvaluator, Outcome
from drllm.search.runner import _judge, run_search, search_block
from drllm.tasks.base import get_task

IDENTITY = {"id": "tiny", "num_layers": 6, "fingerprint": "0"}
RUNTIME = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa"}


@pytest.fixture(scope="module")
def routed(tiny_llama, tiny_tokenizer):
    return RoutedModel(tiny_llama(max_position_embeddings=1024), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def facts():
    return get_task("builtin_facts")


def settings(**values):
    return SearchConfig(num_simulations=8, **values)


def without_times(records):
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def assert_same_run(first, second):
    """Equal decisions and rewards, margins within 1e-4, times ignored (the design's words)."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.id, a.task, a.prompt) == (b.id, b.task, b.prompt)
        for p, q in zip(a.paths, b.paths, strict=True):
            assert (p.decisions, p.simulation, p.reward, p.answer) == (
                q.decisions,
                q.simulation,
                q.reward,
                q.answer,
            )
            assert p.margin == pytest.approx(q.margin, abs=1e-4)
            assert (p.retest is None) == (q.retest is None)
            if p.retest is not None:
                assert (p.retest.passed, p.retest.survived) == (q.retest.passed, q.retest.survived)


def test_a_record_holds_the_full_path_first_and_then_every_simulation(routed, facts):
    records = search_block(routed, facts.examples("search")[:3], facts, settings())
    for record in records:
        assert full_decisions(6) == record.full.decisions
        assert list(range(9)) == [path.simulation for path in record.paths]
        assert len(record.paths) == len({path.decisions for path in record.paths})
        assert all(path.executions == sum(path.decisions) for path in record.paths)


def test_recorded_outcomes_are_those_of_each_path_alone(routed, facts):
    examples = facts.examples("search")[:3]
    for record, example in zip(
        search_block(routed, examples, facts, settings()), examples, strict=True
    ):
        for path in record.paths:
            alone = BlockEvaluator(routed, [facts.prompt(example, "loglikelihood")], 1.0)
            [outcome] = alone.evaluate([(0, path.decisions)])
            assert outcome.reward == path.reward
            assert outcome.margin == pytest.approx(path.margin, abs=1e-4)


def test_neighbours_in_a_block_do_not_change_a_question_s_tree(routed, facts):
    examples = facts.examples("search")[:4]
    together = search_block(routed, examples, facts, settings())
    alone = [drllm.search_path(routed, example, facts, settings()) for example in examples]
    assert_same_run(together, alone)


def test_another_seed_tries_other_paths(routed, facts):
    examples = facts.examples("search")[:1]
    [first] = search_block(routed, examples, facts, settings(seed=0))
    [second] = search_block(routed, examples, facts, settings(seed=1))
    assert {p.decisions for p in first.paths} != {p.decisions for p in second.paths}


def test_every_candidate_is_retested_in_all_other_ways_and_nothing_else_is(routed, facts):
    examples = facts.examples("search")[:12]
    seen = set()
    for record, example in zip(
        search_block(routed, examples, facts, settings()), examples, strict=True
    ):
        ways = facts.retests(example, "loglikelihood")
        for path in record.paths:
            candidate = path.reward >= 1 and (
                record.full.reward < 1 or path.simulation == 0 or path.executions < 6
            )
            assert candidate == (path.retest is not None)
            if path.retest is None:
                continue
            passed = 0
            for prompt in ways:
                [outcome] = BlockEvaluator(routed, [prompt], 1.0).evaluate([(0, path.decisions)])
                passed += outcome.reward >= 1
            assert (passed, len(ways)) == (path.retest.passed, path.retest.asked)
            seen.add(path.retest.survived)
    assert seen == {True, False}, "the sample must hold both outcomes"


def outcomes(rewards, margins):
    return [Outcome(reward, margin) for reward, margin in zip(rewards, margins, strict=True)]


@pytest.mark.parametrize(
    ("rewards", "margins", "full", "survived"),
    [
        ([1, 1, 1, 0], [1.0] * 4, [1.0] * 4, True),
        ([1, 1, 0, 0], [1.0] * 4, [1.0] * 4, False),  # half is not most
        ([1, 1, 1, 1], [1.0] * 4, [1.5] * 4, True),  # exactly the tolerance below
        ([1, 1, 1, 1], [1.0] * 4, [1.6] * 4, False),  # further below
        ([1, 1, 1, 1], [1.0] * 4, [-9.0] * 4, True),  # better than the full path
        ([1, 1], [None, 1.0], [9.0, 1.0], True),  # only where both have a margin
        ([1, 1], [None, None], [None, None], True),  # no margins: the rewards decide
    ],
)
def test_a_path_survives_if_right_in_most_ways_and_not_far_below_the_full_path(
    rewards, margins, full, survived
):
    retest = _judge(outcomes(rewards, margins), outcomes(rewards, full), tolerance=0.5)
    assert survived == retest.survived
    assert sum(rewards) == retest.passed


def test_generated_answers_are_searched_and_recorded(routed):
    task = get_task("builtin_arithmetic")
    [record] = search_block(routed, task.examples("search")[:1], task, settings())
    assert record.reward == "boxed"
    assert all(path.answer is not None for path in record.paths)
    assert all(path.margin is not None for path in record.paths if path.reward < 1)


def test_the_prompt_in_the_record_is_what_the_model_read(routed, tiny_tokenizer):
    task = get_task("builtin_arithmetic")
    example = task.examples("search")[0]
    [record] = search_block(routed, [example], task, settings())
    prompt = task.prompt(example, "boxed")
    rendered = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == record.prompt


def test_a_model_without_its_tokenizer_is_refused(tiny_llama, facts):
    bare = RoutedModel(tiny_llama())
    with pytest.raises(TaskError, match="tokenizer"):
        drllm.search_path(bare, facts.examples("search")[0], facts, settings())


def run(routed, folder, tasks, on_progress=None, **values):
    config = settings(output_dir=str(folder), limit=7, block_size=2, **values)
    return run_search(routed, tasks, config, IDENTITY, RUNTIME, on_progress)


class StopAfter:
    """Raises once a number of questions is committed, as an interruption would."""

    def __init__(self, questions):
        self.questions = questions

    def __call__(self, done, total, note):
        if done >= self.questions:
            raise KeyboardInterrupt


@pytest.mark.parametrize("questions", [1, 2, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one(routed, facts, tmp_path, questions):
    unbroken = read_search(run(routed, tmp_path / "unbroken", [facts]))
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path / "broken", [facts], StopAfter(questions))
    assert not (tmp_path / "broken" / "search.jsonl").exists()
    resumed = read_search(run(routed, tmp_path / "broken", [facts]))
    assert_same_run(unbroken, resumed)
    assert not (tmp_path / "broken" / "search.blocks").exists()


def test_committed_blocks_are_not_searched_again(routed, facts, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(4))
    parts = sorted((tmp_path / "search.blocks").glob("0*.jsonl"))
    before = [(part.name, part.stat().st_mtime_ns) for part in parts]
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(6))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "search.blocks").glob("0*.jsonl")}
    assert before == [(name, after[name]) for name, _ in before]
    assert len(after) > len(before)


def test_a_finished_search_is_returned_as_it_is(routed, facts, tmp_path):
    output = run(routed, tmp_path, [facts])
    before = output.stat().st_mtime_ns
    calls = []
    assert output == run(routed, tmp_path, [facts], lambda *args: calls.append(args))
    assert before == output.stat().st_mtime_ns
    assert calls == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 3}, "seed"), ({"budget": 1.5}, "budget"), ({"stop_rule": "paper"}, "stop_rule")],
)
def test_other_settings_do_not_continue_a_run(routed, facts, tmp_path, changed, named):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(2))
    with pytest.raises(ConfigError, match=named):
        run(routed, tmp_path, [facts], **changed)
    run(routed, tmp_path, [facts])
    with pytest.raises(ConfigError, match=named):
        run(routed, tmp_path, [facts], **changed)


def test_other_questions_do_not_continue_a_run(routed, facts, tmp_path):
    run(routed, tmp_path, [facts])
    with pytest.raises(ConfigError, match="other questions"):
        run(routed, tmp_path, [get_task("builtin_arithmetic")])


def test_another_model_does_not_continue_a_run(routed, facts, tmp_path):
    run(routed, tmp_path, [facts])
    config = settings(output_dir=str(tmp_path), limit=7, block_size=2)
    with pytest.raises(ConfigError, match="fingerprint"):
        run_search(routed, [facts], config, {**IDENTITY, "fingerprint": "1"}, RUNTIME)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "bfloat16"), ("device", "cuda"), ("attn_implementation", "eager")],
)
@pytest.mark.parametrize("questions", [2, 7], ids=["interrupted", "complete"])
def test_a_model_that_runs_otherwise_does_not_continue_a_run(
    routed, facts, tmp_path, questions, name, value
):
    config = settings(output_dir=str(tmp_path), limit=7, block_size=2)
    if questions == 7:
        run(routed, tmp_path, [facts])
    else:
        with pytest.raises(KeyboardInterrupt):
            run(routed, tmp_path, [facts], StopAfter(questions))
    with pytest.raises(ConfigError, match=f"{name} {RUNTIME[name]!r}, this run has {value!r}"):
        run_search(routed, [facts], config, IDENTITY, {**RUNTIME, name: value})


def test_another_version_does_not_continue_a_run(routed, facts, tmp_path, monkeypatch):
    run(routed, tmp_path, [facts])
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + "+other")
    with pytest.raises(ConfigError, match=r"drllm_version .*choose another --output-dir"):
        run(routed, tmp_path, [facts])


def test_a_cut_off_result_is_not_taken_for_a_finished_one(routed, facts, tmp_path):
    output = run(routed, tmp_path, [facts])
    output.write_bytes(output.read_bytes()[:-50])
    with pytest.raises(RecordError, match="line 7"):
        run(routed, tmp_path, [facts])


def test_a_result_without_its_manifest_is_not_overwritten(routed, facts, tmp_path):
    output = run(routed, tmp_path, [facts])
    manifest_path(output).unlink()
    with pytest.raises(RecordError, match="without its manifest"):
        run(routed, tmp_path, [facts])


def test_a_foreign_result_beside_unfinished_blocks_is_not_overwritten(routed, facts, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(4))
    (tmp_path / "search.jsonl").write_text("mine")
    with pytest.raises(RecordError, match="without its manifest"):
        run(routed, tmp_path, [facts])
    assert (tmp_path / "search.jsonl").read_text() == "mine"


@pytest.fixture
def left_over(routed, facts, tmp_path):
    """A complete search, and beside it the blocks that it was made from."""
    parts, kept = tmp_path / "search.blocks", tmp_path / "kept"

    def keep(done, total, note):
        if done == total:  # said again once the last block is committed
            shutil.copytree(parts, kept, dirs_exist_ok=True)

    output = run(routed, tmp_path, [facts], keep)
    kept.rename(parts)
    return output


def test_a_run_killed_before_its_manifest_is_completed_from_its_blocks(
    routed, facts, tmp_path, left_over
):
    before = left_over.read_bytes()
    manifest_path(left_over).unlink()
    assert run(routed, tmp_path, [facts]) == left_over
    assert left_over.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "search.jsonl",
        "search.manifest.json",
    ]


def test_a_run_killed_behind_its_manifest_is_cleared_of_its_blocks(
    routed, facts, tmp_path, left_over
):
    before = left_over.stat().st_mtime_ns
    assert run(routed, tmp_path, [facts]) == left_over
    assert left_over.stat().st_mtime_ns == before
    assert not (tmp_path / "search.blocks").exists()


@pytest.mark.parametrize("kept", ["plan.json", "nothing"])
def test_a_clearing_that_was_killed_is_ended(routed, facts, tmp_path, left_over, kept):
    for file in (tmp_path / "search.blocks").iterdir():
        if file.name != kept:
            file.unlink()
    run(routed, tmp_path, [facts])
    assert not (tmp_path / "search.blocks").exists()


def test_blocks_of_another_search_beside_a_complete_one_stay(routed, facts, tmp_path, left_over):
    write_atomically(tmp_path / "search.blocks" / "plan.json", '{"settings": {"seed": 9}}\n')
    run(routed, tmp_path, [facts])
    assert (tmp_path / "search.blocks" / "00000.jsonl").exists()


def test_a_broken_plan_is_answered_with_what_to_delete(routed, facts, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(4))
    (tmp_path / "search.blocks" / "plan.json").write_text("{")
    with pytest.raises(RecordError, match=r"plan\.json is broken; delete the folder"):
        run(routed, tmp_path, [facts])


def test_the_manifest_names_model_settings_and_prompts(routed, facts, tmp_path):
    output = run(routed, tmp_path, [facts])
    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["model"] == IDENTITY
    assert manifest["config"]["num_simulations"] == 8
    assert manifest["num_records"] == 7
    assert manifest["plan"]["runtime"] == RUNTIME
    assert manifest["plan"]["drllm_version"] == manifest["drllm_version"]
    assert len(manifest["plan"]["prompts_sha256"]) == 64


def test_progress_counts_questions_and_ends_at_the_total(routed, facts, tmp_path):
    calls = []
    run(routed, tmp_path, [facts], lambda done, total, note: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (7, 7)
    assert any(done != int(done) for done, _ in calls), "progress moves within a block"


def test_a_reward_that_the_task_cannot_grade_is_refused_before_any_work(routed, facts, tmp_path):
    with pytest.raises(TaskError, match="boxed"):
        run(routed, tmp_path / "new", [facts], reward="boxed")
    assert not (tmp_path / "new").exists()
