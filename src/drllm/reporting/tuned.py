"""What `drllm tune` found and `drllm heal` made of it, as reports and the terminal show it."""

from collections.abc import Iterator
from functools import partial
from statistics import fmean

from drllm.listener import duration
from drllm.records.healed import HealedPath
from drllm.records.static_paths import FIT, SELECT, TEST, Measured, NamedPath, StaticPaths
from drllm.reporting import figures
from drllm.reporting.blocks import Figure, Section, Table
from drllm.reporting.numbers import NONE, count, difference, percent, plain, signed

COLUMNS = "path|layers|objective: fit|select|test|accuracy|difference from full (95 %)|loss"
LOSSES = "source|texts|full path|path alone|healed|recovered"
LOSSES_ARE = "Next-token loss of texts that were not trained on, in nats a token."


def rows(found: StaticPaths, task: str) -> Iterator[list[str]]:
    """Yield a row for each path: its objective on each part, then how it did on `test`."""
    for path in found.paths:
        by_part = [path.on(task, part) for part in (FIT, SELECT, TEST)]
        tested = by_part[-1]
        against = tested.against_full if tested else None
        yield [
            path.name,
            plain(path.executions, 2).removesuffix(".00"),
            *[NONE if m is None else _objective(m) for m in by_part],
            percent(tested.accuracy if tested else None),
            difference(against.accuracy if against else None),
            plain(tested.text_loss if tested else None, 3),
        ]


def in_words(found: StaticPaths, path: NamedPath) -> str:
    """Say what a path changes about the full one, and whether one that saves more does better."""
    worse = " (one that saves more does better on select)" if path.dominated else ""
    return path.path.edits(found.num_layers) + worse


def _objective(measured: Measured) -> str:
    """Write an objective: the full path's value, what another has more or less."""
    if measured.change is None:
        return plain(measured.objective, 3)
    mean, low, high = measured.change
    return f"{signed(mean, 3)} ({signed(low, 2)} to {signed(high, 2)})"


def lost(found: StaticPaths, task: str) -> str:
    """Say in one sentence how much more of the objective there is on `test` than on `fit`."""
    both = [(path.on(task, FIT), path.on(task, TEST)) for path in found.paths]
    changes = [(f.change, t.change) for f, t in both if f and t]
    moves = [test[0] - fit[0] for fit, test in changes if fit and test]
    if not moves:
        return ""
    said = f"by {signed(fmean(moves), 3)} nats on average, by {signed(min(moves), 3)} at worst"
    return f"From fit to test the objective's change from full moves {said}."


def section(found: StaticPaths, *, folded: bool) -> Section:
    """Return the section on the paths of a `paths.json`."""
    curves = [
        Figure(
            draw=partial(figures.changes_by_layers_saved, found, task),
            name=f"{task} static paths",
            alt=f"The objective's change from full over layers saved. {said}",
            caption=f"Of {task}; bars are 95 % intervals on test. {said}",
        )
        for task in found.tasks
        if (said := lost(found, task))
    ]
    tables = {
        task: [
            [*row[:2], in_words(found, path), *row[2:]]
            for path, row in zip(found.paths, rows(found, task), strict=True)
        ]
        for task in found.tasks
    }
    columns = COLUMNS.replace("layers|", "layers|what it does|")
    values = {"found": found, "tables": tables, "columns": columns}
    return Section("Static paths", curves, 2, folded, "tuned.j2", values)


def losses(found: HealedPath) -> Iterator[list[str]]:
    """Yield a row for each source: its losses, and the share of what was lost that is recovered."""
    for name, loss in found.held_out.items():
        lost_by, won_back = loss.path - loss.full, loss.path - loss.healed
        three = [plain(each, 3) for each in (loss.full, loss.path, loss.healed)]
        num = NONE if loss.num_texts is None else count(loss.num_texts)
        yield [name, num, *three, percent(won_back / lost_by if lost_by > 0 else None, 0)]


def healing(found: HealedPath) -> str:
    """Say in one sentence what a healed path costs, and what its training changed."""
    kls, last = [check.held_out_kl for check in found.curve], found.curve[-1]
    cost = plain(found.executions, 2).removesuffix(".00")
    many = f"The commonest of {1 + len(found.others)} paths" if found.others else "The path"
    return (
        f"{many} runs {cost} of {found.num_layers} executions; its KL from the full path on "
        f"texts that were not trained on was {plain(kls[0], 3)} nats a token before and is "
        f"{plain(min(kls), 3)} after healing, which took {count(last.step)} steps "
        f"({count(last.tokens)} tokens, {duration(last.seconds)})."
    )


def healed_section(found: HealedPath, *, folded: bool) -> Section:
    """Return the section on a healed path; an unfolded one's sentence stands first of all."""
    curve = Figure(
        draw=partial(figures.kl_by_tokens, found.curve),
        name="healing",
        alt=f"KL from the full path over the tokens that were trained on. {healing(found)}",
        caption="KL from the full path; on training texts it is a running mean. The adapter of the "
        "lowest point on held-out texts is kept.",
    )
    table = Table.made(LOSSES_ARE, LOSSES, [*losses(found)])
    return Section("Healed path", [*[healing(found)] * folded, curve, table], 2, folded)
