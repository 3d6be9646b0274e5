"""Answers that a Python function of the user's own grades: the reward `FILE.py:FUNCTION`.

It is `def reward(example, text) -> float`: what the text that was generated for an example is
worth, from 0 to 1, which is right. The hash of the file becomes a part of the reward's name, so
that records say which function it was. Loads no torch.
"""

import functools
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, TaskError
from drllm.records.codec import sha256
from drllm.tasks.base import Example, Prompt, QuestionRow, Task
from drllm.tasks.forms import in_context

SUFFIX = ".py:"
_HASH = re.compile(r"@[0-9a-f]{16}$")
MAX_NEW_TOKENS = 256  # of an answer, unless another number is given


class GradedTask(Task):
    """The questions of a task, prompts without answers too, asked as they stand and then graded.

    A `FILE.py:FUNCTION` that isn't there is a ConfigError.
    """

    def __init__(self, task: Task, reward: str, max_new_tokens: int | None = None) -> None:
        self.task, self.reward = task, pinned(reward)
        self.name, self.description = task.name, f"{task.description}, graded by {reward}"
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS

    @property
    def rewards(self) -> tuple[str, ...]:
        """The one."""
        return (self.reward,)

    def check_reward(self, reward: str | None) -> str:
        """Return the one, whatever it is called without its hash."""
        return self.reward

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return those of the task."""
        return self.task.examples(split, data_dir)

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return those of the task."""
        return self.task.shots(split, data_dir)

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return how the question is asked; there is one way."""
        prompt = Prompt(
            text=in_context(example, example.question),
            reward=reward,
            answer=example.answer,
            other_answers=example.other_answers,
            chat=True,
            max_new_tokens=self.max_new_tokens,
            question=example.question,
            messages=example.messages,
        )
        return (prompt,)


def pinned(reward: str) -> str:
    """Return `FILE.py:FUNCTION` with the file's hash behind an `@`; a ConfigError for none."""
    if _HASH.search(reward):
        function_of(reward)
        return reward
    file = Path(reward.rpartition(":")[0])
    if not file.is_file():
        raise ConfigError(
            f"--reward {reward}: no file {str(file)!r} is there; give FILE.py:FUNCTION"
        )
    name = f"{reward}@{sha256(file)[:16]}"
    function_of(name)
    return name


@functools.cache
def function_of(name: str) -> Callable[[Example, str], Any]:
    """Return the function that a reward with the hash of its file names, if the file is that."""
    reward, _, digest = name.rpartition("@")
    file, _, function = reward.rpartition(":")
    if not Path(file).is_file() or not sha256(Path(file)).startswith(digest):
        raise ConfigError(f"{file} has changed since it was reward {name}; put the old file back")
    try:
        found = runpy.run_path(file).get(function)
    except Exception as error:  # whatever a file of the user's raises
        raise ConfigError(f"--reward {reward}: {file} can't be run: {_words(error)}") from error
    if not callable(found):
        raise ConfigError(
            f"--reward {reward}: {file} has no function {function!r}; give it one, "
            f"def {function}(example, text) -> float"
        )
    return found  # type: ignore[no-any-return]


def graded(prompt: Prompt, text: str) -> float:
    """Return what a function says of an answer; a TaskError unless it is a number from 0 to 1."""
    example = Example(
        question=prompt.question, answer=prompt.answer, other_answers=prompt.other_answers
    )
    function = function_of(prompt.reward)
    try:
        value = function(example, text)
        number = -1.0 if isinstance(value, str) or value is None else float(value)
    except Exception as error:  # whatever a function of the user's raises
        asked = f"{prompt.question[:60]!r}, answered {text[:60]!r}"
        raise TaskError(f"reward {prompt.reward} failed on {asked}: {_words(error)}") from error
    if not 0 <= number <= 1:
        raise TaskError(f"reward {prompt.reward} returned {value!r}; expected a number from 0 to 1")
    return number


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
