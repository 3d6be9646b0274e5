"""Questions asked with worked examples before them, or with room for a chain of thought.

Loads no torch.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drllm.errors import ConfigError
from drllm.tasks.base import Example, Prompt, Task
from drllm.tasks.forms import WORKED
from drllm.tasks.rewards import reward_of


class WorkedTask(Task):
    """A task's questions after `shots`, questions with their answers, the same before each.

    They stand in one text, as base models are asked, where the model has a chat template in the
    user's turn. With `max_new_tokens` answers that are generated may have so many, and what is
    asked for in a box may be worked out first.
    """

    def __init__(
        self, task: Task, shots: Sequence[Example] = (), max_new_tokens: int | None = None
    ) -> None:
        self.task, self.name, self.description = task, task.name, task.description
        self.shown, self.max_new_tokens = shots, max_new_tokens
        self.solved = functools.cache(self._solved)  # the same before each question

    @property
    def rewards(self) -> tuple[str, ...]:
        """Those of the task."""
        return self.task.rewards

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return those of the task."""
        return self.task.examples(split, data_dir)

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return how the question is asked, then other ways; what is shown is asked alike."""
        if self.shown and (example.messages or not self.task.has_answers):
            raise ConfigError(
                f"--num-fewshot has no effect on {self.name}, which asks no questions"
            )
        found = []
        for way, prompt in enumerate(self._asked(example, reward)):
            before = (self.solved(shot, reward, way) for shot in self.shown)
            found.append(replace(prompt, text="".join((*before, prompt.text))))
        return tuple(found)

    def _asked(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        if self.max_new_tokens is None:
            return self.task.prompts(example, reward)
        form = WORKED if reward == "boxed" else self.task
        found = form.prompts(example, reward)
        if found[0].continuations or not self.task.has_answers:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens} has no effect on {self.name}, which "
                f"generates nothing; leave it out, or choose a --reward that grades text"
            )
        return tuple(replace(each, max_new_tokens=self.max_new_tokens) for each in found)

    def _solved(self, shot: Example, reward: str, way: int) -> str:
        asked = self._asked(shot, reward)
        prompt = asked[way % len(asked)]  # of options, some have fewer rotations
        if prompt.continuations:
            return f"{prompt.text}{prompt.continuations[prompt.gold or 0]}\n\n"
        said = reward_of(prompt).gold_text(prompt)
        if self.max_new_tokens and reward == "boxed" and shot.solution:
            said = f"{shot.solution}\n{said}"
        between = " " if prompt.text.endswith(":") else "\n"
        return f"{prompt.text}{between}{said}\n\n"
