"""What the held-out questions and texts of a shrink can show at best, before any work is done."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from drllm.bisection import bisect
from drllm.config import ShrinkConfig
from drllm.statistics.paired import paired_interval
from drllm.statistics.power import questions_to_exclude, round_up
from drllm.statistics.verdicts import FEWEST_TEXTS
from drllm.tasks.examples import OPTIONS_REWARD
from drllm.tasks.files import FileTask
from drllm.tasks.parts import Questions

DIFFERING = 0.05
"""The share of questions whose answer turns from right to wrong or from wrong to right. It was 4 %
of 285 built-in facts for SmolLM2 without one and two of 30 layers, repaired, and is higher
with more layers out. So this is nearly the best case."""
FOUR_TIMES = "a file needs four times as many"  # since a quarter of it is held out
MANY = 10_000  # questions from which the needed number is estimated


@dataclass(frozen=True, slots=True)
class Power:
    """What some held-out questions or texts can exclude at best.

    Attributes:
        sentence: It in words.
        is_enough: Whether they could exclude the allowed loss if nothing were lost.
    """

    sentence: str
    is_enough: bool


def find_power(questions: Questions, config: ShrinkConfig) -> list[Power]:
    """Return what the held-out questions of each task and the texts of each source can show."""
    counts = questions.count("held out")
    files = [task.name for task in questions.tasks if isinstance(task, FileTask)]
    files += questions.texts["fit"]
    powers = []
    for task in questions.tasks:
        name = task.name
        if task.has_answers:
            is_file = name in files
            powers.append(_find_task_power(name, counts[name], config.max_drop, is_file=is_file))
    for task in questions.tasks:
        if OPTIONS_REWARD in task.rewards:
            del counts[task.name]  # the loss of its text isn't judged
    return powers + _find_text_powers(counts, files)


def _find_task_power(name: str, num_questions: int, max_drop: float, *, is_file: bool) -> Power:
    """Return what held-out questions can exclude if as many answers are won as lost."""
    limit = max_drop / 100
    smallest = smallest_excluded_drop(num_questions)
    sentence = (
        f"{num_questions} held-out questions of {name} can't exclude a loss of less than "
        f"{100 * smallest:.1f} points, even if nothing is lost"
    )
    if smallest < limit:
        return Power(sentence, is_enough=True)
    fewest, probable = count_needed(limit)
    sentence += (
        f"; for --max-drop {max_drop:g} at least about {round_up(fewest):,} are needed and about "
        f"{round_up(probable):,} are probably enough"
    )
    if is_file:
        sentence += f"; {FOUR_TIMES}"
    return Power(sentence, is_enough=False)


def count_needed(limit: float) -> tuple[int, int]:
    """Return how many questions can exclude a loss, and how many do with a probability of 80 %.

    Args:
        limit: The loss, as a share of the questions.
    """
    # From many questions, since the interval of a few is wider than its width at many implies.
    probable = questions_to_exclude(MANY, 0.0, smallest_excluded_drop(MANY), limit)
    assert probable is not None  # as the loss is 0
    most = 10 * probable + 100
    _, end = bisect(lambda number: smallest_excluded_drop(math.ceil(number)) < limit, 1, most)
    fewest = math.ceil(end)
    return fewest, max(probable, fewest)


def smallest_excluded_drop(num_questions: int) -> float:
    """Return the loss of accuracy that a number of questions excludes if none is measured.

    It is a share of the questions. One in twenty answers is taken to change, half of them for the
    better; see `DIFFERING`.

    Example:
        >>> round(100 * smallest_excluded_drop(250), 1)
        3.1
    """
    num_won = DIFFERING * num_questions / 2
    low, _ = paired_interval(num_won, num_won, num_questions)
    return -low


def _find_text_powers(counts: Mapping[str, int], files: Collection[str]) -> list[Power]:
    """Return a power for each source with too few texts; other sources need no sentence."""
    powers = []
    for name, num_texts in counts.items():
        if num_texts < FEWEST_TEXTS:
            sentence = (
                f"{num_texts} held-out texts of {name} exclude no increase of their loss; at least "
                f"{FEWEST_TEXTS} are needed"
            )
            if name in files:
                sentence += f"; {FOUR_TIMES}"
            powers.append(Power(sentence, is_enough=False))
    return powers
