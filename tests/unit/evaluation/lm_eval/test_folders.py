"""Task folders: the stock harness makes of them what its own task files make of the same rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.folders import make_task_folder
from drllm.records.splits import question_key
from drllm.tasks.base import Task
from drllm.tasks.examples import OPTIONS_REWARD
from drllm.tasks.files import FileTask
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.row_files import read_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

PARTS = ("anatomy", "high_school_us_history")
OURS = ("builtin_facts", "builtin_arithmetic")


@pytest.fixture
def write(tmp_path):
    """A function that writes tasks, by name, into the folder `tasks` of the test."""

    def to_folder(names, place="tasks", **settings: Any):
        written, files = make_folder(names, **settings)
        files.write(tmp_path / place)
        return written

    return to_folder


def make_folder(names, **settings: Any):
    """Return the tasks of a folder, by name, and its files; nothing is written."""
    defaults: dict[str, Any] = {"split": "test", "limit": None, "seed": 0, "data_dir": None}
    tasks = [names] if isinstance(names, Task) else get_tasks(names)
    return make_task_folder(tasks, **{**defaults, **settings})


@pytest.fixture
def write_and_load(write, load_folder):
    """A function that writes one task, and returns it with the harness' tasks by leaf."""

    def load_task(name, place="tasks", **settings: Any):
        [task] = write(name, place=place, **settings)
        return task, load_folder(task.harness_name, place=place)

    return load_task


def requests_of(task):
    return [instance.args for instance in task.instances]


def list_search_requests(task):
    """Return the requests of a search's own prompts."""
    prompts = [task.prompt(example, OPTIONS_REWARD) for example in task.examples("test")]
    return [(prompt.text, text) for prompt in prompts for text in prompt.continuations]


def rows_of(name, split="test"):
    task = get_task(name)
    assert isinstance(task, PublishedTask)
    return task.rows(split)


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_the_requests_are_those_of_the_harness_own_task_file(
    set_name, num_fewshot, sets, write_and_load, rendered_by_the_harness
):
    if not sets[set_name].file:
        pytest.skip("the harness has no file for it")
    task, leaves = write_and_load(set_name, num_fewshot=num_fewshot)
    assert list(leaves) == list(task.leaves)
    rows = rows_of(set_name)
    examples = get_task(set_name).shots("test") if num_fewshot else []
    for part in PARTS if "{part}" in sets[set_name].file else ("",):
        here = [
            [r for _, r in group if not part or r["subject"] == part] for group in (rows, examples)
        ]
        file = sets[set_name].file.format(part=part)
        theirs = rendered_by_the_harness(here[0], file, here[1], num_fewshot)
        assert requests_of(leaves[f"{set_name}_{part}" if part else set_name]) == theirs
    assert task.num_questions == sum(len(leaf.eval_docs) for leaf in leaves.values())
    assert task.num_fewshot == num_fewshot


def test_gsm8k_shows_five_worked_examples_unless_told_otherwise(
    sets, write_and_load, rendered_by_the_harness
):
    task, leaves = write_and_load("gsm8k", split="select")
    rows = [row for _, row in rows_of("gsm8k", "select")]
    examples = [row for _, row in rows_of("gsm8k", "fit")]
    assert (task.num_fewshot, task.metric, task.filter) == (5, "exact_match", "flexible-extract")
    theirs = rendered_by_the_harness(rows, "gsm8k/gsm8k.yaml", examples, None)
    assert requests_of(leaves["gsm8k"]) == theirs


def test_the_hub_and_a_data_folder_give_the_same_requests(
    set_name, data_folder, load_folder, tmp_path
):
    online, hub_files = make_folder(set_name, num_fewshot=2)
    offline, own_files = make_folder(set_name, num_fewshot=2, data_dir=data_folder(set_name))
    assert online == offline
    if hub_files == own_files:  # which the harness reads alike
        return
    requests = []
    for place, files in (("online", hub_files), ("offline", own_files)):
        files.write(tmp_path / place)
        tasks = load_folder(online[0].harness_name, place=place)
        requests.append([requests_of(task) for task in tasks.values()])
    assert requests[0] == requests[1]


def test_squads_prompt_is_the_harness_own(sets, write_and_load):
    from lm_eval.tasks.squadv2.task import SQuAD2

    task = write_and_load("squad_v2", num_fewshot=0)[1]["squad_v2"]
    rows = [row for _, row in rows_of("squad_v2")]
    contexts = [context for context, _ in requests_of(task)]
    assert contexts == [SQuAD2.doc_to_text(None, row) for row in rows]
    assert {json.dumps(how) for _, how in requests_of(task)} == {
        '{"until": ["\\n"], "do_sample": false, "max_gen_toks": 32}'
    }
    targets = [SQuAD2.doc_to_target(None, row).removeprefix(" ") for row in rows]
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == targets


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "hellaswag", "piqa", "mmlu_cloze"])
def test_what_a_search_asks_is_what_an_evaluation_asks(name, sets, write_and_load):
    _, leaves = write_and_load(name, num_fewshot=0)
    ours = list_search_requests(get_task(name.removesuffix("_cloze")))
    assert sorted(ours) == sorted(args for task in leaves.values() for args in requests_of(task))


@pytest.mark.usefixtures("no_environment_report")
def test_a_run_of_the_harness_reports_the_metric_that_counts_of_every_task(
    sets, hub, write, tmp_path
):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    hub.files["hkust-nlp/dart-math-pool-math", None, "train"] = [
        {"query": f"What is {n}?", "gt_ans": str(n), "level": 1 + n % 5} for n in range(300)
    ]
    names = [*sets, *(f"dart-{level}" for level in range(1, 6)), *OURS]
    tasks = write(",".join(names), limit=6, num_fewshot=0)
    assert [task.name for task in tasks] == names
    report = simple_evaluate(
        model="dummy",
        tasks=[task.harness_name for task in tasks],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        num_fewshot=2,  # without effect: it would show questions that are asked
    )
    assert set(report["n-shot"].values()) == {0}
    for task in tasks:
        results = {**report["results"], **report.get("groups", {})}
        assert (task.chance == 0.0) == (task.kind == "generated")
        result = results[task.harness_name][f"{task.metric},{task.filter}"]
        assert 0 <= result <= 1
        samples = [sample for leaf in task.leaves for sample in report["samples"][leaf]]
        counted = [sample for sample in samples if sample["filter"] == task.filter]
        assert len(counted) == task.num_questions == 6
        assert len({sample["doc"]["drllm_id"] for sample in counted}) == 6
        mean = sum(sample[task.metric] for sample in counted) / 6
        assert result == pytest.approx(mean)


def test_options_of_ours_are_asked_byte_for_byte_as_a_search_asks_them(write_and_load, tmp_path):
    dates = ["2001-01-01", "1999-12-31"]
    lines = [
        {
            "question": f"Day {n}? {{{{x}}}} {{y}}\n 'é\" 😀",
            "choices": [*dates, f"20{n:02}-05-05"],
            "answer": n % 3,
        }
        for n in range(40)
    ]
    path = tmp_path / "my days, all.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = FileTask(path, (), read_rows(path))
    written, leaves = write_and_load(task)
    assert (written.name, written.harness_name) == ("my days, all", "my_days_all")
    leaf = leaves["my_days_all"]
    assert requests_of(leaf) == list_search_requests(task)
    golds = [leaf.doc_to_target(doc) for doc in leaf.eval_docs]
    assert golds == [example.gold for example in task.examples("test")]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("builtin_arithmetic", "so \\boxed{{{}}}", "\\boxed{{{}1}}"), ("dates", "{}.", "on {}")],
)
def test_generated_answers_of_ours_are_graded_by_our_rules(
    name, right, wrong, write_and_load, tmp_path
):
    if name == "dates":
        name = str(tmp_path / "dates.jsonl")
        rows = [
            {"question": f"Which day is {n}?", "answer": f"20{n:02}-05-05", "grader": "exact"}
            for n in range(40)
        ]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    written, leaves = write_and_load(name, num_fewshot=1)
    [leaf] = leaves.values()
    task = get_task(name)
    examples = task.examples("test")
    prompts = [task.prompt(example, task.rewards[0]) for example in examples]
    for prompt, (context, how), doc in zip(prompts, requests_of(leaf), leaf.eval_docs, strict=True):
        before, question, after = context.rpartition(prompt.text)
        assert before.endswith("\n\n")
        assert (question, after) == (prompt.text, "")
        assert how["max_gen_toks"] == max(p.max_new_tokens for p in prompts)
        assert leaf.process_results(doc, [right.format(prompt.answer)]) == {"exact_match": 1.0}
        assert leaf.process_results(doc, [wrong.format(prompt.answer)]) == {"exact_match": 0.0}
    assert any("search" in note for note in written.notes)


def test_no_question_that_is_asked_is_shown(set_name, sets):
    name, task = set_name, get_task(set_name)
    assert isinstance(task, PublishedTask)
    for split in ("select", "test"):
        [written], files = make_folder(name, split=split, num_fewshot=2)
        tested = {question_key(e.question) for e in get_task(name).examples("test")}
        ids: dict[str, set[str]] = {"asked": set(), "shown": set()}
        for leaf in written.leaves:
            places = files.tasks[f"{leaf}.yaml"]["dataset_kwargs"]["data_files"]
            for use, place in places.items():
                ids[use] |= {
                    json.loads(line)["drllm_id"] for line in files.rows[place].splitlines()
                }
        examples = {e.id: question_key(e.question) for e, _ in task.shots(split)}
        assert ids["shown"] <= set(examples)
        if split == "test" or set(task.files.values()) != {"single"}:
            assert not tested & {examples[example_id] for example_id in ids["shown"]}
        assert not ids["shown"] & ids["asked"]


def test_a_question_that_stands_among_the_worked_examples_is_not_asked_with_them(sets, hub, write):
    rows = rows_of("mmlu")
    dev = [dict(row) for row in sets["mmlu"].hub["cais/mmlu", "all", "dev"]]
    dev[0] = {**rows[0][1], "subject": "anatomy"}
    hub.files["cais/mmlu", "all", "dev"] = dev
    assert write("mmlu", num_fewshot=0)[0].num_questions == len(rows)
    [task] = write("mmlu", num_fewshot=2)
    assert task.num_questions == len(rows) - 1
    assert list(task.not_asked.values()) == ["a worked example is the same question"]
    assert any(note.startswith("not asked: 1 (") for note in task.notes)


def test_a_limit_draws_the_same_questions_each_time_and_only_their_parts_are_written(
    sets, write_and_load
):
    both = [write_and_load("mmlu", place=place, limit=1, seed=3) for place in ("once", "again")]
    tasks, ids = [], []
    for task, leaves in both:
        [leaf] = leaves.values()
        tasks.append(task)
        ids.append([doc["drllm_id"] for doc in leaf.eval_docs])
    assert tasks[0] == tasks[1]
    assert ids[0] == ids[1]
    assert (tasks[0].num_questions, len(tasks[0].leaves)) == (1, 1)


def test_the_same_questions_give_the_same_files(sets, write, tmp_path):
    def content():
        files = [path for path in (tmp_path / "tasks").rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in files}

    write("arc_easy,mmlu,builtin_facts", num_fewshot=1)
    first = content()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "tasks" / "rows").iterdir()}
    write("arc_easy,mmlu,builtin_facts", num_fewshot=1)
    assert content() == first
    for path, time in times.items():
        assert path.stat().st_mtime_ns == time  # what datasets has cached stays valid


def test_other_rows_are_never_read_from_an_old_cache(data_folder, write_and_load, write_rows):
    data_dir = data_folder("piqa")
    before = write_and_load("piqa", data_dir=data_dir)[1]["piqa"]
    rows = [{**row, "sol1": "Wait."} for row in map(dict, before.eval_docs)]
    write_rows(
        "data/piqa/validation",
        [{k: row[k] for k in ("goal", "sol1", "sol2", "label")} for row in rows],
    )
    after = write_and_load("piqa", data_dir=data_dir)[1]["piqa"]
    assert {doc["sol1"] for doc in after.eval_docs} == {"Wait."}
    assert len(requests_of(after)) == len(requests_of(before))


def test_what_datasets_keeps_is_kept_in_the_folder(sets, write_and_load, tmp_path, monkeypatch):
    import datasets

    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(elsewhere))
    write_and_load("piqa")
    assert not elsewhere.exists()
    assert list((tmp_path / "tasks" / "cache").rglob("*.arrow"))


@pytest.mark.thorough
def test_the_stock_harness_with_all_of_its_own_tasks_takes_ours_of_the_same_names(
    sets, write, load_folder
):
    write("arc_easy,mmlu", num_fewshot=0)
    alone = load_folder("arc_easy", "mmlu")
    beside = load_folder("arc_easy", "mmlu", defaults=True)
    assert {n: requests_of(t) for n, t in beside.items()} == {
        n: requests_of(t) for n, t in alone.items()
    }


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ("arc_easy", {"num_fewshot": -1}, "num_fewshot is -1; expected 0 or more"),
        ("mmlu", {"num_fewshot": 6}, r"'mmlu' \(anatomy\) has 5 worked examples .* at most 5"),
        ("piqa", {"num_fewshot": 99}, r"'piqa' has \d+ worked examples .* num_fewshot is 99"),
        ("mmlu", {"split": "fit"}, "'mmlu'.*'fit'"),
        ("arc_easy", {"split": "tset"}, "'tset'.*'test'"),
    ],
)
def test_what_cannot_be_asked_is_refused(names, settings, message, sets, write):
    with pytest.raises((ConfigError, TaskError), match=message):
        write(names, **settings)


def test_a_task_named_twice_and_an_empty_split_are_refused(write, tmp_path):
    twice = [get_task("builtin_facts")] * 2
    with pytest.raises(TaskError, match="'builtin_facts' is given twice"):
        make_task_folder(twice, split="test", limit=None, seed=0, data_dir=None)
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"question": "1?", "choices": ["a", "b"], "answer": 0}) + "\n")
    empty = next(s for s in ("search", "test") if not get_task(str(path)).examples(s))
    with pytest.raises(TaskError, match=f"'few' has no questions in split '{empty}'"):
        write(str(path), split=empty)


@pytest.mark.parametrize(
    ("place", "column", "settings", "message"),
    [
        (
            "commonsense_qa/validation",
            "",
            {"num_fewshot": 2},
            r"train\.jsonl.*num_fewshot is 2, and 0 needs no",
        ),
        ("gsm8k/train", "", {}, r"there is train: its questions for search, fit, select"),
        (
            "squad_v2/validation",
            "title",  # which only the prompt needs
            {},
            "'squad_v2', question 'validation-0': 'title' is missing",
        ),
    ],
)
def test_what_a_data_folder_lacks_is_named(
    place, column, settings, message, write, write_rows, sets
):
    name = place.split("/")[0]
    rows = [{k: v for k, v in row.items() if k != column} for row in sets[name].folder[place]]
    data_dir = write_rows(f"data/{place}", rows).parents[1]
    with pytest.raises(TaskError, match=message):
        write(name, data_dir=data_dir, **settings)
    if settings:
        assert write(name, data_dir=data_dir)


REAL = {
    "arc_easy": ("arc_easy/validation", "arc/arc_easy.yaml"),
    "arc_challenge": ("arc_challenge/validation", "arc/arc_challenge.yaml"),
    "commonsense_qa": ("commonsense_qa/validation", "commonsense_qa/default.yaml"),
    "winogrande": ("winogrande/validation", "winogrande/default.yaml"),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_are_asked_as_the_harness_asks_them(
    name, data_dir, write_and_load, rendered_by_the_harness
):
    place, file = REAL[name]
    with gzip.open(data_dir / f"{place}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    task, leaves = write_and_load(name, data_dir=data_dir, limit=100)
    leaf, key = leaves[name], "sentence" if name == "winogrande" else "question"
    questions = {doc[key] for doc in leaf.eval_docs}
    of_those = [row for row in rows if row[key] in questions]
    assert task.num_questions == 100
    assert requests_of(leaf) == rendered_by_the_harness(of_those, file)


@pytest.mark.thorough
def test_every_real_set_can_be_evaluated(data_dir, write, load_folder):
    names = "arc,commonsense_qa,commonsense_qa_cloze,hellaswag,mmlu,mmlu_cloze,squad_v2,winogrande"
    tasks = write(names, data_dir=data_dir, limit=20)
    tasks += write("gsm8k", data_dir=data_dir, limit=20, split="select")
    assert [task.num_questions for task in tasks] == [20] * 10
    leaves = load_folder(*(task.harness_name for task in tasks))
    assert sum(len(task.eval_docs) for task in leaves.values()) == 200
