"""Builds a whole report from run folders: the title, the verdicts, and the sections in order."""

from collections.abc import Sequence

import msgspec

from drllm.records.latency import Latency
from drllm.records.results import Evaluation
from drllm.reporting import evaluation_sections, key_figures
from drllm.reporting.costs import costs_section
from drllm.reporting.document import Document, Section, lower_sections
from drllm.reporting.markdown import (
    Markdown,
    write_paragraph,
    write_steps,
    write_tiles,
    write_verdicts,
)
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.numbers import write_count
from drllm.reporting.provenance import provenance_section
from drllm.reporting.router_sections import router_section, search_section
from drllm.reporting.run import Run
from drllm.reporting.tables import comparisons_table

ROUTING = "Routers choose, once per question, which layers of the model to skip, execute or repeat."
PATHS = "A static path runs the same layers for every question."
FOLDED_WITH_SEVERAL_TASKS = ("Routes by layer", "Questions won and lost")
BASE_IS = "Base is the same model with every layer executed once."


def build_document(runs: Sequence[Run]) -> Document:
    """Build the report of one run, or of several runs: a comparison, then the parts of each run."""
    if len(runs) == 1:
        [run] = runs
        return Document(
            title=_write_title(run),
            about=_write_about(run),
            first=_build_first_blocks(run),
            sections=_build_sections(run),
        )
    names = [f"{number}: {run.name}" for number, run in enumerate(runs, start=1)]
    evaluations: list[tuple[str, Evaluation]] = []
    for name, run in zip(names, runs, strict=True):
        evaluations += [(name, evaluation) for evaluation in run.evaluations]
    compared = evaluation_sections.compare_side_by_side(
        "run",
        evaluations,
        "Base, routed model and paths of every run, at all depths. Intervals of different runs say "
        "nothing about a difference between them where the questions differ.",
    )
    sections = [compared]
    for name, run in zip(names, runs, strict=True):
        about = write_paragraph(f"{_write_title(run)}. {_write_about(run)}")
        sections.append(Section(f"Run {name}", [about, *_build_first_blocks(run)]))
        sections += lower_sections(_build_sections(run))
    return Document(f"Layer routing: {len(runs)} runs", "", [], sections)


def _write_title(run: Run) -> str:
    model = str(run.model.get("id") or "a base model that no file names")
    what = "Layer routing" if _is_routed(run) else "Static paths"
    tasks = _list_tasks(run)
    return f"{what} of {model} on {', '.join(tasks)}" if tasks else f"{what} of {model}"


def _list_tasks(run: Run) -> list[str]:
    """Return the tasks of the evaluations; without evaluations, the tasks of the first stage."""
    if run.evaluations:
        return [evaluation.task for evaluation in run.evaluations]
    if run.search:
        return list(dict.fromkeys(record.task for record in run.search))
    return []


def _is_routed(run: Run) -> bool:
    """Tell whether the report is about a routed model, and not only about static paths."""
    if run.evaluations:
        return any(evaluation.routed for evaluation in run.evaluations)
    return True


def _write_about(run: Run) -> str:
    """Write a line with the date, the number of layers, and the evaluated questions."""
    parts: list[str] = []
    manifests = [source.manifest for source in run.sources]
    dates = [str(manifest["created"]) for manifest in manifests if "created" in manifest]
    if dates:
        parts.append(max(dates)[:10])
    if run.num_layers:
        parts.append(f"{run.num_layers} layers")
    for evaluation in run.evaluations:
        questions = _describe_questions(evaluation)
        if len(run.evaluations) > 1:
            questions = f"{evaluation.task}: {questions}"
        parts.append(questions)
    parts.append(f"folder {run.name}")
    return " · ".join(parts)


def _describe_questions(evaluation: Evaluation) -> str:
    kind = "options scored" if evaluation.kind == "choices" else "answers generated"
    text = (
        f"{write_count(evaluation.num_questions)} questions of the {evaluation.split} split, {kind}"
    )
    if evaluation.num_fewshot:
        text += f", {write_count(evaluation.num_fewshot)} worked examples"
    return text


def _build_first_blocks(run: Run) -> list[Markdown]:
    """Build the blocks at the top: introduction, verdicts, notes and tiles."""
    first = [write_verdicts(_list_verdicts(run))]
    first += [write_paragraph(note) for note in run.notes]
    if len(run.evaluations) == 1:
        first += _build_key_figures(run.evaluations[0], run.latency)
    elif run.latency is not None:
        first.append(write_tiles([key_figures.build_time_tile(run.latency)]))
    first.append(write_paragraph(_write_introduction(run)))
    return first


def _build_key_figures(evaluation: Evaluation, latency: Latency | None) -> list[Markdown]:
    """Build the tiles of a task, and the table of the numbers behind its headline."""
    tiles = key_figures.build_tiles(evaluation, latency)
    if not tiles:
        return []
    return [write_tiles(tiles), comparisons_table(evaluation)]


def _write_introduction(run: Run) -> str:
    sentences: list[str] = []
    is_routed = _is_routed(run)
    if is_routed:
        sentences.append(ROUTING)
    if not is_routed or any(evaluation.paths for evaluation in run.evaluations):
        sentences.append(PATHS)
    sentences.append(BASE_IS)
    return " ".join(sentences)


def _list_verdicts(run: Run) -> list[tuple[str, str]]:
    """Return the headlines, each with its task if there are several tasks."""
    has_several_tasks = len(run.evaluations) > 1
    verdicts: list[tuple[str, str]] = []
    for evaluation in run.evaluations:
        task = evaluation.task if has_several_tasks else ""
        if evaluation.verdict:
            verdicts.append((task, evaluation.verdict))
    return verdicts or [("", "Nothing was evaluated yet.")]


def _build_sections(run: Run) -> list[Section]:
    """Build all sections; those with details are folded and come last."""
    shown = [_build_next_section(run)]
    folded: list[Section] = []
    if len(run.evaluations) == 1:
        shown += evaluation_sections.build_sections(run, run.evaluations[0])
        folded += evaluation_sections.build_details(run.evaluations[0])
    elif run.evaluations:
        shown += _build_sections_by_task(run)
    if run.evaluations:
        folded.append(costs_section(run.evaluations, run.latency))
    return [*shown, *folded, *build_stage_sections(run), provenance_section(run)]


def _build_sections_by_task(run: Run) -> list[Section]:
    """Build the comparison of the tasks, then the sections of each task."""
    named = [(evaluation.task, evaluation) for evaluation in run.evaluations]
    caption = "Verdicts on accuracy are corrected for several tasks (Holm)."
    sections = [evaluation_sections.compare_side_by_side("task", named, caption)]
    for evaluation in run.evaluations:
        parts: list[Section] = []
        for section in evaluation_sections.build_sections(run, evaluation):
            is_folded = section.title in FOLDED_WITH_SEVERAL_TASKS
            parts.append(msgspec.structs.replace(section, folded=is_folded))
        parts += evaluation_sections.build_details(evaluation)
        sections.append(Section(evaluation.task, _build_key_figures(evaluation, None)))
        sections += lower_sections(parts)
    return sections


def _build_next_section(run: Run) -> Section:
    blocks = [write_steps(suggest_steps(run))]
    if run.absent and (run.search or run.supervision or run.router_config):
        blocks.append(write_paragraph(f"Not in this folder: {'; '.join(run.absent)}."))
    return Section("What to do next", blocks)


def build_stage_sections(run: Run) -> list[Section]:
    """Build the sections on the stages before the evaluation: search and routers.

    Stages without files in the run folder are left out.
    """
    sections: list[Section] = []
    if run.search or run.supervision or run.summary:
        sections.append(search_section(run))
    if run.epochs:
        sections.append(router_section(run))
    return sections
