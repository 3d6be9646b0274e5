"""What the path of a file is known to lose: sentences on it, and the check before an export."""

from collections.abc import Iterator, Sequence

from drllm.errors import PathError
from drllm.records.healed import HealedPath
from drllm.records.results import Evaluation
from drllm.records.static_paths import TEST, NamedPath, PathFile, PathScore, StaticPaths
from drllm.statistics.losses import (
    LossIncrease,
    describe_increase,
    describe_loss,
    list_excessive_losses,
)
from drllm.statistics.words import signed, uncapitalize

REFITTED = "with its refit"
LOSS_WORDS = {
    "gold_logprob": ("its loss on the right options", "nats a question"),
    "next_token_loss": ("its loss", "nats a token"),
    "kl": ("its KL from the full path", "nats a token"),
}
"""Objective → what its loss is called, and the unit. An objective is the negative of its loss."""
TOKEN_LOSSES = ("next_token_loss", "kl")
"""The objectives whose losses `--max-loss-increase` bounds. The KL from the full path is the
increase of the next-token loss on tokens that the full path would write."""


def describe_losses(record: StaticPaths, path: NamedPath) -> Iterator[str]:
    """Yield a sentence for each task on what a path loses on `test`.

    If the path was repaired, the sentence is about the path with its refit.
    """
    name = f"{path.name} {REFITTED}" if path.repaired else path.name
    for task in record.tasks:
        yield from _describe_score(record, path.on(task, TEST), name)


def describe_plain_losses(record: StaticPaths, path: NamedPath) -> Iterator[str]:
    """Yield a sentence for each task on what a path loses on `test` without a repair."""
    name = f"{path.name} without its refit" if path.repaired else path.name
    for task in record.tasks:
        yield from _describe_score(record, path.plain_on(task, TEST), name)


def _describe_score(record: StaticPaths, score: PathScore | None, name: str) -> Iterator[str]:
    """Yield the sentence on the scores of a path on `test`; none if there is nothing to compare."""
    if score is None:
        return
    if score.against_full is not None:
        sentence = describe_loss(name, score.against_full)
    elif score.change is not None:
        sentence = _describe_change(record, score, name)
    else:
        return
    if len(record.tasks) > 1:
        sentence = f"on {score.task}, {sentence}"
    yield sentence


def _describe_change(record: StaticPaths, score: PathScore, name: str) -> str:
    """Say how the loss changes on questions whose answers aren't graded."""
    loss, unit = LOSS_WORDS[record.objective[score.task]]
    sentence = describe_increase(loss, unit, _find_increase(score))
    return f"{name}: {sentence}; its answers aren't graded"


def _find_increase(score: PathScore) -> LossIncrease:
    """Return how much the loss rises: the objective's change with the other sign."""
    assert score.change is not None
    mean, low, high = score.change
    return LossIncrease(-mean, -high, -low, score.num_questions)


def describe_file_losses(path: PathFile) -> list[str]:
    """Return sentences on what a path loses that is run or exported as the file gives it.

    A path of a `paths.json` runs without its refit; if it was repaired, a second sentence says what
    it loses with it. The list is empty for the full path, and for a file that was written by hand.
    """
    record = path.record
    if isinstance(record, HealedPath):
        return describe_healed_losses(record)
    if record is None or path.named is None:
        return []
    sentences = list(describe_plain_losses(record, path.named))
    if path.named.repaired:
        sentences += describe_losses(record, path.named)
    return sentences


def describe_healed_losses(record: HealedPath) -> list[str]:
    """Return sentences on the losses of a healed path, and on what `heal` doesn't measure."""
    sentences = []
    if record.held_out:
        sentences.append(describe_held_out_losses(record))
    sentences.append("healing is for text; drllm evaluate measures what it does to accuracy")
    return sentences


def describe_evaluated_losses(record: HealedPath, evaluations: Sequence[Evaluation]) -> list[str]:
    """Return what `drllm evaluate` found of a healed path, which is known by its adapter."""
    sentences = []
    for evaluation in evaluations:
        for system in evaluation.systems:
            steps = evaluation.paths.get(system.name, ())
            adapters = {step.adapter for step in steps}
            if adapters != {record.adapter} or system.against_base is None:
                continue
            differences = system.against_base
            for verdict in (differences.accuracy, differences.text_loss):
                if verdict is not None:
                    sentence = verdict.sentence(record.name, "the full path")
                    sentences.append(f"on {evaluation.task}: {uncapitalize(sentence)}")
    return sentences


def describe_held_out_losses(record: HealedPath) -> str:
    """Return a sentence on what a healed path loses on held-out texts of each source."""
    parts = []
    for source, losses in record.held_out.items():
        increase = signed(losses.healed - losses.full, 3)
        before = signed(losses.path - losses.full, 3)
        parts.append(f"{source} {increase} ({before} before the repair)")
    return (
        f"next-token loss of {record.name} minus the full path's, in nats a token, on texts held "
        f"out of the repair: {', '.join(parts)}; less is better, and text of other sources may "
        f"lose more"
    )


def check_losses(path: PathFile, max_drop: float, max_loss_increase: float) -> None:
    """Refuse to export a path that is shown to lose more than the bounds.

    What counts are the scores on `test` of the path without a repair, since it is exported so. A
    healed path and a path without scores aren't refused, since nothing is shown of them.

    Args:
        path: The path.
        max_drop: The largest allowed loss of accuracy, in points.
        max_loss_increase: The largest allowed increase of the next-token loss, in nats a token.

    Raises:
        PathError: A loss is shown to be larger, with 95 % confidence.
    """
    if path.named is None:
        return
    assert isinstance(path.record, StaticPaths)
    for score in path.named.measured:
        if score.part != TEST:
            continue
        losses = _list_excessive(path.record, score, max_drop, max_loss_increase)
        if losses:
            raise PathError(
                f"{path.named.name} of {path.file} is shown to lose {' and '.join(losses)} on "
                f"{score.task}; heal it first, choose another path, allow more by --max-drop or "
                f"--max-loss-increase, or give --force"
            )


def _list_excessive(
    record: StaticPaths, score: PathScore, max_drop: float, max_loss_increase: float
) -> list[str]:
    """Return which losses of a path are shown to be larger than the bounds of `check_losses`."""
    if score.against_full is not None:
        return list(list_excessive_losses(score.against_full, max_drop, max_loss_increase))
    objective = record.objective.get(score.task)
    if score.change is None or objective not in TOKEN_LOSSES:
        return []
    increase = _find_increase(score)
    if not increase.exceeds(max_loss_increase):
        return []
    mean, low, high, _ = increase
    name = "of KL from the full path" if objective == "kl" else "of loss"
    return [
        f"{mean:.3g} nats a token {name} (95 %: {low:.3g} to {high:.3g}; {max_loss_increase:g} are "
        f"allowed)"
    ]
