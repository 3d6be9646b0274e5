"""Tasks with worked examples before each question, or with room for a chain of thought.

This module doesn't import torch.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drllm.errors import ConfigError
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, Prompt
from drllm.tasks.prompt_formats import WORKED
from drllm.tasks.rewards import get_reward


class WorkedTask(Task):
    """A task with the same worked examples before each question.

    The examples and the question are one text, as base models expect. If the model has a chat
    template, this text is the user's turn.

    Args:
        task: The task that is wrapped.
        shots: The questions to show as worked examples.
        max_new_tokens: Maximum tokens of a generated answer. If it is set, a prompt for a boxed
            answer asks for the steps too. None keeps the task's limit.
    """

    def __init__(
        self, task: Task, shots: Sequence[Example] = (), max_new_tokens: int | None = None
    ) -> None:
        self.task = task
        self.name = task.name
        self.description = task.description
        self.worked_examples = shots
        self.max_new_tokens = max_new_tokens
        # The texts of the examples are the same before each question.
        self._render_example = functools.cache(self._render_example_once)

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards of the wrapped task."""
        return self.task.rewards

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of the wrapped task."""
        return self.task.examples(split, data_dir)

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompt of a question and its prompts for the re-test, with worked examples.

        The examples use the same template as the question.
        """
        if self.worked_examples and (example.messages or not self.task.has_answers):
            raise ConfigError(
                f"--num-fewshot has no effect on {self.name}, which asks no questions"
            )
        prompts: list[Prompt] = []
        for index, prompt in enumerate(self._prompts_alone(example, reward)):
            texts = [self._render_example(shot, reward, index) for shot in self.worked_examples]
            prompts.append(replace(prompt, text="".join([*texts, prompt.text])))
        return tuple(prompts)

    def _prompts_alone(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompts of a question without worked examples."""
        if self.max_new_tokens is None:
            return self.task.prompts(example, reward)
        if reward == "boxed":
            prompts = WORKED.prompts(example, reward)
        else:
            prompts = self.task.prompts(example, reward)
        if prompts[0].continuations or not self.task.has_answers:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens} has no effect on {self.name}, which "
                f"generates nothing; leave it out, or choose a --reward that grades text"
            )
        return tuple(replace(prompt, max_new_tokens=self.max_new_tokens) for prompt in prompts)

    def _render_example_once(self, shot: Example, reward: str, index: int) -> str:
        """Render a worked example with its answer, for the prompt with this index."""
        prompts = self._prompts_alone(shot, reward)
        prompt = prompts[index % len(prompts)]  # an example with fewer options has fewer prompts
        if prompt.continuations:
            return f"{prompt.text}{prompt.continuations[prompt.gold or 0]}\n\n"
        answer = get_reward(prompt).gold_text(prompt)
        if self.max_new_tokens and reward == "boxed" and shot.solution:
            answer = f"{shot.solution}\n{answer}"
        separator = " " if prompt.text.endswith(":") else "\n"
        return f"{prompt.text}{separator}{answer}\n\n"
