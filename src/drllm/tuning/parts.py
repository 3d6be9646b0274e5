"""Which questions of a task fit, choose and test a static path. Loads no torch.

What is chosen or fitted is never reported on the same questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.config import SPLITS, TuneConfig
from drllm.config.fields import required_tasks
from drllm.errors import ConfigError, TaskError
from drllm.records.splits import part_by_hash, question_key
from drllm.records.static_paths import FIT, PARTS, SELECT, TEST
from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import OPTIONS_REWARD, Example, Prompt, choose
from drllm.tasks.registry import get_tasks
from drllm.tasks.rewards import check_installed

BOUNDS = {FIT: 0.2, SELECT: 0.6, TEST: 1.0}
"""Where the share of each part ends, of a set that doesn't have all four splits."""


GOLD, LOSS, KL = "gold_logprob", "next_token_loss", "kl"
"""Objectives: the gold option's log-probability among the options; that of a token of the right
answer; minus the KL from the full path over the prompt's tokens. All in nats, the larger the
better."""


@dataclass(frozen=True, slots=True)
class TaskParts:
    """The questions of one task by part; `is_divided` says that its own splits weren't used.

    `spare` are questions of the splits `fit` and `search` that no part has: routers and baselines
    use these splits.
    """

    task: Task
    examples: dict[str, list[Example]]
    is_divided: bool
    spare: Sequence[Example] = ()

    def digested(self) -> tuple[str, dict[str, list[Example]]]:
        """Return what the digest of a tuning's questions is made of.

        As commit 3820ce17 has it, which certified on the spare questions, so that its files are
        known again.
        """
        if self.is_divided:
            return self.task.name, self.examples
        fit, select, test = (self.examples[part] for part in PARTS)
        examples = {FIT: fit, SELECT: select, "certify": list(self.spare), TEST: test}
        return self.task.name, examples

    def is_generated(self, objective: str) -> bool:
        """Whether answers are generated and graded; options and worked solutions are read."""
        solved = any(example.solution for example in self.examples[FIT])
        is_read = solved or reward_for(self.task, objective) == OPTIONS_REWARD
        return objective == LOSS and not is_read


def parts_of_tasks(
    config: TuneConfig, tasks: Task | str | Sequence[Task | str] | None = None
) -> list[TaskParts]:
    """Return the tasks with their questions by part, if they can be tuned on."""
    config.check_effects()
    given = required_tasks(config.tasks) if tasks is None else tasks
    listed = [given] if isinstance(given, (str, Task)) else list(given)
    named = [get_tasks(each) if isinstance(each, str) else [each] for each in listed]
    found = [task for each in named for task in each]
    for task in found:
        objective = objective_of(task, config)
        if task.has_answers:
            check_installed(reward_for(task, objective))
    names = [task.name for task in found]
    for name in config.weights or {}:
        if name not in names:
            raise ConfigError(f"weights: {name!r} isn't tuned on; there are {', '.join(names)}")
    if config.weights and len(names) == 1:
        raise ConfigError(f"weights have no effect on one task, {names[0]}; leave them out")
    return [parts_of(task, config.data_dir, config.num_fit, config.seed) for task in found]


def objective_of(task: Task, config: TuneConfig) -> str:
    """Return what is kept high on a task: the one asked for, or the one that fits its answers."""
    if not task.has_answers:
        if config.objective not in (None, KL):
            raise ConfigError(
                f"--objective {config.objective} needs right answers, and {task.name} has prompts "
                f"alone; leave it out, or give {KL}"
            )
        return KL
    has_options = OPTIONS_REWARD in task.rewards
    if config.objective == GOLD and not has_options:
        raise ConfigError(
            f"--objective {GOLD} needs options, and the answers of {task.name} are generated; "
            f"leave it out, or give {LOSS}"
        )
    return config.objective or (GOLD if has_options else LOSS)


def reward_for(task: Task, objective: str) -> str:
    """Return the reward that a task's questions are asked for."""
    return task.check_reward(OPTIONS_REWARD if objective == GOLD else None)


def prompt_of(task: Task, example: Example, objective: str) -> Prompt:
    """Return how a question is asked; a worked solution is read after the question as it stands."""
    if objective == LOSS and example.solution:
        return Prompt(
            text=f"Question: {example.question}\nAnswer:",
            reward=OPTIONS_REWARD,
            answer=example.answer,
            continuations=(f" {example.solution}",),
            gold=0,
        )
    return task.prompt(example, reward_for(task, objective))


def parts_of(task: Task, data_dir: str | None, num_fit: int, seed: int) -> TaskParts:
    """Divide the questions of a task.

    Of `search` at most `num_fit` are fitted on, drawn with the seed; `select` chooses and `test`
    tests. A task that lacks one of the splits has all of its questions divided anew by their texts:
    20 % to fit, 40 % to choose and 40 % to test.
    """
    folder = None if data_dir is None else Path(data_dir)
    problems: list[str] = []
    splits = {split: _examples(task, split, folder, problems) for split in SPLITS}
    found = {split: examples for split, examples in splits.items() if examples}
    if len(found) == len(SPLITS):
        fit = choose(found["search"], num_fit, seed)
        fitted = {question_key(example.question) for example in fit}
        left = [each for each in found["search"] if question_key(each.question) not in fitted]
        parts = {FIT: fit, SELECT: found["select"], TEST: found["test"]}
        return TaskParts(task, parts, is_divided=False, spare=[*found["fit"], *left])
    if not found:
        raise TaskError(problems[0] if problems else f"task {task.name!r} has no questions")
    parts = {name: [] for name in PARTS}
    for example in (each for examples in found.values() for each in examples):
        parts[part_of(example.question)].append(example)
    parts[FIT] = choose(parts[FIT], num_fit, seed)
    for name, examples in parts.items():
        if not examples:
            raise TaskError(
                f"task {task.name!r} has no questions for part {name!r}; give more questions"
            )
    return TaskParts(task, parts, is_divided=True)


def _examples(task: Task, split: str, folder: Path | None, problems: list[str]) -> list[Example]:
    try:
        return task.examples(split, folder)
    except NoSplitError as error:
        problems.append(str(error))
        return []


def part_of(question: str) -> str:
    """Return the part of a question of a set that is divided by its texts.

    Example:
        >>> part_of("What is ice?") == part_of(" what is  ICE?")
        True
    """
    # Not the hash of `split_of`: in a set with some of the splits it would fill some parts only.
    return part_by_hash(f"tune:{question_key(question)}", BOUNDS)


def rungs(num: int, beam: int) -> Sequence[tuple[int, int]]:
    """Return how many questions each rung of successive halving asks, and how many paths it keeps.

    An eighth of the questions for all candidates, a third for those that are left, then all.

    Example:
        >>> rungs(300, 3)
        [(38, 12), (100, 6), (300, 3)]
        >>> rungs(24, 3)
        [(24, 3)]
    """
    sizes = [max(min(num, 24), -(-num // 8)), max(min(num, 24), -(-num // 3)), num]
    # Rungs of as many questions are one, which keeps what the last of them keeps.
    return list(dict(zip(sizes, [4 * beam, 2 * beam, beam], strict=True)).items())
