"""The objectives that a static path is tuned for, and the prompts that measure them.

This module doesn't import torch.
"""

from drllm.config import TuneConfig
from drllm.errors import ConfigError
from drllm.tasks.base import Task
from drllm.tasks.examples import OPTIONS_REWARD, Example, Prompt

GOLD = "gold_logprob"
"""The objective of questions with options: the log-probability of the gold option among the
options."""
LOSS = "next_token_loss"
"""The objective of questions with generated answers: the mean log-probability of the right answer's
tokens. It is the negative next-token loss, since an objective is better if it is larger."""
KL = "kl"
"""The objective of prompts without answers: the negative KL from the full path, over the prompt's
tokens."""


def choose_objective(task: Task, config: TuneConfig) -> str:
    """Return the objective of the settings, or else an objective that fits the task's answers.

    Raises:
        ConfigError: The objective of the settings doesn't fit the task.
    """
    if not task.has_answers:
        if config.objective not in (None, KL):
            raise ConfigError(
                f"--objective {config.objective} needs right answers, but {task.name} has only "
                f"prompts; leave it out, or give {KL}"
            )
        return KL
    has_options = OPTIONS_REWARD in task.rewards
    if config.objective == GOLD and not has_options:
        raise ConfigError(
            f"--objective {GOLD} needs options, but the answers of {task.name} are generated; "
            f"leave it out, or give {LOSS}"
        )
    if config.objective is not None:
        return config.objective
    return GOLD if has_options else LOSS


def choose_reward(task: Task, objective: str) -> str:
    """Return the reward that decides how questions are prompted and graded."""
    if objective == GOLD:
        return task.check_reward(OPTIONS_REWARD)
    return task.check_reward(None)  # the task's default


def make_prompt(task: Task, example: Example, objective: str) -> Prompt:
    """Return the prompt on which a question's objective is measured.

    If the question has a worked solution, `LOSS` is measured on the solution after the plain
    question.
    """
    if objective == LOSS and example.solution:
        return Prompt(
            text=f"Question: {example.question}\nAnswer:",
            reward=OPTIONS_REWARD,
            answer=example.answer,
            continuations=(f" {example.solution}",),
            gold=0,
        )
    return task.prompt(example, choose_reward(task, objective))
