"""Rewards from a user's file: `FILE.py:FUNCTION` grades generated answers.

The function is `def reward(example, text) -> float`. It returns the grade of a generated text, from
0 to 1; 1 is right. In records the reward has the name `FILE.py:FUNCTION@HASH`. The hash is the
file's, so the name says which version of the function graded. This module doesn't import torch.
"""

import functools
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drllm.config.constants import PYTHON_FUNCTION
from drllm.errors import ConfigError, TaskError
from drllm.records.codec import sha256
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, Prompt, QuestionRow
from drllm.tasks.prompt_formats import add_context

_HASH = re.compile(r"@[0-9a-f]{16}$")
MAX_NEW_TOKENS = 256  # default of the maximum tokens of an answer


class GradedTask(Task):
    """A task whose answers are graded by a function; the prompt is the question's text.

    The questions need no answers. Raises ConfigError if the file or the function doesn't exist.

    Args:
        task: The task that is wrapped.
        reward: `FILE.py:FUNCTION`, with or without `@HASH`.
        max_new_tokens: Maximum tokens of an answer; None for `MAX_NEW_TOKENS`.
    """

    def __init__(self, task: Task, reward: str, max_new_tokens: int | None = None) -> None:
        self.task = task
        self.reward = pin_reward(reward)
        self.name = task.name
        self.description = f"{task.description}, graded by {reward}"
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS

    @property
    def rewards(self) -> tuple[str, ...]:
        """The function's reward, the only reward that fits."""
        return (self.reward,)

    def check_reward(self, reward: str | None) -> str:
        """Return the function's reward, whatever `reward` is."""
        return self.reward

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of the wrapped task."""
        return self.task.examples(split, data_dir)

    def shots(self, split: str, data_dir: Path | str | None = None) -> list[QuestionRow]:
        """Return the worked examples of the wrapped task."""
        return self.task.shots(split, data_dir)

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the only prompt of a question; there is no prompt for the re-test."""
        prompt = Prompt(
            text=add_context(example, example.question),
            reward=reward,
            answer=example.answer,
            other_answers=example.other_answers,
            chat=True,
            max_new_tokens=self.max_new_tokens,
            question=example.question,
            messages=example.messages,
        )
        return (prompt,)


def pin_reward(reward: str) -> str:
    """Return the reward's name with the file's hash; a name that has the hash stays as it is.

    Raises ConfigError if the file or the function doesn't exist, or if the hash isn't the file's.
    """
    if _HASH.search(reward):
        load_function(reward)
        return reward
    if PYTHON_FUNCTION not in reward:
        raise ConfigError(f"--reward {reward} names no function in a file; give FILE.py:FUNCTION")
    file = Path(reward.rpartition(":")[0])
    if not file.is_file():
        raise ConfigError(
            f"--reward {reward}: the file {str(file)!r} doesn't exist; give FILE.py:FUNCTION"
        )
    name = f"{reward}@{sha256(file)[:16]}"
    load_function(name)
    return name


@functools.cache
def load_function(name: str) -> Callable[[Example, str], Any]:
    """Load the function of a reward `FILE.py:FUNCTION@HASH`.

    Raises ConfigError if the file has another hash or lacks the function, or if running the file
    raises an error or ends the program.
    """
    reward, _, digest = name.rpartition("@")
    file, _, function_name = reward.rpartition(":")
    if not Path(file).is_file() or not sha256(Path(file)).startswith(digest):
        raise ConfigError(f"{file} has changed since it was reward {name}; put the old file back")
    try:
        function = runpy.run_path(file).get(function_name)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise ConfigError(f"--reward {reward}: {file} can't be run: {_describe(error)}") from error
    if not callable(function):
        raise ConfigError(
            f"--reward {reward}: {file} has no function {function_name!r}; give it one, "
            f"def {function_name}(example, text) -> float"
        )
    return function  # type: ignore[no-any-return]


def grade_by_function(prompt: Prompt, text: str) -> float:
    """Return the grade that the function gives an answer.

    Raises TaskError if the grade isn't a number from 0 to 1, or if the function raises an error or
    ends the program.
    """
    example = Example(
        question=prompt.question, answer=prompt.answer, other_answers=prompt.other_answers
    )
    function = load_function(prompt.reward)
    try:
        value = function(example, text)
        # float() would read a text too.
        is_text_or_none = isinstance(value, str) or value is None
        grade = math.nan if is_text_or_none else float(value)
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        raise TaskError(
            f"reward {prompt.reward} failed on {prompt.question[:60]!r}, answered {text[:60]!r}: "
            f"{_describe(error)}"
        ) from error
    if not 0 <= grade <= 1:
        raise TaskError(f"reward {prompt.reward} returned {value!r}; expected a number from 0 to 1")
    return grade


def _describe(error: BaseException) -> str:
    """Describe an error in one line."""
    message = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"it ends the program (SystemExit: {message}); return a number instead"
    return f"{type(error).__name__}: {message}"
