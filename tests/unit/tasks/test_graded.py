"""A reward of the user's own: a function in a file, by its hash."""

import pytest
import torch

import drllm
from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.model.load import BaseModel
from drllm.model.prompts import encode, render
from drllm.search.questions import collect_questions
from drllm.tasks.examples import choose
from drllm.tasks.graded import GradedTask, pin_reward
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade, verdict
from drllm.work.listener import Listener

SOURCE = '''
def reward(example, text):
    """The share of the answer's letters that are there."""
    return len(set(text) & set(example.question)) / len(set(example.question))
'''


@pytest.fixture
def function(tmp_path):
    """A file with a function, as `--reward` names it."""
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path / 'mine.py'}:reward"


@pytest.fixture
def prompts_file(write_rows):
    """A file of prompts without answers."""
    texts = [f"say {chr(97 + n % 26) * (1 + n % 3)} {n}" for n in range(60)]
    return str(write_rows("mine", [{"prompt": text} for text in texts]))


def test_a_function_grades_a_finished_answer_by_the_example(function):
    task = GradedTask(get_task("builtin_facts"), function)
    example = task.examples("search")[0]
    [prompt] = task.prompts(example, task.check_reward(None))
    assert prompt.text == example.question
    assert verdict(prompt, example.question, finished=False) is None
    assert (grade(prompt, example.question), grade(prompt, "")) == (1.0, 0.0)
    assert prompt.reward.startswith(f"{function}@")


def test_a_changed_file_is_another_reward_and_its_old_one_is_refused(function, tmp_path):
    task = GradedTask(get_task("builtin_facts"), function)
    [prompt] = task.prompts(task.examples("search")[0], task.rewards[0])
    (tmp_path / "mine.py").write_text(SOURCE + "\n# changed\n")
    assert GradedTask(get_task("builtin_facts"), function).rewards != task.rewards
    drllm.tasks.graded.load_function.cache_clear()
    with pytest.raises(ConfigError, match="has changed since it was reward"):
        grade(prompt, "")


def returning(value, folder):
    """A prompt whose answers a function grades that returns some expression."""
    (folder / "odd.py").write_text(
        f"import numpy\ndef reward(example, text):\n    return {value}\n"
    )
    task = GradedTask(get_task("builtin_facts"), f"{folder / 'odd.py'}:reward")
    return task.prompts(task.examples("search")[0], task.rewards[0])[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("'much'", "returned 'much'; expected a number from 0 to 1"),
        ("1.5", "returned 1.5; expected"),
        ("None", "returned None; expected"),
        ("__import__('sys').exit(0)", "failed on .What .*it ends the program"),
        ("1 / 0", "failed on .What .*ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_number_from_0_to_1_is_refused(value, message, tmp_path):
    with pytest.raises(TaskError, match=message):
        grade(returning(value, tmp_path), "")


@pytest.mark.parametrize("value", ["True", "numpy.float32(1)", "numpy.bool_(True)"])
def test_whatever_is_a_number_counts(value, tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert grade(returning(value, folder), "") == 1.0


def test_an_evaluation_by_a_reward_that_is_no_function_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    for reward in ("mine.py", "exact"):
        with pytest.raises(ConfigError, match="names no function in a file; give FILE"):
            pin_reward(reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "nowhere.py:reward"}, "file 'nowhere.py' doesn't exist; give FILE.py:FUNCTION"),
        ({"reward": "mine.py:other"}, "has no function 'other'; give it one"),
        ({"reward": "broken.py:reward"}, "broken.py can't be run: SyntaxError: "),
        ({"reward": "exits.py:reward"}, "exits.py can't be run: it ends the program"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings, message, function, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def reward(:")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=message):
        collect_questions("builtin_facts", SearchConfig(limit=3, **settings))


def test_prompts_without_answers_are_searched_trained_on_and_evaluated_by_a_function(
    function, prompts_file, tiny_llama, tiny_tokenizer, tmp_path
):
    model = tiny_llama(max_position_embeddings=1024)
    base = BaseModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision=None)
    settings = {"reward": function, "max_new_tokens": 6}
    records = drllm.search_paths(base, prompts_file, limit=6, num_simulations=4, **settings)
    assert {record.reward for record in records} == {pin_reward(function)}
    (tmp_path / "always.py").write_text("def reward(example, text):\n    return 1\n")
    always = {**settings, "reward": f"{tmp_path / 'always.py'}:reward"}
    right = drllm.search_paths(base, prompts_file, limit=6, num_simulations=4, **always)
    assert len(drllm.supervise(right, target="shortest")) == 6  # with no re-test to survive
    targets = drllm.supervise(records, target="least_kl")
    routers = drllm.train(base, targets, num_epochs=1, num_windows=2, router_width=4)
    assert routers.config.training["rewards"] == [pin_reward(function)]
    few = {"num_texts": 4, "baselines": "none", "limit": 4}
    noted, listener = [], Listener()
    listener.note = noted.append
    [result] = drllm.evaluate(
        base, prompts_file, routers=routers, listener=listener, **settings, **few
    )
    assert result.config["reward"] == pin_reward(function)
    assert not any("trained on prompts for" in text for text in noted)
    with torch.no_grad():  # of prompts alone the prompt is the text
        losses = []
        for example in choose(get_task(prompts_file).examples("test"), 4, 0):
            text = render(tiny_tokenizer, example.question, chat=True)  # as in the search
            ids = torch.tensor([encode(tiny_tokenizer, text)])
            losses.append(float(model(ids, labels=ids).loss))
    assert result.base.text_loss == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert result.num_questions == 4
    assert 0 < result.base.accuracy < 1  # shares, as the function gives them
