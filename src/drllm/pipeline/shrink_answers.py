"""Asks the full model some questions before the long work of a shrink.

If it answers none right, the answers or their grading are wrong, or the model can't do the task. In
each case no loss of accuracy could be shown to be small.
"""

from collections.abc import Sequence

from drllm.config import TuneConfig
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.models.scoring.score import score
from drllm.paths import StaticPath
from drllm.search.wrong_answers import MAX_EXAMPLES, MIN_QUESTIONS, FullAnswer
from drllm.tasks.examples import Example, Prompt, choose
from drllm.tasks.files import FileTask
from drllm.tasks.rewards import grade
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.objectives import GOLD, choose_objective, choose_reward
from drllm.tuning.path_scorer import make_items

NUM_QUESTIONS = 30  # of each task


def describe_wrong_answers(base: BaseModel, splits: TaskSplits, seed: int) -> str:
    """Say that the full model answers no question of a task right; return "" if it answers some.

    Only questions of files are asked, none of them held out. Those of published sets may be asked
    with worked examples when they are measured.

    Args:
        base: The model.
        splits: The task with its questions, which have right answers.
        seed: Seed of the choice of questions.
    """
    if not isinstance(splits.task, FileTask):
        return ""
    examples = choose(splits.all_to_fit, NUM_QUESTIONS, seed)
    if len(examples) < MIN_QUESTIONS:
        return ""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        answers = _ask(routed, splits, examples)
    finally:
        routed.detach()
    if any(answer.is_right for answer in answers):
        return ""
    shown = "; ".join(answer.describe() for answer in answers[:MAX_EXAMPLES])
    return (
        f"the full model answers none of {len(answers)} questions of {splits.task.name} right: "
        f"{shown}"
    )


def _ask(routed: RoutedModel, splits: TaskSplits, examples: Sequence[Example]) -> list[FullAnswer]:
    """Return what the full model answers to some questions."""
    objective = choose_objective(splits.task, TuneConfig())
    reward = choose_reward(splits.task, objective)
    prompts = [splits.task.prompt(example, reward) for example in examples]
    if objective == GOLD:
        return _choose_options(routed, examples, prompts)
    return _generate_answers(routed, examples, prompts)


def _choose_options(
    routed: RoutedModel, examples: Sequence[Example], prompts: Sequence[Prompt]
) -> list[FullAnswer]:
    """Return the option of each question that the full model prefers."""
    requests = [item.request for item in make_items(routed, prompts, GOLD)]
    full_path = StaticPath(range(routed.num_layers))
    [outcomes] = score(routed, requests, [full_path])
    answers = []
    for example, prompt, outcome in zip(examples, prompts, outcomes, strict=True):
        assert prompt.gold is not None
        best = outcome.logprobs.index(max(outcome.logprobs))
        right_option = prompt.continuations[prompt.gold].strip()
        option = prompt.continuations[best].strip()
        answers.append(FullAnswer(example.question, option, right_option, best == prompt.gold))
    return answers


def _generate_answers(
    routed: RoutedModel, examples: Sequence[Example], prompts: Sequence[Prompt]
) -> list[FullAnswer]:
    """Return the answer to each question that the full model generates."""
    with routed.fixed(StaticPath(range(routed.num_layers))):
        texts = generate_many(
            routed,
            [prompt.content for prompt in prompts],
            max_new_tokens=prompts[0].max_new_tokens,  # a file has one prompt format
            chat=prompts[0].chat,
            route_first=False,
        )
    answers = []
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        is_right = grade(prompt, text.text) > 0
        answers.append(FullAnswer(example.question, text.text, example.answer, is_right))
    return answers
