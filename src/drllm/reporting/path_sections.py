"""The results of `drllm tune` and `drllm heal`, written for reports and for the terminal."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

from drllm.records.healed import HealedPath
from drllm.records.path_losses import describe_healed_losses, describe_losses
from drllm.records.static_paths import FIT, SELECT, TEST, NamedPath, PathScore, StaticPaths
from drllm.reporting import figures
from drllm.reporting.document import Block, Figure, Section
from drllm.reporting.markdown import Markdown, write_list, write_paragraph, write_table
from drllm.reporting.numbers import (
    NONE,
    write_count,
    write_difference,
    write_excluded,
    write_executions,
    write_number,
    write_percent,
    write_signed,
)
from drllm.statistics.headlines import Candidate, advise
from drllm.statistics.words import capitalize, uncapitalize
from drllm.work.listener import format_duration

COLUMNS = (
    "path|layers|accuracy on test|minus full's (95 %)|loss excluded above|next-token loss on test|"
    "objective on test|on select|on fit"
)
LOSS_COLUMNS = "source|texts|full path|path alone"
LOSS_CAPTION = (
    "Next-token loss in nats a token, on texts held out of the repair; on texts of other sources "
    "less is recovered."
)


def path_rows(record: StaticPaths, task: str) -> Iterator[list[str]]:
    """Yield a row for each path: its results on `test`, and its objective on each part.

    A path that was repaired has two rows: with its refit, and plain.
    """
    for path in record.paths:
        if path.repaired:
            yield _path_row(f"{path.name}, refit", path, partial(path.on, task))
            yield _path_row(f"{path.name}, plain", path, partial(path.plain_on, task))
        else:
            yield _path_row(path.name, path, partial(path.on, task))


def _path_row(
    name: str, path: NamedPath, find_score: Callable[[str], PathScore | None]
) -> list[str]:
    """Return the row of a path; `find_score` returns its scores on a part."""
    executions = write_executions(path.executions)
    objectives = [_write_objective(find_score(part)) for part in (TEST, SELECT, FIT)]
    return [name, executions, *_test_cells(find_score(TEST)), *objectives]


def _test_cells(tested: PathScore | None) -> list[str]:
    """Return the cells on `test`: accuracy, difference, excluded loss and next-token loss."""
    if tested is None:
        return [NONE] * 4
    verdict = tested.against_full.accuracy if tested.against_full else None
    return [
        write_percent(tested.accuracy),
        write_difference(verdict),
        write_excluded(verdict),
        write_number(tested.text_loss, 3),
    ]


def advice(record: StaticPaths) -> Iterator[str]:
    """Yield a sentence of advice on each path that isn't dominated, from its results on `test`."""
    for task in record.tasks:
        for path in record.paths:
            tested = path.on(task, TEST)
            if path.dominated or tested is None or tested.against_full is None:
                continue
            name = f"path {path.name}"
            if path.repaired:
                name = f"{name} with its refit"
            candidate = Candidate(
                name=name,
                executions=path.executions,
                num_layers=record.num_layers,
                against_base=tested.against_full,
            )
            sentence = advise(candidate)
            if len(record.tasks) > 1:
                sentence = f"On {task}: {uncapitalize(sentence)}"
            yield sentence


def _write_objective(measured: PathScore | None) -> str:
    """Write the objective of the full path, or how another path changes it."""
    if measured is None:
        return NONE
    if measured.change is None:
        return write_number(measured.objective, 3)
    return write_change(measured)


def write_change(score: PathScore) -> str:
    """Write how the objective of a path differs from the full path's; a dash for the full path."""
    if score.change is None:
        return NONE
    mean, low, high = score.change
    return f"{write_signed(mean, 3)} ({write_signed(low, 2)} to {write_signed(high, 2)})"


def describe_path(record: StaticPaths, path: NamedPath) -> str:
    """Describe the edits of a path, and say whether a shorter path scored better."""
    edits = path.path.edits(record.num_layers)
    return f"{edits} (a shorter path scored better on select)" if path.dominated else edits


def compare_test_with_fit(record: StaticPaths, task: str) -> str:
    """Say how much lower or higher paths score beside the full path on `test` than on `fit`.

    Returns an empty text if no path was scored on both parts.
    """
    changes: list[float] = []
    for path in record.paths:
        fitted = path.on(task, FIT)
        tested = path.on(task, TEST)
        if fitted and tested and fitted.change and tested.change:
            changes.append(tested.change[0] - fitted.change[0])
    if not changes:
        return ""
    sentence = (
        f"On test questions, paths score {_compare_parts(fmean(changes))} (beside full) than on "
        f"the questions that they were fitted on"
    )
    if len(changes) > 1:
        sentence += f"; at worst {_compare_parts(min(changes))}"
    return f"{sentence}."


def _compare_parts(change: float) -> str:
    direction = "lower" if change < 0 else "higher"
    return f"{write_number(abs(change), 3)} nats {direction}"


def paths_section(record: StaticPaths, *, folded: bool) -> Section:
    """Build the section on the paths of a `paths.json`."""
    blocks = _change_figures(record)
    blocks += [_path_table(record, task) for task in record.tasks]
    sentences: list[str] = []
    for path in record.paths:
        sentences += [f"{sentence}." for sentence in describe_losses(record, path)]
    sentences += record.notes
    if sentences:
        blocks.append(write_list(sentences))
    return Section("Static paths", blocks, folded=folded)


def _path_table(record: StaticPaths, task: str) -> Markdown:
    """Build the table of `path_rows`, with a column that says what each path does."""
    descriptions = []
    for path in record.paths:
        num_rows = 2 if path.repaired else 1
        descriptions += num_rows * [describe_path(record, path)]
    rows = list(path_rows(record, task))
    for description, row in zip(descriptions, rows, strict=True):
        row.insert(2, description)
    caption = (
        f"{task}, objective {record.objective[task]}, in nats (more is better): the value of full, "
        f"and the change from it for other paths, with 95 % intervals. Paths were fitted on fit "
        f"and chosen on select, so they look too good there. Accuracy, its difference from full "
        f"and the excluded loss are measured on test, and next-token loss on texts drawn from "
        f"test. Rows are not corrected for their number."
    )
    header = COLUMNS.replace("layers|", "layers|what it does|")
    return write_table(caption, header, rows, "what it does")


def _change_figures(record: StaticPaths) -> list[Block]:
    """Draw the objective's change from full, for each task with scores on `test` and `fit`."""
    curves: list[Block] = []
    for task in record.tasks:
        sentence = compare_test_with_fit(record, task)
        if sentence:
            curve = Figure(
                draw=partial(figures.draw_changes, record, task),
                name=f"{task} static paths",
                alt=f"The objective's change from full over layers saved. {sentence}",
                caption=f"Of {task}; bars are 95 % intervals on test. {sentence}",
            )
            curves.append(curve)
    return curves


def loss_columns(record: HealedPath) -> str:
    """Return the columns of `loss_rows`."""
    columns = LOSS_COLUMNS
    if _has_refit_losses(record):
        columns += "|refit"
    if record.rank > 0:
        columns += "|refit, then trained" if record.refit else "|trained"
    return columns


def loss_rows(record: HealedPath) -> Iterator[list[str]]:
    """Yield a row for each source: its losses along the full path and along the path."""
    has_refit_losses = _has_refit_losses(record)
    for name, loss in record.held_out.items():
        num_texts = NONE if loss.num_texts is None else write_count(loss.num_texts)
        losses = [write_number(loss.full, 3), write_number(loss.path, 3)]
        if has_refit_losses:
            losses.append(write_number(loss.refit, 3))
        if record.rank > 0:
            losses.append(write_number(loss.healed, 3))
        yield [name, num_texts, *losses]


def _has_refit_losses(record: HealedPath) -> bool:
    """Tell whether the loss with the refit alone was measured."""
    return any(loss.refit is not None for loss in record.held_out.values())


HEALED_USE = (
    "Run it with --path and its folder, or write it as an ordinary checkpoint with drllm export."
)


def describe_healing(record: HealedPath) -> str:
    """Say what to do with a healed path, what was done to it, and what that changed."""
    cost = write_executions(record.executions)
    sentences = [
        HEALED_USE,
        f"The path runs {cost} of {record.num_layers} layers; it was {record.describe_repair()}.",
    ]
    if record.curve:
        sentences.append(_describe_training(record))
    sentences += [f"{capitalize(sentence)}." for sentence in describe_healed_losses(record)]
    return " ".join(sentences)


def _describe_training(record: HealedPath) -> str:
    """Say what the training changed."""
    first = record.curve[0]
    kept = min(record.curve, key=lambda point: point.held_out_kl)
    before = "with the refit" if record.refit else "before"
    first_kl = write_number(first.held_out_kl, 3)
    kept_kl = write_number(kept.held_out_kl, 3)
    return (
        f"Its KL from the full path on held-out texts of the same sources was "
        f"{first_kl} nats a token {before} and is {kept_kl} "
        f"after {write_count(kept.step)} steps of training ({write_count(kept.tokens)} tokens, "
        f"{format_duration(kept.seconds)})."
    )


def healed_section(record: HealedPath, *, folded: bool) -> Section:
    """Build the section on a healed path.

    A folded section begins with sentences on the path. If the section isn't folded, they are at
    the top of the report instead.
    """
    sentences = describe_healing(record)
    blocks: list[Block] = []
    if record.curve:
        curve = Figure(
            draw=partial(figures.draw_kl, record.curve),
            name="healing",
            alt=f"KL from the full path over the tokens that were trained on. {sentences}",
            caption="KL from the full path; on training texts it is a running mean. The adapter of "
            "the lowest point on held-out texts is kept.",
        )
        blocks.append(curve)
    blocks.append(write_table(LOSS_CAPTION, loss_columns(record), list(loss_rows(record))))
    if folded:
        blocks.insert(0, write_paragraph(sentences))
    return Section("Healed path", blocks, folded=folded)
