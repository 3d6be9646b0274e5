"""Choose which layers to leave out: list sets of gaps, refit some, keep the best.

For each number of layers out, the sets that look best by the costs of their gaps are refitted on a
few texts. The one that loses least on the check part is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drllm.config import GapsConfig
from drllm.config.fields import replace_settings
from drllm.errors import ArchitectureError, ModelError, RoutingError
from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.model.submodel import shorten
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.prune.gaps import Gap, GapCosts, GapTable, find_best_sets, list_ends, list_layers
from drllm.prune.repairs.base import Lessons
from drllm.prune.repairs.refit import find_gaps, find_projections, solve_gaps
from drllm.prune.states import Tokens, measure_text_loss
from drllm.records.codec import write_json
from drllm.records.gaps import PATHS_FILE, GapRecord, GapsRecord, PathRecord
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer
from drllm.tasks.base import Task
from drllm.tasks.parts import Questions, read_questions
from drllm.work.listener import Listener

SETS_OF_A_KIND = 2  # sets whose gaps get exact costs, for each longest gap
EXACT_SETS = 2  # sets that are refitted since they are best by exact costs
SHARES = (1 / 6, 1 / 3, 1 / 2)  # of the layers, that are left out by default


def gap_costs(
    model: Any, texts: Sequence[str], *, tokenizer: Any = None, listener: Listener | None = None
) -> GapCosts:
    """Measure what each gap of a model costs, with the cheap cost.

    Args:
        model: The model, its name, or what `load` returns.
        texts: Texts of the kind that the model is for, 6,000 tokens or more.
        tokenizer: The tokenizer; None takes that of the model.
        listener: Receives the progress.

    Returns:
        The costs; `costs.best(15)` says which 15 layers to leave out.

    Raises:
        TaskError: There are fewer than ten texts.

    Source: ours.
    """
    listener = listener or Listener()
    with unrouted(model, tokenizer, listener) as base:
        tokens = [tuple(encode(base.tokenizer, text)) for text in texts]
        return measure_costs(base, tokens, [], listener)[0]


def choose_paths(
    model: Any,
    questions: Task | str | Sequence[Task | str] | Questions | None = None,
    config: GapsConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    texts: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> GapsRecord:
    """Choose which layers to leave out, for some numbers of layers.

    Args:
        model: The model, its name, or what `load` returns.
        questions: Tasks, names of tasks, or files of questions.
        config: The settings; None takes the defaults.
        output_dir: The folder for `paths.json`; None writes nothing.
        texts: As for `learn`.
        tokenizer: The tokenizer; None takes that of the model.
        listener: Receives progress and notes.
        settings: Settings of `GapsConfig` by name, which replace the config's settings.

    Raises:
        ConfigError: So many layers can't be left out.
        TaskError: A task is unknown or has too few questions.

    Source: ours.
    """
    config = replace_settings(GapsConfig, config, settings)
    listener = listener or Listener()
    questions = read_questions(config, questions, texts)
    with unrouted(model, tokenizer, listener) as base:
        base.refuse_bypass("gaps shorten a model")
        lessons = Lessons.read(base, questions, config.max_tokens, listener)
        numbers = config.list_numbers(base.num_layers) or [
            max(1, round(share * base.num_layers)) for share in SHARES
        ]
        record = choose_layers(base, lessons, numbers, config, listener)
    if output_dir is not None:
        output = Path(output_dir)
        with only_writer(output, "gaps", "--output-dir"):
            write_json(output / PATHS_FILE, record)
    return record


def choose_layers(
    base: BaseModel,
    lessons: Lessons,
    numbers: Sequence[int],
    config: GapsConfig,
    listener: Listener,
) -> GapsRecord:
    """Choose the layers to leave out for each number of layers out.

    Args:
        base: The full model.
        lessons: The questions and texts.
        numbers: The numbers of layers to leave out.
        config: The settings.
        listener: Receives progress and notes.
    """
    model = base.model
    numbers = sorted(set(numbers))
    texts = lessons.choose_texts(config.refit_tokens, config.seed)
    costs, num_tokens = measure_costs(base, texts, numbers, listener)
    checked = lessons.sample_checked_texts(config.seed)
    full_loss = measure_text_loss(model, checked)
    tried: list[PathRecord] = []
    chosen: list[PathRecord] = []
    for num_out in numbers:
        sets = [costs.list_sets(num_out, 1)[0]]
        sets += find_best_sets(costs.exact, base.num_layers, num_out, EXACT_SETS)
        paths = []
        for number, gaps in enumerate(dict.fromkeys(sets), start=1):
            skip = list_layers(gaps)
            short = shorten(model, skip)
            plain = measure_text_loss(short, checked) - full_loss
            refit = None
            title = f"trying {base.num_layers - num_out} layers, set {number} of {len(set(sets))}"
            try:
                find_projections(short, find_gaps(short, model))
                with listener.progress(title, "tokens") as on_progress:
                    solve_gaps(short, model, texts, on_progress)
                refit = measure_text_loss(short, checked) - full_loss
            except (ArchitectureError, ModelError, RoutingError) as error:
                listener.note(f"without a refit: {error}")
            paths.append(PathRecord(skip=tuple(skip), plain=plain, refit=refit))
        tried += paths
        best = min(paths, key=lambda path: path.plain if path.refit is None else path.refit)
        chosen.append(best)
    manifest = new_manifest("gaps", model=base.identity, config=config.to_dict())
    return GapsRecord(
        **manifest,
        num_layers=base.num_layers,
        texts={name: len(items) for name, items in lessons.fit.items()},
        num_tokens=num_tokens,
        full_loss=full_loss,
        gaps=tuple(
            GapRecord(first=i, end=k, cheap=cost, exact=costs.exact.get((i, k)))
            for (i, k), cost in costs.cheap.items()
        ),
        paths=tuple(chosen),
        tried=tuple(tried),
    )


def measure_costs(
    base: BaseModel, texts: Sequence[Tokens], numbers: Sequence[int], listener: Listener
) -> tuple[GapCosts, int]:
    """Return the costs of gaps, exact for those of the best sets, and the number of tokens."""
    num_layers = base.num_layers
    every = {(i, k): 0.0 for i in range(1, num_layers - 1) for k in list_ends(i, num_layers)}
    for num_out in numbers:
        GapCosts(num_layers, every).list_sets(num_out, 1)  # refuses too many layers before the work
    routed = RoutedModel(base.model)
    try:
        with listener.busy("reading texts"):
            table = GapTable(routed, texts)
        with listener.progress("costs of gaps", "layers") as on_progress:
            costs = table.measure_cheap(on_progress)
        gaps: set[Gap] = set()
        for num_out in numbers:
            for of_set in costs.list_sets(num_out, SETS_OF_A_KIND):
                gaps.update(of_set)
        with listener.progress("exact costs of the best gaps", "gaps") as on_progress:
            costs.exact = table.measure_exact(gaps, on_progress)
    finally:
        routed.detach()
    return costs, table.num_tokens
