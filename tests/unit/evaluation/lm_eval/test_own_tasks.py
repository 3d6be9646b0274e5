"""Our names among the harness' tasks: told apart, or refused; and where their folder stands."""

import functools
from typing import Any

import pytest

from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.folders import own_tasks

TASK = "task: {name}\ndataset_path: json\noutput_type: multiple_choice\n"


def chosen(*names: str, **changes: Any):
    options: dict[str, Any] = {
        "split": "test",
        "limit": 4,
        "data_dir": None,
        "num_fewshot": None,
        "max_length": None,
        "include_path": None,
        "num_processes": 1,
        **changes,
    }
    return own_tasks(names, **options)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder of tasks, which stands for all that the harness knows."""
    import lm_eval.tasks

    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    (tmp_path / "words.yaml").write_text(TASK.format(name="words") + "tag: all_words\n")
    group = "group: both\ntask: [words, {group: inner, task: [builtin_facts]}]\n"
    (tmp_path / "both.yaml").write_text(group)
    return str(tmp_path)


def test_names_keep_their_order_and_groups_become_their_tasks(theirs):
    found = chosen("all_words", "builtin_facts", "words", "builtin_arithmetic", include_path=theirs)
    assert found.names == ["all_words", "builtin_facts", "words", "builtin_arithmetic"]
    assert [task.name for task in found.tasks] == ["builtin_facts", "builtin_arithmetic"]


def test_a_file_goes_by_the_name_that_its_folder_gives_it(tmp_path):
    rows = [f'{{"question": "{n}?", "choices": ["a", "b"], "answer": 0}}\n' for n in range(30)]
    (tmp_path / "my own.jsonl").write_text("".join(rows))
    assert chosen(str(tmp_path / "my own.jsonl")).names == ["my_own"]


def test_a_limit_is_a_number_of_questions():
    assert chosen("builtin_facts", limit=3.0).tasks[0].leaves == {"builtin_facts": 3}
    for limit in (0.5, 0, 2.5):
        with pytest.raises(ConfigError, match="give a whole number from 1"):
            chosen("builtin_facts", limit=limit)
    with pytest.raises(TaskError, match="has 2 questions for 3 processes"):
        chosen("builtin_facts", limit=2, num_processes=3)


@pytest.mark.parametrize(
    ("name", "is_theirs_too", "message"),
    [
        ("both", False, "'both' of the harness holds 'builtin_facts'"),
        ("builtin_f*", True, "holds 'builtin_facts'"),
        ("builtin_arithmetic", True, r"stands in --include_path .* too; rename"),
        ("tasks.yaml", False, "give its folder as --include_path"),
        (".", False, "give its folder as --include_path"),
        ("wrods", False, "unknown task 'wrods'; did you mean 'words'"),
    ],
)
def test_names_beside_ours_that_are_unknown_or_could_mean_two_tasks_are_refused(
    name, is_theirs_too, message, theirs, tmp_path
):
    if is_theirs_too:
        (tmp_path / "more.yaml").write_text(TASK.format(name="builtin_facts"))
    with pytest.raises(TaskError, match=message):
        chosen(name, "builtin_facts", include_path=theirs)
    assert chosen("both", "builtin_arithmetic", include_path=theirs).names[0] == "both"


def test_the_key_of_a_folder_tells_its_questions_apart_and_nothing_else():
    first = chosen("builtin_facts").files.key
    assert chosen("builtin_facts").files.key == first
    others = [
        chosen("builtin_facts", limit=5).files.key,
        chosen("builtin_facts", split="select").files.key,
        chosen("builtin_facts", num_fewshot=1).files.key,
    ]
    assert len({first, *others}) == 4
