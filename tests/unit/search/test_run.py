"""The search stage on a tiny model: what is committed, resumed, refused and written."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import shutil
import subprocess
from typing import Any

import pytest

from drllm.config import SearchConfig
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import (
    codec,
    manifest_path,
    read_json_lines,
    read_search,
    split_of,
    write_atomically,
)
from drllm.search.block import search_path
from drllm.search.executors import LocalExecutor
from drllm.search.questions import blocks_of
from drllm.search.run import run_search
from drllm.tasks.base import choose, get_task

IDENTITY = {"id": "tiny", "num_layers": 6, "fingerprint": "0"}
RUNTIME = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa"}


def settings(folder, **values):
    values = {"limit": 7, "block_size": 2, **values}
    return SearchConfig(num_simulations=8, output_dir=str(folder), **values)


def run(routed, folder, tasks, on_progress=None, **values):
    config = settings(folder, **values)
    return run_search(LocalExecutor(routed, IDENTITY, RUNTIME), tasks, config, on_progress)


class StopAfter:
    """Raises once a number of questions is committed, as an interruption would."""

    def __init__(self, questions):
        self.questions = questions

    def __call__(self, status):
        if status.done >= self.questions:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unbroken(routed, facts, tmp_path_factory):
    """The records of a run that nothing disturbed."""
    return read_search(run(routed, tmp_path_factory.mktemp("unbroken"), [facts]))


@pytest.mark.parametrize("questions", [1, 2, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one(
    routed, facts, tmp_path, questions, unbroken, assert_same_run
):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path / "broken", [facts], StopAfter(questions))
    assert not (tmp_path / "broken" / "search.jsonl").exists()
    resumed = read_search(run(routed, tmp_path / "broken", [facts]))
    assert_same_run(unbroken, resumed)
    assert not (tmp_path / "broken" / "search.blocks").exists()


def test_records_stand_in_the_order_of_the_questions_whatever_their_blocks(
    routed, facts, unbroken, tmp_path
):
    asked = choose(facts.examples("search"), settings(tmp_path).limit, 0)
    assert [example.id for example in asked] == [record.id for record in unbroken]
    by_block = [e.id for block in blocks_of([facts], settings(tmp_path)) for e in block.examples]
    assert by_block != [record.id for record in unbroken]


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
    assert output == run(routed, tmp_path, [facts], calls.append)
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
    config = settings(tmp_path)
    other = LocalExecutor(routed, {**IDENTITY, "fingerprint": "1"}, RUNTIME)
    with pytest.raises(ConfigError, match="fingerprint"):
        run_search(other, [facts], config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "bfloat16"), ("device", "cuda"), ("attn_implementation", "eager")],
)
@pytest.mark.parametrize("questions", [2, 7], ids=["interrupted", "complete"])
def test_a_model_that_runs_otherwise_does_not_continue_a_run(
    routed, facts, tmp_path, questions, name, value
):
    config = settings(tmp_path)
    if questions == 7:
        run(routed, tmp_path, [facts])
    else:
        with pytest.raises(KeyboardInterrupt):
            run(routed, tmp_path, [facts], StopAfter(questions))
    with pytest.raises(ConfigError, match=f"{name} {RUNTIME[name]!r}, this run has {value!r}"):
        run_search(LocalExecutor(routed, IDENTITY, {**RUNTIME, name: value}), [facts], config)


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

    def keep(status):
        if status.done == status.total:  # said again once the last block is committed
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
    run(routed, tmp_path, [facts], calls.append)
    done = [status.done for status in calls]
    assert done == sorted(done)
    assert (calls[-1].done, calls[-1].total) == (7, 7)
    assert any(share != int(share) for share in done), "progress moves within a block"


def test_a_reward_that_the_task_cannot_grade_is_refused_before_any_work(routed, facts, tmp_path):
    with pytest.raises(TaskError, match="boxed"):
        run(routed, tmp_path / "new", [facts], reward="boxed")
    assert not (tmp_path / "new").exists()


def test_progress_counts_paths_and_what_they_are_worth(routed, facts, tmp_path):
    calls = []
    output = run(routed, tmp_path, [facts], calls.append)
    records = read_search(output)
    survived = [
        [path for path in record.paths if path.retest is not None and path.retest.survived]
        for record in records
    ]
    improving = [
        bool(paths) and record.full.reward < 1
        for record, paths in zip(records, survived, strict=True)
    ]
    assert calls[-1].fresh_paths == calls[-1].found.paths == 7 * 9
    assert (sum(map(bool, survived)), sum(improving)) == (
        calls[-1].found.valid,
        calls[-1].found.improving,
    )
    assert 0 < sum(map(bool, survived)) < 7, "the sample must hold both"
    fresh = [status.fresh_paths for status in calls]
    assert fresh == sorted(fresh)


def test_paths_of_an_earlier_run_are_not_fresh(routed, facts, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(4.5))
    calls = []
    run(routed, tmp_path, [facts], calls.append)
    assert calls[-1].fresh_paths == 3 * 9
    assert calls[-1].found.paths == 7 * 9


def test_who_does_the_work_changes_no_search(routed, facts, tmp_path):
    output = run(routed, tmp_path, [facts])
    before = output.stat().st_mtime_ns
    run(routed, tmp_path, [facts], paths_per_pass=3, state_cache_gb=1.0, executor="ray")
    assert before == output.stat().st_mtime_ns


def test_another_shard_does_not_continue_a_run(routed, facts, tmp_path):
    run(routed, tmp_path, [facts], shard="1/2", limit=20)
    with pytest.raises(ConfigError, match=r"made with shard '1/2', this run has '2/2'"):
        run(routed, tmp_path, [facts], shard="2/2", limit=20)


def test_another_chat_template_does_not_continue_a_run(routed, tmp_path, monkeypatch):
    task = get_task("builtin_arithmetic")
    run(routed, tmp_path, [task], limit=2)
    template = "{{ messages[0]['content'] }}!"
    monkeypatch.setattr(routed.tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match="another chat template"):
        run(routed, tmp_path, [task], limit=2)


def test_a_search_goes_on_the_next_day_under_a_template_that_prints_the_date(
    routed, tmp_path, monkeypatch, set_date, assert_same_run
):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    monkeypatch.setattr(routed.tokenizer, "chat_template", template)
    task = get_task("builtin_arithmetic")
    set_date(2031, 5, 1)
    unbroken = read_search(run(routed, tmp_path / "unbroken", [task], limit=4))
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path / "broken", [task], StopAfter(2), limit=4)
    set_date(2031, 5, 2)
    resumed = read_search(run(routed, tmp_path / "broken", [task], limit=4))
    assert_same_run(unbroken, resumed)
    assert all(record.prompt.startswith("26 Jul 2024 ") for record in resumed)


def test_one_prompt_of_each_task_is_told_and_logged_as_the_model_reads_it(
    routed, facts, tmp_path, caplog
):
    told = []
    executor = LocalExecutor(routed, IDENTITY, RUNTIME)
    tasks = [facts, get_task("builtin_arithmetic")]
    with caplog.at_level(logging.INFO, logger="drllm"):
        output = run_search(executor, tasks, settings(tmp_path, limit=2), None, told.append)
    [prompts] = told
    assert list(prompts) == ["builtin_facts", "builtin_arithmetic"]
    for name, text in prompts.items():
        assert text in [record.prompt for record in read_search(output) if record.task == name]
        assert repr(text) in caplog.text
    assert prompts["builtin_arithmetic"].startswith("user: ")


def test_no_prompt_is_told_of_a_search_that_is_complete(routed, facts, tmp_path):
    executor, config, told = LocalExecutor(routed, IDENTITY, RUNTIME), settings(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        run_search(executor, [facts], config, StopAfter(2), told.append)
    run_search(executor, [facts], config, None, told.append)
    assert len(told) == 2
    run_search(executor, [facts], config, None, told.append)
    assert len(told) == 2


def test_a_prompt_that_the_template_refuses_is_not_the_example(routed, tmp_path, monkeypatch):
    task, told = get_task("builtin_arithmetic"), []
    config = settings(tmp_path, limit=3)
    [shortest, *_] = [e for block in blocks_of([task], config) for e in block.examples]
    template = (
        f"{{% if {shortest.question!r} in messages[0]['content'] %}}"
        "{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    )
    monkeypatch.setattr(routed.tokenizer, "chat_template", template)
    run_search(LocalExecutor(routed, IDENTITY, RUNTIME), [task], config, None, told.append)
    assert shortest.question not in told[0]["builtin_arithmetic"]


@pytest.mark.parametrize("parts", [2, 3])
def test_the_shards_together_are_the_whole_search(routed, facts, tmp_path, parts, assert_same_run):
    whole = read_search(run(routed, tmp_path / "whole", [facts], limit=12))
    shards = [
        read_search(run(routed, tmp_path / str(part), [facts], limit=12, shard=f"{part}/{parts}"))
        for part in range(1, parts + 1)
    ]
    assert all(shards)
    joined = sorted((record for shard in shards for record in shard), key=lambda r: r.id)
    assert_same_run(sorted(whole, key=lambda record: record.id), joined)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-40],
        lambda text: text.splitlines(keepends=True)[0],
        lambda text: "",
        lambda text: text.replace('"reward":', '"rewar":', 1),
        lambda text: text * 2,
    ],
    ids=["torn", "a line missing", "empty", "a field missing", "twice"],
)
def test_a_block_file_that_cannot_be_trusted_is_set_aside_and_searched_again(
    routed, facts, tmp_path, spoil, caplog, unbroken, assert_same_run
):
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path, [facts], StopAfter(2.5))
    block = tmp_path / "search.blocks" / "00000.jsonl"
    block.write_text(spoil(block.read_text()))
    assert_same_run(unbroken, read_search(run(routed, tmp_path, [facts])))
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "set aside as 00000.jsonl.broken, and its questions are searched again" in warning


def test_what_a_kill_left_half_written_is_cleared_away(routed, facts, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in ("search.jsonl", "search.manifest.json", "search.failed.jsonl"):
        (tmp_path / f".{name}.{codec._host()}-{ended.pid}-01234567").write_text("half")
    run(routed, tmp_path, [facts])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "search.jsonl",
        "search.manifest.json",
    ]


# --- questions that fail -----------------------------------------------------------------------


@pytest.fixture
def some_fail(tiny_llama, tiny_tokenizer, tmp_path):
    """A model that knows no number for `~`, and questions of which every fourth has one."""
    model = tiny_llama(max_position_embeddings=1024)
    model.get_input_embeddings().weight.data[tiny_tokenizer("~")["input_ids"][0]] = float("nan")
    rows = [
        {"question": f"{'~' * (n % 4 == 3)}What is {n}?", "choices": ["odd", "even"], "answer": 0}
        for n in range(40)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RoutedModel(model, tokenizer=tiny_tokenizer), get_task(str(file))


def test_questions_that_fail_are_set_aside_and_the_run_goes_on(some_fail, tmp_path):
    routed, task = some_fail
    output = run(routed, tmp_path / "out", [task], limit=None)
    bad = {e.id for e in task.examples("search") if "~" in e.question}
    rows = [
        row for _, row in read_json_lines(tmp_path / "out" / "search.failed.jsonl", dict[str, Any])
    ]
    assert {row["id"] for row in rows} == bad
    assert {tuple(row) for row in rows} == {("id", "task", "question", "error", "attempts")}
    assert {3} == {row["attempts"] for row in rows}
    assert all(row["error"].startswith("ModelError: the base model's own") for row in rows)
    good = {record.id for record in read_search(output)}
    assert good == {e.id for e in task.examples("search")} - bad
    assert json.loads(manifest_path(output).read_text())["num_failed"] == len(bad)


def test_neighbours_of_a_question_that_fails_are_searched_as_ever(
    some_fail, tmp_path, assert_same_run
):
    routed, task = some_fail
    found = read_search(run(routed, tmp_path / "out", [task], limit=None))
    by_id = {example.id: example for example in task.examples("search")}
    config = settings(tmp_path)
    alone = [search_path(routed, by_id[record.id], task, config) for record in found]
    assert_same_run(found, alone)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("how", [{"choices": ["odd", "even"], "answer": 0}, {"grader": "exact"}])
def test_a_question_beyond_the_context_is_set_aside_and_its_neighbours_are_searched_as_ever(
    tiny_model, tiny_tokenizer, tmp_path, family, how, assert_same_run
):
    routed = RoutedModel(tiny_model(family, max_position_embeddings=256), tokenizer=tiny_tokenizer)
    texts = [f"What is {n}{' less' * (n % 3)}?" for n in range(12)]
    rows = [{"question": text, "answer": "odd", **how} for text in texts]
    long = next(row for row in rows if split_of(row["question"], "own") == "search")
    while len(long["question"]) < 300 or split_of(long["question"], "own") != "search":
        long["question"] += " Why?"
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(str(file))

    found = read_search(run(routed, tmp_path / "out", [task], limit=None, block_size=8))

    [[_, failed]] = read_json_lines(tmp_path / "out" / "search.failed.jsonl", dict[str, Any])
    assert failed["question"] == long["question"]
    says = r"ModelError: a prompt of the question has \d+ tokens, .* context holds 256; shorten"
    assert re.match(says, failed["error"])
    by_id = {example.id: example for example in task.examples("search")}
    assert len(found) == len(by_id) - 1 > 2
    config = settings(tmp_path)
    alone = [search_path(routed, by_id[record.id], task, config) for record in found]
    assert_same_run(found, alone)


def test_a_resumed_run_keeps_what_was_set_aside(some_fail, tmp_path, assert_same_run):
    routed, task = some_fail
    unbroken = run(routed, tmp_path / "unbroken", [task], limit=None)
    with pytest.raises(KeyboardInterrupt):
        run(routed, tmp_path / "broken", [task], StopAfter(9), limit=None)
    resumed = run(routed, tmp_path / "broken", [task], limit=None)
    assert_same_run(read_search(unbroken), read_search(resumed))
    failed = "search.failed.jsonl"
    assert unbroken.with_name(failed).read_text() == resumed.with_name(failed).read_text()


def test_a_run_in_which_every_question_fails_ends_with_the_reason(
    tiny_llama, tiny_tokenizer, facts, tmp_path
):
    model = tiny_llama(max_position_embeddings=1024)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    message = r"none of the first 7 questions could be searched; .*--dtype float32"
    with pytest.raises(TaskError, match=message):
        run(routed, tmp_path, [facts])
    assert list(tmp_path.iterdir()) == []


def test_a_hopeless_run_ends_before_all_questions_have_failed(
    tiny_llama, tiny_tokenizer, facts, tmp_path
):
    model = tiny_llama(max_position_embeddings=1024)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    with pytest.raises(TaskError, match="none of the first 16 questions"):
        run(routed, tmp_path, [facts], limit=40)
