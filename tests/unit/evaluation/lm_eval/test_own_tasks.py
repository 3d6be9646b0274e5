"""Our tasks on the harness' command line, and what tells their folders apart."""

from typing import Any

import pytest

from drllm.errors import ConfigError, TaskError
from drllm.evaluation.lm_eval.folders import make_own_task_folder


def make_folder(*names: str, **changes: Any):
    options: dict[str, Any] = {
        "split": "test",
        "limit": 4,
        "data_dir": None,
        "num_fewshot": None,
        "num_processes": 1,
        **changes,
    }
    return make_own_task_folder(names, **options)


def test_names_keep_their_order():
    tasks, _ = make_folder("builtin_facts", "builtin_arithmetic")
    assert [task.harness_name for task in tasks] == ["builtin_facts", "builtin_arithmetic"]


def test_a_file_goes_by_the_name_that_its_folder_gives_it(tmp_path):
    rows = [f'{{"question": "{n}?", "choices": ["a", "b"], "answer": 0}}\n' for n in range(30)]
    (tmp_path / "my own.jsonl").write_text("".join(rows))
    [task], _ = make_folder(str(tmp_path / "my own.jsonl"))
    assert task.harness_name == "my_own"


def test_a_limit_is_a_number_of_questions():
    [task], _ = make_folder("builtin_facts", limit=3.0)
    assert task.leaves == {"builtin_facts": 3}
    for limit in (0.5, 0, 2.5):
        with pytest.raises(ConfigError, match="give a whole number from 1"):
            make_folder("builtin_facts", limit=limit)
    with pytest.raises(TaskError, match="has 2 questions for 3 processes"):
        make_folder("builtin_facts", limit=2, num_processes=3)


@pytest.mark.parametrize("names", [("hellswag",), ("builtin_facts", "boolq"), ("tasks.yaml",)])
def test_names_that_are_not_ours_are_refused(names):
    with pytest.raises(ConfigError, match=f"'{names[-1]}'.*in a command of their own"):
        make_folder(*names)


def key_of(*names: str, **changes: Any) -> str:
    return make_folder(*names, **changes)[1].key


def test_the_key_of_a_folder_tells_its_questions_apart_and_nothing_else():
    first = key_of("builtin_facts")
    assert key_of("builtin_facts") == first
    others = [
        key_of("builtin_facts", limit=5),
        key_of("builtin_facts", split="select"),
        key_of("builtin_facts", num_fewshot=1),
    ]
    assert len({first, *others}) == 4
