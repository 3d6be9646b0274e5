"""The search stage on a tiny model: what is kept, resumed, refused and written."""

import importlib.metadata
import json
import re
import shutil
import subprocess

import pytest
from listeners import RecordingListener
from peft import LoraConfig, inject_adapter_in_model

import drllm
from drllm.config import SearchConfig
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.workers import Workers
from drllm.records import codec
from drllm.records.codec import read_json_lines
from drllm.records.manifest import manifest_path
from drllm.records.search import FailedQuestion, read_search
from drllm.records.splits import find_split
from drllm.search import CHUNKS_FOLDER, count_kept_batches, retest
from drllm.search import targets as search_targets
from drllm.search.evaluator import Evaluator
from drllm.search.progress import SearchProgress
from drllm.search.questions import SearchQuestion, collect_questions, split_into_batches
from drllm.search.run import SearchWatch, run_search, search_questions
from drllm.search.wrong_answers import FullAnswer
from drllm.tasks.examples import Example, Prompt, choose
from drllm.tasks.registry import get_task
from drllm.work.local import LocalExecutor

IDENTITY = {"id": "tiny", "num_layers": 6, "fingerprint": "0"}
RUNTIME = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa"}


def settings(**values):
    return SearchConfig(num_simulations=8, **{"limit": 7, "block_size": 2, **values})


def run(routed, folder, tasks, listener=None, runtime=RUNTIME, identity=IDENTITY, **values):
    config = settings(**values)
    base = BaseModel(routed.model, routed.tokenizer, "tiny")
    workers = Workers(base, routed, LocalExecutor(routed, identity, runtime))
    return run_search(workers, collect_questions(tasks, config), config, folder, listener)


def interrupt(routed, folder, tasks, questions, **values):
    with pytest.raises(KeyboardInterrupt):
        run(routed, folder, tasks, RecordingListener(stop_at=questions), **values)


def chunks(folder):
    return {file.name: file for file in (folder / CHUNKS_FOLDER).glob("batch-*.json")}


@pytest.fixture(scope="module")
def undisturbed(routed, facts, tmp_path_factory):
    """The records of a run that nothing disturbed, and its listener."""
    listener = RecordingListener()
    return run(routed, tmp_path_factory.mktemp("unbroken"), [facts], listener), listener


@pytest.fixture(scope="module")
def unbroken(undisturbed):
    return undisturbed[0]


@pytest.fixture
def finished(unbroken, tmp_path):
    """A folder with a complete search."""
    return shutil.copytree(unbroken.file.parent, tmp_path / "finished")


@pytest.fixture
def num_evaluated(monkeypatch):
    """The paths that were evaluated, re-tests included, in a list of one number."""
    counted = [0]
    evaluate = Evaluator.evaluate

    def counting(self, pairs):
        counted[0] += len(pairs)
        return evaluate(self, pairs)

    monkeypatch.setattr(Evaluator, "evaluate", counting)
    return counted


@pytest.mark.parametrize("questions", [0.5, 2, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one(
    routed, facts, tmp_path, questions, unbroken, assert_same_run
):
    interrupt(routed, tmp_path, [facts], questions)
    assert not (tmp_path / "search.jsonl").exists()
    resumed = run(routed, tmp_path, [facts])
    assert_same_run(unbroken, resumed)
    assert_same_run(unbroken, read_search(tmp_path / "search.jsonl"))
    assert not (tmp_path / CHUNKS_FOLDER).exists()


def test_an_interrupted_batch_loses_one_round_and_no_retest(
    routed, facts, tmp_path, num_evaluated, monkeypatch, assert_same_run
):
    """Interrupted in the midst of the rounds, then between two ways of the re-test."""
    config = {"limit": 4, "block_size": 4}
    whole = run(routed, tmp_path / "unbroken", [facts], **config)
    num_unbroken, num_evaluated[0] = num_evaluated[0], 0
    interrupt(routed, tmp_path / "broken", [facts], 2, **config)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(retest, "judge_options", interrupted)  # of the way that is judged last
        with pytest.raises(KeyboardInterrupt):
            run(routed, tmp_path / "broken", [facts], **config)
    resumed = run(routed, tmp_path / "broken", [facts], **config)
    assert_same_run(whole, resumed)
    assert num_unbroken <= num_evaluated[0] <= num_unbroken + 4 * 4, "one round at most"


def test_paths_a_second_are_counted_without_those_that_an_interrupted_batch_kept(
    routed, facts, tmp_path, num_evaluated, monkeypatch
):
    config = {"limit": 4, "block_size": 4}
    interrupt(routed, tmp_path, [facts], 0.5, **config)  # after some of the rounds
    num_kept = num_evaluated[0]
    add = SearchProgress.add
    counted = []

    def add_and_record(self, *arguments, **is_new):
        add(self, *arguments, **is_new)
        counted.append(self.num_new_paths)

    monkeypatch.setattr(SearchProgress, "add", add_and_record)
    records = run(routed, tmp_path, [facts], **config)
    num_paths = sum(len(record.paths) for record in records)
    assert 0 < num_kept < num_paths
    assert counted == [num_paths - num_kept]


def test_records_stand_in_the_order_of_the_questions_whatever_their_batches(
    routed, facts, unbroken
):
    asked = choose(facts.examples("search"), settings().limit, 0)
    assert [example.id for example in asked] == [record.id for record in unbroken]
    batches = split_into_batches(collect_questions([facts], settings()), 2)
    by_batch = [question.example.id for batch in batches for question in batch.questions]
    assert by_batch != [record.id for record in unbroken]


def test_finished_batches_are_not_searched_again(routed, facts, tmp_path):
    interrupt(routed, tmp_path, [facts], 4)
    before = {name: file.stat().st_mtime_ns for name, file in chunks(tmp_path).items()}
    interrupt(routed, tmp_path, [facts], 6)
    after = {name: file.stat().st_mtime_ns for name, file in chunks(tmp_path).items()}
    kept = [name for name in before if name.count(".") == 1]
    assert kept
    assert [before[name] for name in kept] == [after[name] for name in kept]
    assert count_kept_batches(tmp_path / CHUNKS_FOLDER) > len(kept) - 1


def test_a_finished_search_is_returned_as_it_is_whoever_asks_for_it(
    routed, facts, finished, unbroken, assert_same_run
):
    before = (finished / "search.jsonl").stat().st_mtime_ns
    listener = RecordingListener()
    for who in ({}, {"state_cache_gb": 1.0, "executor": "ray"}):
        again = run(routed, finished, [facts], listener, **who)
        assert_same_run(unbroken, again)
        assert (unbroken.is_new, again.is_new) == (True, False)
        assert before == again.file.stat().st_mtime_ns
    assert listener.calls == listener.notes == []


def test_a_search_without_a_folder_gives_the_same_records_and_writes_nothing(
    routed, facts, unbroken, tmp_path, monkeypatch, assert_same_run
):
    monkeypatch.chdir(tmp_path)
    result = drllm.search_paths(routed, [facts], settings())
    assert_same_run(unbroken, result)
    assert result.file is None
    assert result.model["num_layers"] == 6
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=[2, None], ids=["interrupted", "complete"])
def earlier(request, routed, facts, unbroken, tmp_path_factory):
    """The folder of a search that was interrupted, or of one that is complete."""
    if request.param is None:
        return unbroken.file.parent
    folder = tmp_path_factory.mktemp("earlier")
    interrupt(routed, folder, [facts], request.param)
    return folder


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 3}, "seed 0, now 3"),
        ({"budget": 1.5}, "budget 2.0, now 1.5"),
        ({"stop_rule": "paper"}, "stop_rule"),
        ({"shard": "1/2"}, "shard"),
        ({"limit": 6}, "limit 7, now 6"),
        ({"identity": {**IDENTITY, "fingerprint": "1"}}, "fingerprint"),
        ({"runtime": {**RUNTIME, "dtype": "bfloat16"}}, 'dtype "float32", now "bfloat16"'),
        ({"runtime": {**RUNTIME, "device": "cuda"}}, "device"),
    ],
)
def test_another_search_does_not_resume_a_run(routed, facts, earlier, changed, named):
    with pytest.raises(ConfigError, match=f"{named}.*choose another --output-dir"):
        run(routed, earlier, [facts], **changed)


def test_an_adapter_does_not_resume_a_run_without_one(routed, facts, earlier, tiny_llama):
    config = LoraConfig(target_modules=["q_proj"])
    adapted = inject_adapter_in_model(config, tiny_llama(max_position_embeddings=1024))
    with pytest.raises(ConfigError, match=r"no runtime adapters, now \"[0-9a-f]{16}\""):
        run(RoutedModel(adapted, tokenizer=routed.tokenizer), earlier, [facts])


def test_other_questions_do_not_resume_a_run(routed, earlier):
    with pytest.raises(ConfigError, match="other prompts"):
        run(routed, earlier, [get_task("builtin_arithmetic")])


def test_another_version_does_not_resume_a_run(routed, facts, earlier, tmp_path):
    folder = shutil.copytree(earlier, tmp_path / "copy")
    version = importlib.metadata.version("drllm")
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace(f'"{version}"', '"0.0.0"'))
    with pytest.raises(ConfigError, match=r"drllm_version .*choose another --output-dir"):
        run(routed, folder, [facts])


def test_a_cut_off_result_is_not_taken_for_a_finished_one(routed, facts, finished):
    output = finished / "search.jsonl"
    output.write_bytes(output.read_bytes()[:-50])
    with pytest.raises(RecordError, match="line 7"):
        run(routed, finished, [facts])


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_result_without_its_manifest_is_not_overwritten(routed, facts, tmp_path, interrupted):
    if interrupted:
        interrupt(routed, tmp_path, [facts], 4)
    (tmp_path / "search.jsonl").write_text("mine")
    with pytest.raises(RecordError, match="without its manifest"):
        run(routed, tmp_path, [facts])
    assert (tmp_path / "search.jsonl").read_text() == "mine"


@pytest.fixture(scope="module")
def with_chunks(routed, facts, tmp_path_factory):
    """The folder of a complete search, and in it the chunks that it was made from."""
    folder, kept = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("kept")

    def keep(done):
        if done == 7:  # said again once the last batch is kept
            shutil.copytree(folder / CHUNKS_FOLDER, kept, dirs_exist_ok=True)

    run(routed, folder, [facts], RecordingListener(on_report=keep))
    kept.rename(folder / CHUNKS_FOLDER)
    return folder


@pytest.fixture
def left_over(with_chunks, tmp_path):
    """A complete search, and next to it the chunks that it was made from."""
    return shutil.copytree(with_chunks, tmp_path, dirs_exist_ok=True) / "search.jsonl"


def test_a_run_killed_before_its_manifest_is_completed_from_its_chunks(
    routed, facts, tmp_path, left_over
):
    before = left_over.read_bytes()
    manifest_path(left_over).unlink()
    assert run(routed, tmp_path, [facts]).file == left_over
    assert left_over.read_bytes() == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["search.jsonl", "search.manifest.json"]


def test_a_run_killed_after_its_manifest_is_cleared_of_its_chunks(
    routed, facts, tmp_path, left_over
):
    before = left_over.stat().st_mtime_ns
    assert run(routed, tmp_path, [facts]).file == left_over
    assert left_over.stat().st_mtime_ns == before
    assert not (tmp_path / CHUNKS_FOLDER).exists()


def test_the_manifest_names_model_settings_and_prompts(unbroken):
    manifest = json.loads(manifest_path(unbroken.file).read_text())
    assert manifest["model"] == IDENTITY
    assert manifest["config"]["num_simulations"] == 8
    assert manifest["num_records"] == 7
    assert manifest["plan"]["runtime"] == RUNTIME
    assert len(manifest["plan"]["prompts_sha256"]) == 64


def test_progress_counts_questions_and_says_what_is_found(undisturbed):
    records, listener = undisturbed
    done = [done for done, _, _ in listener.calls]
    assert done == sorted(done)
    assert listener.calls[-1][:2] == (7, 7)
    assert any(share != int(share) for share in done), "progress moves within a batch"
    survived = [
        [path for path in record.paths if path.retest is not None and path.retest.survived]
        for record in records
    ]
    valid = sum(map(bool, survived)) / 7
    assert 0 < valid < 1, "the sample must hold both"
    message = (
        rf"7 of 7 questions, builtin_facts, [0-9.]+ paths a second, "
        rf"right path for {100 * valid:.0f} % of questions, \d+ % corrected"
    )
    assert re.fullmatch(message, listener.calls[-1][2])


def test_progress_is_measured_by_the_length_of_questions(undisturbed, facts):
    _, listener = undisturbed
    config = settings()
    batches = split_into_batches(collect_questions([facts], config), config.block_size)
    lengths = [batch.num_characters for batch in batches]
    assert lengths[0] < lengths[1], "the sample must hold short and long questions"
    expected = [7 * sum(lengths[:number]) / sum(lengths) for number in range(1, len(lengths) + 1)]
    finished = [done for done, _, note in listener.calls if re.match(r"\d+ of 7 questions", note)]
    assert finished == pytest.approx(expected)


def test_a_reward_that_the_task_cannot_grade_is_refused_before_any_work(routed, facts, tmp_path):
    with pytest.raises(TaskError, match="boxed"):
        drllm.search_paths(routed, [facts], settings(reward="boxed"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_ray_takes_no_model_that_is_loaded_already(routed, facts):
    with pytest.raises(ConfigError, match="ModelConfig"):
        drllm.search_paths(routed, [facts], settings(executor="ray"))


def test_another_chat_template_does_not_resume_a_run(routed, tmp_path, monkeypatch):
    task = get_task("builtin_arithmetic")
    run(routed, tmp_path, [task], limit=2)
    template = "{{ messages[0]['content'] }}!"
    monkeypatch.setattr(routed.tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match="other chat template"):
        run(routed, tmp_path, [task], limit=2)


@pytest.mark.thorough
def test_a_search_is_resumed_the_next_day_under_a_template_that_prints_the_date(
    routed, tmp_path, monkeypatch, set_date, assert_same_run
):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    monkeypatch.setattr(routed.tokenizer, "chat_template", template)
    task, few = get_task("builtin_arithmetic"), {"limit": 2, "block_size": 1}
    set_date(2031, 5, 1)
    unbroken = run(routed, tmp_path / "unbroken", [task], **few)
    interrupt(routed, tmp_path / "broken", [task], 1, **few)
    set_date(2031, 5, 2)
    resumed = run(routed, tmp_path / "broken", [task], **few)
    assert_same_run(unbroken, resumed)
    assert all(record.prompt.startswith("26 Jul 2024 ") for record in resumed)


def test_one_prompt_of_each_task_is_told_as_the_model_reads_it(routed, facts, tmp_path):
    listener = RecordingListener()
    tasks = [facts, get_task("builtin_arithmetic")]
    records = run(routed, tmp_path, tasks, listener, limit=2)
    *prompts, estimate = listener.notes
    assert estimate.startswith("at most ")
    for task, note in zip(tasks, prompts, strict=True):
        title, *lines = note.split("\n  | ")
        assert title == f"a prompt of {task.name}, as the model reads it:"
        prompts = [record.prompt for record in records if record.task == task.name]
        assert "\n".join(lines) in prompts
    assert lines[0].startswith("user: ")


def test_of_a_long_prompt_the_middle_is_left_out(routed, write_rows):
    row = {"question": f"Of {'very ' * 130}many, which?", "choices": ["one", "none"], "answer": 0}
    task = get_task(str(write_rows("own", [row])))
    listener, split = RecordingListener(), find_split(row["question"], "own")
    [record] = run(routed, None, [task], listener, split=split)
    text = listener.notes[0].partition("\n  | ")[2].replace("\n  | ", "\n")
    start, number, end = re.split(r"\[\.\.\. ([0-9]+) characters left out \.\.\.\]", text)
    assert record.prompt.startswith(start)
    assert record.prompt.endswith(end)
    assert len(start) == len(end) == 300
    assert len(record.prompt) == 600 + int(number)


def test_a_prompt_that_the_template_refuses_is_not_the_example(routed, tmp_path, monkeypatch):
    task, listener = get_task("builtin_arithmetic"), RecordingListener()
    first = collect_questions([task], settings(limit=3))[0].example
    template = (
        f"{{% if {first.question!r} in messages[0]['content'] %}}"
        "{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    )
    monkeypatch.setattr(routed.tokenizer, "chat_template", template)
    result = run(routed, tmp_path, [task], listener, limit=3)
    assert first.question not in listener.notes[0]
    assert [failed.id for failed in result.failed] == [first.id]


def test_a_task_of_which_nothing_is_answered_right_is_warned_about_with_an_answer(
    routed, write_rows, undisturbed
):
    rows = [{"question": f"What is {n}?", "answer": "zyx", "grader": "exact"} for n in range(20)]
    task = get_task(str(write_rows("own", rows)))
    listener = RecordingListener()
    records = run(routed, None, [task], listener, limit=5)
    first = records[0]
    assert listener.notes[-1].startswith(
        f"the full model answers none of the 5 questions of own right: to {first.question!r} it "
        f"answers {first.full.answer[:60]!r}, and 'zyx' is right; check"
    )
    few = RecordingListener()
    run(routed, None, [task], few, limit=4)
    for other in (few, undisturbed[1]):
        assert not any("answers none" in note for note in other.notes)


class StartListener(RecordingListener):
    """Records which notes came before any progress."""

    def __init__(self):
        super().__init__()
        self.first_notes = []

    def note(self, text):
        super().note(text)
        if not self.calls:
            self.first_notes.append(text)


def test_first_answers_that_are_all_wrong_are_shown_before_the_search_goes_on(routed, write_rows):
    rows = [{"question": f"What is {n}?", "answer": "zyx", "grader": "exact"} for n in range(20)]
    task = get_task(str(write_rows("own", rows)))
    listener = StartListener()
    records = run(routed, None, [task], listener, limit=6, block_size=8)
    head, *examples = listener.first_notes[-1].split("\n  | ")
    assert head.startswith("the full model answers none of the first 6 questions of own right; the")
    expected = {
        f"to {record.question!r} it answers {record.full.answer[:60]!r}, and 'zyx' is right"
        for record in records
    }
    assert len(set(examples)) == 3
    assert set(examples) <= expected


def test_first_answers_are_counted_over_batches_and_noted_once(routed, write_rows):
    rows = [{"question": f"What is {n}?", "answer": "zyx", "grader": "exact"} for n in range(20)]
    task = get_task(str(write_rows("own", rows)))
    listener = RecordingListener()
    run(routed, None, [task], listener, limit=10, block_size=2)
    [note] = [note for note in listener.notes if "of the first" in note]
    assert note.startswith("the full model answers none of the first 6 questions")


def test_where_a_function_grades_no_right_answer_is_shown():
    assert FullAnswer("What?", "x", "", is_right=False).describe() == "to 'What?' it answers 'x'"


def test_first_answers_that_are_options_are_shown_as_texts(routed, write_rows):
    wrong, right = "odd", "odd, and then an even number, or two of them"  # the longer is unlikelier
    rows = [
        {"question": f"What is {n}?", "choices": [wrong, right], "answer": 1} for n in range(20)
    ]
    task = get_task(str(write_rows("own", rows)))
    listener = StartListener()
    run(routed, None, [task], listener, limit=5, block_size=8)
    _, *examples = listener.first_notes[-1].split("\n  | ")
    assert len(examples) == 3
    for example in examples:
        assert example.endswith(f"it answers {wrong!r}, and {right!r} is right")


def test_what_a_kill_left_half_written_is_cleared_away(routed, facts, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in ("search.jsonl", "search.manifest.json", "search.failed.jsonl"):
        (tmp_path / f".{name}.{codec._host()}-{ended.pid}-01234567").write_text("half")
    run(routed, tmp_path, [facts], limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "search.jsonl",
        "search.manifest.json",
    ]


@pytest.fixture
def some_fail(tiny_llama, tiny_tokenizer, write_rows):
    """A model that knows no number for `~`, and questions of which every fourth has one."""
    model = tiny_llama(max_position_embeddings=1024)
    model.get_input_embeddings().weight.data[tiny_tokenizer("~")["input_ids"][0]] = float("nan")
    rows = [
        {"question": f"{'~' * (n % 4 == 3)}What is {n}?", "choices": ["odd", "even"], "answer": 0}
        for n in range(24)
    ]
    task = get_task(str(write_rows("own", rows)))
    return RoutedModel(model, tokenizer=tiny_tokenizer), task


def read_failed(folder):
    return [row for _, row in read_json_lines(folder / "search.failed.jsonl", FailedQuestion)]


@pytest.mark.thorough
def test_questions_that_fail_are_set_aside_and_their_neighbours_are_searched_as_ever(
    some_fail, tmp_path, assert_same_run
):
    routed, task = some_fail
    result = run(routed, tmp_path / "out", [task], limit=None)
    alone = drllm.search_paths(routed, [task], settings(limit=None, block_size=1))
    bad = {e.id for e in task.examples("search") if "~" in e.question}
    assert tuple(read_failed(tmp_path / "out")) == result.failed
    assert {failed.id for failed in result.failed} == bad
    assert {failed.attempts for failed in result.failed} == {3}
    assert all(
        question.error.startswith("ModelError: the base model's own") for question in result.failed
    )
    assert {record.id for record in result} == {e.id for e in task.examples("search")} - bad
    assert json.loads(manifest_path(result.file).read_text())["num_failed"] == len(bad)
    assert_same_run(result, alone)


OPTIONS = {"choices": ["odd", "even"], "answer": 0}
GRADED = {"grader": "exact"}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("gpt2", OPTIONS),
        ("llama", GRADED),
        pytest.param("gpt2", GRADED, marks=pytest.mark.thorough),
        pytest.param("llama", OPTIONS, marks=pytest.mark.thorough),
    ],
)
def test_a_question_beyond_the_context_is_set_aside_and_its_neighbours_are_searched_as_ever(
    tiny_model, tiny_tokenizer, write_rows, family, how, assert_same_run
):
    routed = RoutedModel(tiny_model(family, max_position_embeddings=256), tokenizer=tiny_tokenizer)
    texts = [f"What is {n}{' less' * (n % 3)}?" for n in range(12)]
    rows = [{"question": text, "answer": "odd", **how} for text in texts]
    long = next(row for row in rows if find_split(row["question"], "own") == "search")
    while len(long["question"]) < 300 or find_split(long["question"], "own") != "search":
        long["question"] += " Why?"
    task = get_task(str(write_rows("own", rows)))

    result, alone = (
        drllm.search_paths(routed, [task], settings(limit=None, block_size=n)) for n in (8, 1)
    )
    [failed] = result.failed
    assert failed.question == long["question"]
    message = r"ModelError: a prompt of the question has \d+ tokens, .* context holds 256; shorten"
    assert re.match(message, failed.error)
    assert len(result) == len(task.examples("search")) - 1 > 2
    assert_same_run(result, alone)


def test_a_finished_search_is_returned_with_what_was_set_aside(some_fail, tmp_path):
    routed, task = some_fail
    first = run(routed, tmp_path, [task], limit=None)
    assert first.failed
    assert run(routed, tmp_path, [task], limit=None).failed == first.failed


def test_a_resumed_run_keeps_what_was_set_aside(some_fail, tmp_path, assert_same_run):
    routed, task = some_fail
    unbroken = run(routed, tmp_path / "unbroken", [task], limit=None)
    interrupt(routed, tmp_path / "broken", [task], 9, limit=None)
    resumed = run(routed, tmp_path / "broken", [task], limit=None)
    assert_same_run(unbroken, resumed)
    assert unbroken.failed == resumed.failed
    assert read_failed(tmp_path / "unbroken") == read_failed(tmp_path / "broken")


@pytest.mark.parametrize(("limit", "first"), [(7, 7), (40, 16)])
def test_a_run_in_which_every_question_fails_ends_with_the_reason_and_soon(
    tiny_llama, tiny_tokenizer, facts, tmp_path, limit, first
):
    model = tiny_llama(max_position_embeddings=1024)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    message = rf"none of the first {first} questions could be searched; .*--dtype float32"
    with pytest.raises(TaskError, match=message):
        run(routed, tmp_path, [facts], limit=limit)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def with_targets(routed, facts, tmp_path):
    """A function that searches into a folder from Python, and returns what it said."""

    def search(**values):
        listener = RecordingListener()
        drllm.search_paths(routed, [facts], settings(**values), tmp_path, listener=listener)
        return listener.notes

    return search


def test_a_search_with_a_folder_leaves_targets_as_supervise_makes_them(with_targets, tmp_path):
    with_targets()
    other = tmp_path / "other"
    assert drllm.supervise(tmp_path / "search.jsonl", output_dir=other)
    left, made = (folder / "supervision.jsonl" for folder in (tmp_path, other))
    assert left.read_text() == made.read_text()
    first, second = (json.loads(manifest_path(file).read_text()) for file in (left, made))
    assert {**first, "created": ""} == {**second, "created": ""}


def test_targets_beside_a_complete_search_stay_and_so_does_a_file_of_ones_own(
    with_targets, tmp_path
):
    with_targets()
    output = tmp_path / "supervision.jsonl"
    before = output.stat().st_mtime_ns
    assert with_targets() == [f"{output} was made from this search already"]
    assert output.stat().st_mtime_ns == before
    manifest_path(output).unlink()
    output.write_text("mine")
    [note] = with_targets()
    assert note == f"{output} has no manifest, so drllm didn't write it; it stays as it is"
    assert output.read_text() == "mine"


def test_a_search_without_targets_says_so_and_leaves_no_file(with_targets, tmp_path, monkeypatch):
    monkeypatch.setattr(search_targets, "pick_targets", lambda records, config: ())
    *_, note = with_targets()
    assert note.startswith("no question has a target path, so supervision.jsonl was not written")
    assert not (tmp_path / "supervision.jsonl").exists()


def write_facts(file, num_rows=14):
    rows = [
        {"question": f"What is {n}?", "choices": ["odd", "even"], "answer": n % 2}
        for n in range(num_rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_finished_search_is_not_returned_for_the_same_questions_of_another_task(routed, tmp_path):
    file = write_facts(tmp_path / "first.jsonl")
    run(routed, tmp_path / "out", str(file), limit=None)
    copy = shutil.copy(file, tmp_path / "second.jsonl")
    with pytest.raises(ConfigError, match=r"other ids or tasks, .* of task 'first'; choose"):
        run(routed, tmp_path / "out", str(copy), limit=None)
    assert {record.task for record in run(routed, tmp_path / "out", str(file), limit=None)} == {
        "first"
    }


def test_a_search_killed_after_its_last_failed_batch_writes_no_empty_file(
    tiny_llama, tiny_tokenizer, facts, tmp_path, monkeypatch
):
    model = tiny_llama(max_position_embeddings=1024)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SearchWatch, "on_result", kill)
        with pytest.raises(KeyboardInterrupt):
            run(routed, tmp_path, [facts], limit=2)
    with pytest.raises(TaskError, match="none of the first 2 questions could be searched"):
        run(routed, tmp_path, [facts], limit=2)
    assert list(tmp_path.iterdir()) == []


def test_a_question_whose_prompt_is_empty_is_set_aside_with_the_reason(routed):
    example = Example(id="1", task="own", question="What is this?", answer="a")
    prompt = Prompt(text="", reward="exact", answer="a")
    question = SearchQuestion(place=0, task="own", example=example, prompt=prompt, retests=())
    with pytest.raises(TaskError, match=r"could be searched; .*the model reads nothing before"):
        search_questions(routed, [question], settings())
