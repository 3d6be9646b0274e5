"""A user's own `.jsonl` file: both kinds of rows, the splits, and every row that can't be used."""

import gzip
import json
from typing import Any

import pytest

from drllm.config import SPLITS, EvaluateConfig
from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.graders import make_entry
from drllm.evaluation.questions import select_tasks
from drllm.tasks.files import with_columns
from drllm.tasks.graded import GradedTask
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.rewards import grade

CHOICES = {"question": "Which is cold?", "choices": ["fire", "ice", "steam"], "answer": 1}
GRADED = {"question": "What is 3 + 4?", "answer": "7", "grader": "boxed"}


def write(folder, *rows: Any, name="mine.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    """Return a file's task and its questions."""
    task = get_task(str(path))
    return task, [example for split in SPLITS for example in task.examples(split)]


@pytest.mark.parametrize("answer", [1, "ice", "B"])
def test_the_right_option_may_be_given_by_index_text_or_letter(tmp_path, answer):
    task, [example] = read(write(tmp_path, {**CHOICES, "answer": answer}))
    assert (example.gold, example.answer, example.id) == (1, "ice", "line-1")
    assert task.rewards == ("loglikelihood", "letter")


def test_a_choices_text_comes_before_a_letter(tmp_path):
    path = write(tmp_path, {"question": "Second letter?", "choices": ["B", "A"], "answer": "B"})
    assert read(path)[1][0].gold == 0


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (GRADED, "\\boxed{7}", "\\boxed{8}"),
        ({**GRADED, "answer": 7}, "\\boxed{7.0}", "7"),
        ({**GRADED, "answer": "Rome", "grader": "exact"}, "Rome.", "in Rome"),
        ({**GRADED, "answer": "C", "grader": "letter"}, "(C)", "A or C"),
        ({**GRADED, "answer": "H", "grader": "letter"}, "H", "F"),
    ],
)
def test_generated_answers_are_graded_as_the_row_says(tmp_path, row, right, wrong):
    task, [example] = read(write(tmp_path, row))
    assert task.rewards == (row["grader"],)
    prompts = task.prompts(example, row["grader"])
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert row["question"] in prompt.text
        assert grade(prompt, right) == 1.0
        assert grade(prompt, wrong) == 0.0


@pytest.mark.parametrize(("answer", "text"), [(4.0, "4"), (-0.0, "0"), (4.5, "4.5"), (4, "4")])
def test_a_number_is_an_answer_as_people_write_it(tmp_path, answer, text):
    task, [example] = read(write(tmp_path, {**GRADED, "grader": "exact", "answer": answer}))
    assert example.answer == text
    assert grade(task.prompts(example, "exact")[0], text) == 1.0


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_prompts_alone_have_no_answers_and_are_refused_where_these_are_needed(tmp_path, name):
    task, examples = read(write(tmp_path, {name: "Say something.", "id": 7}))
    assert [(each.question, each.answer) for each in examples] == [("Say something.", "")]
    assert not task.has_answers
    assert task.rewards == ("kl",)
    with pytest.raises(TaskError, match="'exact' doesn't fit task 'mine'; give kl"):
        task.prompts(examples[0], "exact")
    with pytest.raises(TaskError, match="without answers, which can be searched and learned from"):
        select_tasks(EvaluateConfig(), [task])
    with pytest.raises(TaskError, match="without answers"):  # as lm-eval comes to it
        make_entry(task)


USER, ASSISTANT = ({"role": role, "content": role[0].upper()} for role in ("user", "assistant"))


def test_a_conversation_is_asked_up_to_the_users_last_message(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER, ASSISTANT]
    task, [example] = read(write(tmp_path, {"messages": messages}))
    assert example.question == "system: Be brief.\nuser: U\nassistant: A\nuser: U"
    [prompt] = task.prompts(example, "kl")
    assert (prompt.content, prompt.chat) == (messages[:4], True)


def test_a_function_grades_the_answer_to_a_conversation(tmp_path):
    (tmp_path / "own.py").write_text("def reward(example, text):\n    return 1.0\n")
    task, [example] = read(write(tmp_path, {"messages": [USER, ASSISTANT, USER]}))
    own = GradedTask(task, f"{tmp_path / 'own.py'}:reward")
    assert own.prompt(example, own.reward).content == [USER, ASSISTANT, USER]


ROW = {"query": "Which is cold?", "options": {"text": ["fire", "ice"]}, "target": [{"at": 1}]}


def test_columns_of_other_names_are_named_behind_the_file_those_within_others_too(tmp_path):
    path = write(tmp_path, ROW)
    _, [example] = read(f"{path}?question=query&choices=options.text&answer=target.0.at")
    assert (example.question, example.choices) == ("Which is cold?", ("fire", "ice"))
    assert (example.gold, example.task) == (1, "mine")


@pytest.mark.parametrize(
    ("columns_text", "right"), [("", "Rome."), ("&grader=boxed", "\\boxed{Rome}")]
)
def test_an_answer_without_choices_is_graded_exactly_unless_a_grader_is_named(
    tmp_path, columns_text, right
):
    path = write(tmp_path, {"q": "The capital of Italy?", "a": "Rome"})
    task, [example] = read(f"{path}?question=q&answer=a{columns_text}")
    assert grade(task.prompt(example, task.rewards[0]), right) == 1.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("question=query&gold=target", "unknown field 'gold'"),
        ("question=", "question= is empty; give FIELD=COLUMN"),
        ("question=query&question=text", "question is named twice, as query and as text"),
        (
            "question=text",
            "line 1: column 'text' is missing (the line has: query, options, target)",
        ),
        ("question=options.label", "line 1: column 'options.label' is missing"),
        ("question=target.1", "line 1: column 'target.1' is missing"),
        ("question=target.²", "line 1: column 'target.²' is missing"),
        ("question=target." + "9" * 5000, "is missing (the line has: query, options, target)"),
    ],
)
def test_columns_that_cannot_be_read_are_named(tmp_path, columns, message):
    with pytest.raises(TaskError) as caught:
        get_task(f"{write(tmp_path, ROW)}?{columns}")
    assert message in str(caught.value)


def test_fields_that_no_column_is_named_for_keep_their_own_names(tmp_path):
    row = {"query": "Which is cold?", "choices": ["fire", "ice"], "answer": 1}
    task, [example] = read(f"{write(tmp_path, row)}?question=query")
    assert (example.question, example.gold) == ("Which is cold?", 1)
    assert task.rewards == ("loglikelihood", "letter")


def test_a_hub_set_is_read_by_its_columns_and_rows_that_cannot_be_asked_are_left_out(hub, caplog):
    rows = [{"q": f"What is {n}?", "a": str(n)} for n in range(40)]
    hub.files["owner/name", "small", "validation"] = [{"q": "", "a": "1"}, *rows]
    task, examples = read("owner/name:small:validation?question=q&answer=a")
    assert (task.name, len(examples)) == ("name_small_validation", 40)
    assert (
        "1 rows of owner/name:small:validation are left out, for example row 1: 'question' is"
        in caplog.text
    )


def test_a_hub_set_without_a_row_that_can_be_asked_says_why(hub):
    hub.files["owner/name", None, "train"] = [{"text": "Why?"}, {"text": "How?"}]
    with pytest.raises(TaskError, match="owner/name has no usable row; row 1: 'choices"):
        get_task("owner/name")


def test_columns_are_put_behind_every_file_and_hub_set_of_a_list():
    found = with_columns("arc_easy, mine.jsonl?prompt=p,owner/name:small", "question=q,answer=a")
    columns_text = "question=q&answer=a"
    assert found == f"arc_easy,mine.jsonl?prompt=p&{columns_text},owner/name:small?{columns_text}"
    with pytest.raises(ConfigError, match="has no effect on arc_easy"):
        with_columns("arc_easy", "question=q")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mine.xlsx", "an Excel file"),
        ("data/mine.txt", "a text file"),
        ("mine.TXT?question=q", "a text file"),
    ],
)
def test_a_file_in_another_format_says_what_it_is_and_what_to_write_instead(name, kind):
    for refused in (lambda: get_tasks(name), lambda: with_columns(name, "question=q")):
        with pytest.raises(TaskError, match=rf"is {kind}.* into mine\.csv or mine\.jsonl, .*{{"):
            refused()


def test_a_file_says_how_its_questions_are_divided_and_how_many_repeat_a_text(tmp_path):
    rows = [{**CHOICES, "question": f"Question {number}?"} for number in range(40)]
    task = get_task(str(write(tmp_path, *rows)))
    counts = [f"{len(task.examples(split))} in {split}" for split in SPLITS]
    assert task.describe_splits() == f"{task.path} has 40 questions: {', '.join(counts)}"
    task = get_task(str(write(tmp_path, *rows, rows[3], rows[5])))
    assert task.describe_splits().endswith("; 2 of 42 rows repeat a text, left out")


def test_a_file_is_read_once_unless_it_changes(tmp_path):
    path = write(tmp_path, CHOICES)
    assert get_task(str(path)) is get_task(str(path))
    write(tmp_path, CHOICES, {**CHOICES, "question": "And warm?"})
    assert len(read(path)[1]) == 2


def test_one_file_serves_every_stage_and_no_question_two_of_them(tmp_path):
    rows = [{**CHOICES, "question": f"Question {number}?"} for number in range(1000)]
    task = get_task(str(write(tmp_path, *rows)))
    splits = {split: [e.question for e in task.examples(split)] for split in SPLITS}
    everything = [question for split in SPLITS for question in splits[split]]
    assert sorted(everything) == sorted(str(row["question"]) for row in rows)
    for split, share in {"search": 0.5, "fit": 0.1, "select": 0.15, "test": 0.25}.items():
        assert abs(len(splits[split]) / 1000 - share) < 0.05
        numbers = [int(question.split()[1][:-1]) for question in splits[split]]
        assert numbers == sorted(numbers)


def test_gzipped_files_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "mine.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n" + json.dumps(CHOICES) + "\n\n")
    task, [example] = read(path)
    assert (task.name, example.id) == ("mine", "line-2")


def test_a_repeated_question_with_the_same_answer_counts_once(tmp_path):
    path = write(tmp_path, CHOICES, {**CHOICES, "question": "which is  COLD?", "answer": "ice"})
    assert len(read(path)[1]) == 1


def test_questions_of_one_text_with_other_choices_are_all_asked_and_one_is_trained_on(tmp_path):
    rows = [
        {**CHOICES, "question": f"Question {n}?", "choices": [CHOICES["choices"][0], f"other {m}"]}
        for n in range(40)
        for m in range(2)
    ]
    rows = [{**row, "answer": 0} for row in rows]
    task = get_task(str(write(tmp_path, *rows)))
    texts = {split: [e.question for e in task.examples(split)] for split in SPLITS}
    assert len(texts["test"]) == 2 * len(set(texts["test"])) > 0
    trained = [text for split in SPLITS[:3] for text in texts[split]]
    assert len(trained) == len(set(trained)) == 40 - len(set(texts["test"]))


def test_a_file_never_takes_the_name_of_a_built_in_task(tmp_path):
    assert get_task(str(write(tmp_path, CHOICES, name="arc_easy.jsonl"))).name == "arc_easy_file"


def test_two_files_of_one_name_are_refused_together(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write(folder, CHOICES) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(TaskError, match="have the name 'mine'; rename a file"):
        get_tasks(",".join(map(str, paths)))


def choices(**changes: Any):
    return {**CHOICES, **changes}


def graded(**changes: Any):
    return {**GRADED, **changes}


BROKEN: list[tuple[list[dict[str, Any]], str]] = [
    ([choices(answer=3)], "line 1: 'answer' is 3; expected an index from 0 to 2"),
    ([choices(answer=-1)], "line 1: 'answer' is -1"),
    ([choices(answer="snow")], "line 1: 'answer' 'snow' is not among the choices"),
    ([choices(answer="D")], "its letter (A to C)"),
    ([choices(answer=True)], "line 1: 'answer' is True"),
    ([choices(choices="ice")], "line 1: 'choices' is 'ice'; expected a list"),
    ([choices(choices=["ice", "ice"])], "line 1: 'choices' holds 'ice' twice"),
    ([choices(choices=[*map(str, range(27))])], "'choices' has 27 entries; give at most"),
    ([choices(choices=["ice"] * 100_000)], "'choices' has 100000 entries; give at most"),
    ([choices(grader="letter")], "leave out 'grader'"),
    ([CHOICES, {"choices": ["a", "b"], "answer": 0}], "line 2: 'question' is missing"),
    ([{"question": "Why?", "choices": ["a", "b"]}], "line 1: 'answer' is missing"),
    ([{"question": "Why?", "answer": "so"}], "line 1: 'choices' or 'grader' is missing"),
    ([{"prompt": "Why?", "answer": "so"}], "line 1: 'choices' or 'grader' is missing"),
    ([{"prompt": ""}], "line 1: 'prompt' is empty"),
    ([{"messages": []}], "line 1: 'messages' is []; expected a list of objects"),
    ([{"messages": [{"role": "user"}]}], "'content' is missing"),
    ([{"messages": [ASSISTANT]}], "no message of the user to answer"),
    ([CHOICES, {"prompt": "Why?"}], "line 2: a row with a prompt alone, but the first row has"),
    ([graded(grader="exakt")], "unknown grader 'exakt'; did you mean 'exact'?"),
    ([graded(grader=["exact"])], "unknown grader"),
    ([graded(grader="letter")], "the grader 'letter' expects one of A to Z"),
    ([graded(grader="exact", answer="**")], "expects one line of words"),
    ([graded(grader="exact", answer="a\nb")], "expects one line of words"),
    ([CHOICES, GRADED], "line 2: a row with grader 'boxed', but the first row has 'choices'"),
    ([GRADED, graded(grader="exact")], "line 2: a row with grader 'exact', but the first"),
    ([CHOICES, choices(answer=0)], "line 2: line 1 has the same question with another"),
    ([GRADED, graded(answer="8")], "line 2: line 1 has the same question with another"),
]


@pytest.mark.parametrize(
    "row",
    [
        choices(answer="x" * 100_000),
        choices(choices="x" * 100_000),
        choices(choices=["x" * 100_000] * 2),
        choices(question={"x" * 100_000: 1}),
        graded(grader="x" * 100_000),
        graded(grader="exact", answer="xxxx\n" * 50_000),
        {"messages": ["x" * 100_000]},
        {"messages": "x" * 100_000},
        {"x" * 100_000: "ice"},
    ],
    ids=lambda row: ", ".join(f"{name:.20}" for name in row),
)
def test_of_a_long_value_a_message_shows_the_beginning(tmp_path, row):
    with pytest.raises(TaskError) as caught:
        read(str(write(tmp_path, row)))
    assert "xxx" in str(caught.value)
    assert "…" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("rows", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_row_that_cannot_be_used_is_named(tmp_path, rows, message):
    path = write(tmp_path, *rows)
    with pytest.raises(TaskError) as caught:
        get_task(str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}, line {len(rows)}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "doesn't exist"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"question": "W', "line 1: "),
        (b'"text"\n', "line 1: expected `object`"),
        (b'{"question": NaN}', "line 1: NaN isn't a number"),
        (b'\n [{"question": "Why?"}]\n', "is one JSON list and not JSON lines; rename it"),
        (b'[\n  {"question": "Why?"}\n]\n', "is one JSON list"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TaskError, match=message) as caught:
        get_task(str(path))
    assert str(path) in str(caught.value)
