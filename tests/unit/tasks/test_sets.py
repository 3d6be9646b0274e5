"""Every published set: what its rows mean, what is refused, and prompts as the harness has them."""

import gzip
import json
import warnings
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.records.splits import question_key
from drllm.tasks.published.readers import UNANSWERABLE
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import TASKS, get_task, get_tasks
from drllm.tasks.rewards import grade, normalise

AWKWARD = ' What is {{x}} in {question}?\nIt\'s "<b>" é \n '
LABELLED = {
    "id": "row",
    "question": AWKWARD,
    "choices": {"text": ["a {b}", " c", "d\n"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
MMLU = {
    "subject": "high_school_physics",
    "question": AWKWARD,
    "choices": ["a {b}", " c", "d\n", "it's"],
    "answer": 3,
}
RAW_HELLASWAG = {
    "activity_label": "How to {{rest}}",
    "ctx_a": "[header] How to rest [title] Find a  seat. Sit   down.",
    "ctx_b": "then THEY [step] close",
    "endings": [" their eyes [title] Sleep. ", "[substeps] it", "their {ears}", "the book."],
    "label": "2",
}
HELLASWAG = {"query": "Rest: They", "choices": [" a ", "b", "c", "d"], "label": 3}
PIQA = {"goal": "Keep {{tea}} warm", "sol1": "Put a cosy on it.", "sol2": "Add {ice}.", "label": 0}
WINOGRANDE = {"sentence": "Ann helps, _ is ill.", "option1": "Ann", "option2": "Eve", "answer": "2"}
GSM8K = {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
DART = {"query": "Divide 1 by $7$.", "gt_ans": "\\frac{1}{7}", "level": 2}
SQUAD = {
    "id": "row",
    "title": "Mills",
    "context": " The old mill stands by the Green River, near the town. ",
    "question": "Where is the mill?",
    "answers": {"text": ["the Green River", "by the Green River", "The Green River"]},
}


def published(name):
    task = get_task(name)
    assert isinstance(task, PublishedTask)
    return task


def read(name, row):
    example = published(name).read(row)
    assert example is not None
    return example


def asked(name, examples):
    prompts = [get_task(name).prompt(example, "loglikelihood") for example in examples]
    return [(prompt.text, text) for prompt in prompts for text in prompt.continuations]


@pytest.mark.parametrize(
    ("name", "row", "question", "choices", "gold"),
    [
        ("arc_easy", LABELLED, AWKWARD, ("a {b}", " c", "d\n"), 1),
        ("mmlu", MMLU, AWKWARD.strip(), ("a {b}", " c", "d\n", "it's"), 3),
        ("hellaswag", HELLASWAG, "Rest: They", (" a ", "b", "c", "d"), 3),
        ("piqa", PIQA, "Keep {{tea}} warm", ("Put a cosy on it.", "Add {ice}."), 0),
        ("winogrande", WINOGRANDE, WINOGRANDE["sentence"], ("Ann", "Eve"), 1),
    ],
)
def test_a_row_with_options_is_a_question(name, row, question, choices, gold):
    example = read(name, row)
    assert (example.question, example.choices, example.gold) == (question, choices, gold)
    assert example.answer == choices[gold]


@pytest.mark.parametrize(
    ("name", "row", "answers"),
    [
        ("gsm8k", GSM8K, ("7",)),
        ("gsm8k", {**GSM8K, "answer": "#### 1,234,500"}, ("1234500",)),
        ("gsm8k", {**GSM8K, "answer": "A loss.\n#### -12 "}, ("-12",)),
        ("gsm8k", {**GSM8K, "answer": "#### not yet\n#### 0.5"}, ("0.5",)),
        ("dart-2", DART, ("\\frac{1}{7}",)),
        ("dart-3", DART, None),
        ("squad_v2", SQUAD, ("the Green River", "by the Green River")),
        ("squad_v2", {**SQUAD, "answers": {"text": []}}, (UNANSWERABLE,)),
    ],
)
def test_a_row_with_a_generated_answer_is_a_question_or_none(name, row, answers):
    example = published(name).read(row)
    found = None if example is None else (example.answer, *example.other_answers)
    assert found == answers


def test_a_question_without_an_answer_is_right_with_the_word_that_the_prompt_asks_for():
    example = read("squad_v2", {**SQUAD, "answers": {"text": []}})
    task = get_task("squad_v2")
    for prompt in task.prompts(example, "exact"):
        assert UNANSWERABLE in prompt.text
        assert grade(prompt, "Unanswerable.") == 1.0
        assert grade(prompt, "the Green River") == 0.0


def test_hellaswags_raw_row_is_cleaned_as_the_harness_cleans_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from lm_eval.tasks.hellaswag.utils import process_docs

        theirs = process_docs(datasets.Dataset.from_list([RAW_HELLASWAG]))[0]
    example = read("hellaswag", RAW_HELLASWAG)
    assert (example.question, list(example.choices)) == (theirs["query"], theirs["choices"])
    assert example.gold == theirs["gold"] == 2


BROKEN: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("arc_easy", LABELLED, {"answerKey": "4"}, "'answerKey' is '4'; expected one of 1, 2, 3"),
    ("arc_easy", LABELLED, {"question": " "}, "'question' is empty"),
    ("arc_easy", LABELLED, {"choices": ["a"]}, "expected an object with 'text' and 'label'"),
    ("arc_easy", LABELLED, {"choices": {"text": ["a", "b"], "label": ["A"]}}, "'label' has 1"),
    ("arc_easy", LABELLED, {"choices": {"text": ["a", 2], "label": ["A", "B"]}}, "'text' holds 2"),
    ("arc_easy", LABELLED, {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "labels A, A"),
    ("arc_easy", LABELLED, {"id": 7}, "'id' is 7"),
    ("mmlu", MMLU, {"answer": 4}, "'answer' is 4; expected an index from 0 to 3"),
    ("mmlu", MMLU, {"answer": True}, "'answer' is True"),
    ("mmlu", MMLU, {"choices": ["a", " "]}, "'choices' holds ' '"),
    ("mmlu", MMLU, {"subject": None}, "'subject' is None"),
    ("hellaswag", RAW_HELLASWAG, {"label": ""}, "'label' is ''; expected an index from 0 to 3"),
    ("hellaswag", RAW_HELLASWAG, {"label": "4"}, "'label' is 4"),
    ("hellaswag", RAW_HELLASWAG, {"ctx_b": None}, "'ctx_b' is None; expected text"),
    ("hellaswag", RAW_HELLASWAG, {"endings": []}, "'endings' has 0 entries"),
    ("piqa", PIQA, {"label": "0"}, "'label' is '0'"),
    ("winogrande", WINOGRANDE, {"sentence": "No gap."}, "'sentence' has no gap"),
    ("winogrande", WINOGRANDE, {"sentence": "A gap _"}, "'sentence' has no gap"),
    ("winogrande", WINOGRANDE, {"answer": 2}, "'answer' is 2; expected '1' or '2'"),
    ("gsm8k", GSM8K, {"answer": "seven ####"}, "'answer' doesn't end in '#### ' and a number"),
    ("gsm8k", GSM8K, {"answer": "####7"}, "'answer' doesn't end in"),
    ("dart-1", DART, {"level": 6}, "'level' is 6; expected a whole number from 1 to 5"),
    ("dart-2", DART, {"level": None, "query_metadata": {}}, "'level' is None"),
    ("squad_v2", SQUAD, {"answers": {"text": "mill"}}, "expected a list of texts"),
    ("squad_v2", SQUAD, {"answers": {"text": ["."]}}, "the answers are nothing but punctuation"),
    ("hellaswag", RAW_HELLASWAG, {"endings": ["a", "[step]", "c"]}, "leaves nothing of an ending"),
]


@pytest.mark.parametrize(("name", "row", "change", "message"), BROKEN)
def test_a_broken_row_is_named_with_file_and_line(tmp_path, write_rows, name, row, change, message):
    task = published(name)
    file, origin = list(task.files.items())[-1]
    split = "test" if origin != "train" else "search"
    path = write_rows(f"{task.folder or name}/{file}", [{**row, **change}])
    with pytest.raises(TaskError) as caught:
        task.examples(split, tmp_path)
    assert str(caught.value).startswith(f"{path}, line 1: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [name for name in TASKS if get_task(name).prompt_format is None])
def test_a_search_of_a_task_that_is_only_evaluated_is_refused_by_name(name):
    task, example = get_task(name), read("winogrande", WINOGRANDE)
    assert task.description.endswith("evaluation only)")
    for reward in (None, "loglikelihood"):
        with pytest.raises(TaskError, match=f"'{name}' is only evaluated and can't be searched"):
            task.check_reward(reward)
    with pytest.raises(TaskError, match="can't be searched"):
        task.prompt(example, "loglikelihood")


@pytest.mark.parametrize(
    ("name", "key", "row"), [("mmlu", "question", MMLU), ("winogrande", "sentence", WINOGRANDE)]
)
def test_the_file_of_a_set_that_is_only_evaluated_is_halved(name, key, row, tmp_path, write_rows):
    task = published(name)
    write_rows(f"{name}/validation", [{**row, key: f"{row[key]} ({n})"} for n in range(40)])
    select, test = (task.examples(split, tmp_path) for split in ("select", "test"))
    assert len({question_key(example.question) for example in (*select, *test)}) == 40
    assert min(len(select), len(test)) > 8
    if not task.shots_file:
        assert [e for e, _ in task.shots("test", tmp_path)] == select
        assert [e for e, _ in task.shots("select", tmp_path)] == test
    with pytest.raises(TaskError, match="is only evaluated and has no questions for 'search'"):
        task.examples("search", tmp_path)


# --- DART: one question per problem, each level and split without the others' problems -----------

PROBLEMS = 200
POOL = ("hkust-nlp/dart-math-pool-math", None, "train")


def problem(number):
    return {"query": f"Divide {number} by $7$.", "gt_ans": str(number), "level": number % 5 + 1}


def pool_row(number, sample, **metadata: Any):
    """A row as the hub has it: one sampled solution, with the level in its metadata."""
    row = problem(number)
    return {
        "query": row["query"],
        "resp": f"Solution {sample}.",
        "gt_ans": row["gt_ans"],
        "query_metadata": metadata or {"level": row["level"]},
    }


@pytest.fixture
def pool(hub):
    """A hub with three solutions to each problem, the problems one after the other."""
    hub.files[POOL] = [
        pool_row(number, sample) for sample in range(3) for number in range(PROBLEMS)
    ]
    return hub


def by_level(data_dir=None):
    return {
        (task.name, split): [example.question for example in task.examples(split, data_dir)]
        for task in get_tasks("dart")
        for split in SPLITS
    }


def test_every_problem_of_the_pool_is_one_question_of_one_level_and_split(pool):
    questions = by_level()
    everything = [question for part in questions.values() for question in part]
    assert len(everything) == len(set(everything)) == PROBLEMS
    for level in range(1, 6):
        of_level = {problem(n)["query"] for n in range(PROBLEMS) if n % 5 + 1 == level}
        assert {q for split in SPLITS for q in questions[f"dart-{level}", split]} == of_level
        assert questions[f"dart-{level}", "search"]
        assert questions[f"dart-{level}", "test"]
    assert pool.asked == [POOL]  # read once for all levels and splits


def test_problems_of_the_pool_without_a_level_are_passed_over_and_counted_once(pool, caplog):
    for number, place, metadata in ((PROBLEMS, 0, {"level": 0}), (PROBLEMS + 1, 7, {"x": 1})):
        for sample in range(3):
            pool.files[POOL].insert(place, pool_row(number, sample, **metadata))
    assert sum(map(len, by_level().values())) == PROBLEMS
    [record] = caplog.records
    assert f"{POOL[0]} train: problems without a level" in record.getMessage()
    assert record.getMessage().endswith(": 2")


def test_a_pool_in_which_no_problem_has_a_level_is_refused(pool):
    for row in pool.files[POOL]:
        row["query_metadata"] = {"level": "Level 2"}
    with pytest.raises(TaskError, match=r"train, row 1: 'level' is 'Level 2'; expected a whole"):
        get_task("dart-2").examples("search")


def test_a_data_folder_holds_one_file_for_all_levels_and_a_problem_once(pool, tmp_path, write_rows):
    write_rows("dart/train", [problem(n) for n in range(PROBLEMS) for _ in range(2)])
    assert by_level(tmp_path) == by_level()


def test_commonsense_qa_is_asked_in_cloze_form_where_the_harness_asks_for_letters(
    rendered_by_the_harness,
):
    """What docs/differences.md says about it, D-21."""
    example, task = read("commonsense_qa", LABELLED), get_task("commonsense_qa")
    cloze = task.prompt(example, task.check_reward(None))
    assert cloze.continuations == (" a {b}", "  c", " d\n")
    assert "\nC. d\n\nAnswer:" in task.prompt(example, "letter").text
    choices = {"text": [*"abcde"], "label": [*"ABCDE"]}
    row = {**LABELLED, "choices": choices, "answerKey": "A"}
    requests = rendered_by_the_harness([row], "commonsense_qa/default.yaml")
    assert [continuation for _, continuation in requests] == [" A", " B", " C", " D", " E"]
    assert "\nE. e\nAnswer:" in requests[0][0]


def real_rows(data_dir, file):
    with gzip.open(data_dir / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_the_prompts_of_the_real_arc_are_what_the_harness_renders(
    name, data_dir, rendered_by_the_harness
):
    rows = real_rows(data_dir, f"{name}/validation")
    examples = get_task(name).examples("test", data_dir)
    assert asked(name, examples) == rendered_by_the_harness(rows, f"arc/{name}.yaml")
    assert [example.gold for example in examples] == [
        row["choices"]["label"].index(row["answerKey"]) for row in rows
    ]


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.thorough)])
def test_the_prompts_of_the_real_mmlu_are_what_the_harness_renders(
    step, data_dir, rendered_by_the_harness
):
    rows = real_rows(data_dir, "mmlu/validation")
    subjects = {row["subject"] for row in rows}
    assert len(subjects) == 57
    for subject in sorted(subjects)[::step]:
        of_subject = [row for row in rows if row["subject"] == subject]
        file = f"mmlu/continuation/mmlu_{subject}.yaml"
        rendered = rendered_by_the_harness(of_subject, file)
        assert asked("mmlu", [read("mmlu", row) for row in of_subject]) == rendered, subject


SIZES = {
    "arc_easy": {"train": 2243, "test": 570},
    "arc_challenge": {"train": 1118, "test": 299},
    "commonsense_qa": {"test": 1221},
    "gsm8k": {"search": 4473, "fit": 1520, "select": 1480},
    "hellaswag": {"test": 1000},
    "mmlu": {"select": 727, "test": 804},  # all 1531 rows; three questions stand there twice
    "squad_v2": {"test": 1000},
    "winogrande": {"select": 662, "test": 605},
}


@pytest.mark.parametrize("name", SIZES)
def test_the_real_files_are_divided_and_no_question_is_in_two_splits(name, data_dir):
    task, expected = get_task(name), dict(SIZES[name])
    splits = [split for split in SPLITS if split in expected or "train" in expected]
    found = {split: task.examples(split, data_dir) for split in splits}
    sizes = {split: len(examples) for split, examples in found.items()}
    if train := expected.pop("train", 0):
        assert sum(sizes.pop(split) for split in SPLITS[:3]) == train
        assert 0.55 < len(found["search"]) / train < 0.65
    assert sizes == expected
    keys = [{question_key(e.question) for e in examples} for examples in found.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))
    ids = [example.id for examples in found.values() for example in examples]
    assert len(set(ids)) == len(ids)


def test_no_real_training_question_is_in_the_test_of_the_other_arc(data_dir):
    easy, challenge = get_tasks("arc")
    test = {question_key(e.question) for e in challenge.examples("test", data_dir)}
    for split in SPLITS[:3]:
        assert not test & {question_key(e.question) for e in easy.examples(split, data_dir)}


def test_the_real_squad_has_questions_with_and_without_answers(data_dir):
    task = get_task("squad_v2")
    examples = task.examples("test", data_dir)
    answerable = [example for example in examples if example.answer != UNANSWERABLE]
    assert len(answerable) == 462
    assert sum(bool(example.other_answers) for example in answerable) > 100
    for example in answerable:
        for answer in (example.answer, *example.other_answers):
            assert normalise(answer) in " ".join(example.context.split()).casefold()
            assert grade(task.prompt(example, "exact"), answer) == 1.0
