"""Questions asked with worked examples before them, or with room for a chain of thought.

Loads no torch.
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
    """A task whose questions come after worked examples, the same before each question.

    Examples and question are one text, as base models are asked; where the model has a chat
    template, that text is the user's turn.

    Args:
        task: The task.
        shots: The examples to show, with their answers.
        max_new_tokens: Maximum tokens of a generated answer, which may then work out what is asked
            for in a box; None leaves the task's own limit.
    """

    def __init__(
        self, task: Task, shots: Sequence[Example] = (), max_new_tokens: int | None = None
    ) -> None:
        self.task = task
        self.name = task.name
        self.description = task.description
        self.worked_examples = shots
        self.max_new_tokens = max_new_tokens
        # The examples' texts are the same before each question.
        self._render_example = functools.cache(self._render_example_once)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Those of the task itself."""
        return self.task.rewards

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return those of the task itself."""
        return self.task.examples(split, data_dir)

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompt of a question and those of the re-test, each after the examples.

        In each prompt the examples are asked in the same way as the question.
        """
        if self.worked_examples and (example.messages or not self.task.has_answers):
            raise ConfigError(
                f"--num-fewshot has no effect on {self.name}, which asks no questions"
            )
        prompts: list[Prompt] = []
        for way, prompt in enumerate(self._prompts_alone(example, reward)):
            texts = [self._render_example(shot, reward, way) for shot in self.worked_examples]
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

    def _render_example_once(self, shot: Example, reward: str, way: int) -> str:
        """Return the text of a worked example, asked in one of the ways, with its answer."""
        prompts = self._prompts_alone(shot, reward)
        prompt = prompts[way % len(prompts)]  # an example with fewer options has fewer rotations
        if prompt.continuations:
            return f"{prompt.text}{prompt.continuations[prompt.gold or 0]}\n\n"
        answer = get_reward(prompt).gold_text(prompt)
        if self.max_new_tokens and reward == "boxed" and shot.solution:
            answer = f"{shot.solution}\n{answer}"
        space = " " if prompt.text.endswith(":") else "\n"
        return f"{prompt.text}{space}{answer}\n\n"
