"""The objectives that a static path is tuned for, and the prompts that measure them.

Doesn't import torch.
"""

from drllm.config import TuneConfig
from drllm.errors import ConfigError
from drllm.tasks.base import Task
from drllm.tasks.examples import OPTIONS_REWARD, Example, Prompt

GOLD, LOSS, KL = "gold_logprob", "next_token_loss", "kl"
"""The objectives, in nats; larger is better. `GOLD` is the log-probability of the gold option among
the options. `LOSS` is the mean log-probability of the right answer's tokens. `KL` is the negative
KL from the full path over the prompt's tokens."""


def choose_objective(task: Task, config: TuneConfig) -> str:
    """Return a task's objective: the settings' objective, or else one that fits its answers."""
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
    """Return the reward that a task's questions are prompted for and graded by."""
    return task.check_reward(OPTIONS_REWARD if objective == GOLD else None)


def make_prompt(task: Task, example: Example, objective: str) -> Prompt:
    """Return a question's prompt. If a worked solution is scored, it follows the plain question."""
    if objective == LOSS and example.solution:
        return Prompt(
            text=f"Question: {example.question}\nAnswer:",
            reward=OPTIONS_REWARD,
            answer=example.answer,
            continuations=(f" {example.solution}",),
            gold=0,
        )
    return task.prompt(example, choose_reward(task, objective))
