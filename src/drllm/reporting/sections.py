"""A report's order: what is shown of a run comes first, what to do next, then the rest, folded."""

from __future__ import annotations

from collections.abc import Sequence

from drllm.reporting import cost, evaluated, learned, provenance, questions
from drllm.reporting.blocks import Block, Document, Listing, Section, Tiles, Verdicts, lowered
from drllm.reporting.next_steps import next_steps
from drllm.reporting.numbers import count
from drllm.reporting.run import Run


def document(runs: Sequence[Run]) -> Document:
    """Lay out the report of one run, or of several with a comparison in front."""
    if len(runs) == 1:
        [run] = runs
        return Document(_title(run), _about(run), _first(run), _sections(run))
    named = [(f"{number}: {run.name}", run) for number, run in enumerate(runs, start=1)]
    compared = evaluated.side_by_side(
        "run",
        [(name, each) for name, run in named for each in run.evaluations],
        "Base and routed model of every run, at every depth. Intervals of different runs say "
        "nothing about a difference between them where the questions differ.",
    )
    sections = [compared]
    for name, run in named:
        said = [f"{_title(run)}. {_about(run)}", *_first(run)]
        sections += [Section(f"Run {name}", said), *lowered(_sections(run))]
    return Document(f"Layer routing: {len(runs)} runs", "", [], sections)


def _title(run: Run) -> str:
    name = str(run.model.get("id") or "a base model that no file names")
    tasks = [each.task for each in run.evaluations]
    tasks = tasks or list(dict.fromkeys(record.task for record in run.search))
    return f"Layer routing of {name}" + (f" on {', '.join(tasks)}" if tasks else "")


def _about(run: Run) -> str:
    """Say when and on what: date, layers, questions."""
    dates = [str(each.manifest["created"]) for each in run.sources if "created" in each.manifest]
    said = [max(dates)[:10]] if dates else []
    said += [f"{run.num_layers} layers"] if run.num_layers else []
    for each in run.evaluations:
        shots = f", {count(each.num_fewshot)} worked examples" if each.num_fewshot else ""
        kind = "options scored" if each.kind == "choices" else "answers generated"
        asked = f"{count(each.num_questions)} questions of the {each.split} split, {kind}{shots}"
        said.append(f"{each.task}: {asked}" if len(run.evaluations) > 1 else asked)
    return " · ".join([*said, f"folder {run.name}"])


def _first(run: Run) -> list[Block]:
    """Return the verdict, one line a task, what a reader must know, and the tiles."""
    several = len(run.evaluations) > 1
    lines = [(e.task if several else "", evaluated.first_line(e)) for e in run.evaluations]
    first: list[Block] = [Verdicts(lines or [("", "Nothing was evaluated yet.")])]
    first += run.notes
    if several:
        return [*first, Tiles([cost.tile(run.latency)])]
    return [*first, *(evaluated.tiles(e, run.latency) for e in run.evaluations)]


def _sections(run: Run) -> list[Section]:
    sections: list[Section] = []
    if len(run.evaluations) > 1:
        named = [(each.task, each) for each in run.evaluations]
        caption = "Verdicts on accuracy are corrected for several tasks (Holm)."
        sections.append(evaluated.side_by_side("task", named, caption))
    folded: list[Section] = []
    for evaluation in run.evaluations:
        shown = [*evaluated.sections(evaluation), *questions.sections(run, evaluation)]
        if len(run.evaluations) == 1:
            sections, folded = shown, evaluated.details(evaluation)
        else:
            own = lowered([*shown, *evaluated.details(evaluation)])
            sections += [Section(evaluation.task, []), *own]
    steps = next_steps(run)
    following: list[Block] = [Listing([text for text, _ in steps], [code for _, code in steps])]
    if run.absent:
        following.append(f"Not in this folder: {'; '.join(run.absent)}.")
    sections.append(Section("What to do next", following))
    if run.evaluations:
        folded.append(cost.section(run.evaluations, run.latency))
    return [*sections, *folded, *learned.sections(run), provenance.section(run)]
