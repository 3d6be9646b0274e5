"""Pick targets for all questions: apply the rule, leave out copies, then enforce quotas.

`supervise` is the whole stage: from search records to `supervision.jsonl` with its manifest.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from drllm.config import SearchConfig, SuperviseConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError, RecordError, unknown_name
from drllm.records.identity import differ
from drllm.records.manifest import new_manifest, write_or_remove, write_records
from drllm.records.search import SearchRecord, SearchRecords, TriedPath, read_search
from drllm.records.splits import question_key
from drllm.records.supervision import RejectedQuestion, SupervisionRecord, rejected_path
from drllm.supervision import rules
from drllm.supervision.summary import summarise

SearchSource: TypeAlias = SearchRecords | Path | str
"""The records of one search, or the file that holds them."""

_ROUNDING = 1e-9


class Supervision(tuple[SupervisionRecord, ...]):
    """The targets of searched questions, in the order of the questions.

    Attributes:
        reasons: For each search record, why it has no target; None if it has a target.
        summary: Counts of questions, paths and targets; see `summarise`.
        rewards: Names of the rewards that the searches of the targets used.
    """

    reasons: tuple[str | None, ...]
    summary: dict[str, Any]
    rewards: tuple[str, ...]


def supervise(
    searches: SearchSource | Sequence[SearchRecord | SearchSource],
    config: SuperviseConfig | None = None,
    output: Path | str | None = None,
    **settings: Any,
) -> Supervision:
    """Pick the targets of searched questions, and write them with their manifest.

    Questions without a target are written to `supervision.rejected.jsonl` (named after the output)
    with their reasons. If every question has a target, this file is removed.

    Args:
        searches: Search records from `search_paths`, or `search.jsonl` files, all of one base model
            (for example the shards of a search). Their order is kept. A question in several
            searches counts once.
        config: The rule and the quotas.
        output: The `supervision.jsonl` to write or to replace; None writes nothing.
        settings: Settings of `SuperviseConfig` by name; they replace the settings in `config`.

    Raises:
        ConfigError: Settings don't fit the searches.
        RecordError: There is no file; a file is named twice, can't be trusted, or is also the
            output; searches have different base models or numbers of layers; two questions have
            the same id; or no question has a target. Nothing is written in these cases.
    """
    config = replace_settings(SuperviseConfig, config, settings)
    output = None if output is None else Path(output)
    sources = _list_sources(searches)
    _check_files(sources, output)
    read_quotas(config.quotas)  # refused before large files are read
    read_sources: list[SearchRecords] = []
    for source in sources:
        if isinstance(source, Path):
            source = read_search(source)
        read_sources.append(source)
    for first, other in itertools.combinations(read_sources, 2):
        _check_same_model(first, other)
    _check_ids(read_sources)
    records = list(itertools.chain.from_iterable(read_sources))
    supervision = pick_targets(records, config)
    if not supervision:
        raise RecordError(_no_targets_message(supervision.summary))
    if output is not None:
        write_supervision(supervision, read_sources, output, config)
    return supervision


def _list_sources(
    searches: SearchSource | Sequence[SearchRecord | SearchSource],
) -> list[SearchRecords | Path]:
    """Return the sources as a list of files and of records of searches."""
    if isinstance(searches, SearchRecords):
        return [searches]
    if isinstance(searches, (str, Path)):
        return [Path(searches)]
    sources: list[SearchRecords | Path] = []
    records: list[SearchRecord] = []
    for item in searches:
        if isinstance(item, SearchRecord):
            records.append(item)
        elif isinstance(item, SearchRecords):
            sources.append(item)
        else:
            sources.append(Path(item))
    if records:
        sources.append(SearchRecords.of(records))
    return sources


def _check_files(sources: Sequence[SearchRecords | Path], output: Path | None) -> None:
    """Refuse an empty list, a file that is named twice, and an output that is also an input."""
    if not sources:
        raise RecordError("no search file is given; name at least one search.jsonl")
    seen: set[Path] = set()
    for source in sources:
        file = source.file if isinstance(source, SearchRecords) else source
        if file is None:
            continue
        if file.resolve() in seen:
            raise RecordError(f"{file} is given twice; name each search file once")
        seen.add(file.resolve())
    if output is not None:
        for file in (output, rejected_path(output)):
            if file.resolve() in seen:
                raise RecordError(f"{file} is both read and written; choose another output file")


def write_supervision(
    supervision: Supervision,
    sources: Sequence[SearchRecords],
    output: Path,
    config: SuperviseConfig,
) -> None:
    """Write the targets with their manifest, and the questions without a target."""
    inputs = [source.file for source in sources if source.file is not None]
    manifest = new_manifest(
        "supervision",
        model=max((source.model for source in sources), key=len),  # the model with the most fields
        config=config.to_dict(),
        inputs=inputs,
        extra={"summary": supervision.summary, "rewards": list(supervision.rewards)},
    )
    if len(inputs) == len(sources):
        counts = _count_by_source(supervision, sources)
        manifest["files"] = dict(zip(manifest["inputs"], counts, strict=True))
    # Rejected questions are written first, so targets with a manifest never lie beside rejected
    # questions of an earlier run.
    records = itertools.chain.from_iterable(sources)
    rejected = [
        RejectedQuestion.of(record, reason)
        for record, reason in zip(records, supervision.reasons, strict=True)
        if reason is not None
    ]
    write_or_remove(rejected_path(output), rejected)
    write_records(output, supervision, manifest)


def _count_by_source(
    supervision: Supervision, sources: Sequence[SearchRecords]
) -> list[dict[str, Any]]:
    """Count the questions, copies and targets of each source, and the rejected ones by reason."""
    counts: list[dict[str, Any]] = []
    start = 0
    for source in sources:
        reasons = Counter(supervision.reasons[start : start + len(source)])
        start += len(source)
        num_copies = reasons[rules.TWICE]
        counts.append(
            {
                "questions": reasons.total() - num_copies,
                "copies": num_copies,
                "targets": reasons[None],
                "rejected": {reason: reasons[reason] for reason in rules.REASONS},
            }
        )
    return counts


def check_settings(
    config: SuperviseConfig, tasks: Collection[str], search: SearchConfig | None = None
) -> dict[str, int]:
    """Return the quotas; refuse settings that don't fit the tasks or the search."""
    if search is not None and not search.kl and config.target == "least_kl":
        raise ConfigError(
            "--no-kl leaves out what --target least_kl needs; leave --no-kl out, or choose another "
            "rule, such as --target shortest"
        )
    if config.min_saving is not None and not rules.reads_min_saving(config.target):
        raise ConfigError(
            f"--min-saving {config.min_saving:g} has no effect with --target {config.target}; "
            f"leave it out, or choose --target least_kl"
        )
    quotas = read_quotas(config.quotas)
    for task in quotas:
        if task not in tasks:
            raise ConfigError("--quotas: " + unknown_name("task", task, tasks))
    return quotas


def pick_targets(records: Sequence[SearchRecord], config: SuperviseConfig) -> Supervision:
    """Pick a target path for each searched question.

    Questions with the same text are one question, even in different tasks. Only the first record of
    a question counts, whether it has a target or not. Quotas are filled in the order of the
    questions.
    """
    quotas = check_settings(config, {record.task for record in records})
    reasons: list[str | None] = []
    targets_by_place: dict[int, SupervisionRecord] = {}
    keys: set[str] = set()
    for place, record in enumerate(records):
        paths = _find_candidates(record, config, keys)
        if isinstance(paths, str):
            reasons.append(paths)
        else:
            reasons.append(None)
            targets_by_place[place] = _target(record, paths[0])
    places = list(targets_by_place)
    for number in find_surplus(list(targets_by_place.values()), quotas, config.quota_improving):
        place = places[number]
        del targets_by_place[place]
        reasons[place] = rules.OVER_QUOTA
    supervision = Supervision(targets_by_place.values())
    supervision.reasons = tuple(reasons)
    rejected = Counter(reason for reason in reasons if reason is not None)
    supervision.summary = summarise(records, supervision, rejected)
    supervision.rewards = tuple(sorted({records[place].reward for place in targets_by_place}))
    return supervision


def _find_candidates(
    record: SearchRecord, config: SuperviseConfig, keys: set[str]
) -> list[TriedPath] | str:
    """Return the paths that may be the record's target, the best first, or why there are none.

    `keys` holds the keys of all earlier questions; the key of this question is added.
    """
    key = question_key(record.question)
    if key in keys:
        return rules.TWICE
    keys.add(key)
    return rules.find_candidates(record, config.target, min_saving=config.min_saving)


def _target(record: SearchRecord, path: TriedPath) -> SupervisionRecord:
    return SupervisionRecord(
        question=record.question,
        optimal_layer_config=path.decisions,
        answer=record.answer,
        prompt=record.prompt,
        id=record.id,
        task=record.task,
        executions=path.executions,
        improving=rules.is_improving(path, record),
        margin=path.margin,
    )


def read_quotas(text: str | None) -> dict[str, int]:
    """Read the value of `--quotas`, a comma list of TASK=COUNT; None means no quotas."""
    if text is None:
        return {}
    quotas: dict[str, int] = {}
    for part in text.split(","):
        task, _, count = (piece.strip() for piece in part.rpartition("="))
        if not task or not count.isdecimal() or int(count) < 1:
            raise ConfigError(
                f"--quotas: {part.strip()!r} isn't a quota; give TASK=COUNT with a count of at "
                f"least 1, several of them with commas between, e.g. arc_easy=400,dart-1=200"
            )
        if task in quotas:
            raise ConfigError(f"--quotas names task {task!r} twice; name it once")
        quotas[task] = int(count)
    return quotas


def find_surplus(
    records: Sequence[SupervisionRecord], quotas: Mapping[str, int], share: float | None
) -> set[int]:
    """Return the places of the targets to drop for the quotas and the share of improving targets.

    A task with a quota keeps its first targets. If there is also a share and too few of the kept
    targets improve, some targets that don't improve are replaced: the first of them give way to
    improving targets from beyond the quota. A task without enough improving targets stays below the
    share, as in the published code.

    With a share but no quota, the last targets that don't improve are dropped until the share is
    reached. This is done task by task if any task has a quota, else in all tasks together.

    Args:
        records: All targets, in the order of their questions.
        quotas: Task → maximum number of targets.
        share: Minimum share of improving targets; None for no minimum.

    Source: `data_generation.py` of Dr.LLM's published code (commit 14e8837) for quota and share
        together; the share without a quota is ours (docs/differences.md, D-11).
    """
    places_by_task: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        group = record.task if quotas else ""
        places_by_task.setdefault(group, []).append(place)
    improving = {place for place, record in enumerate(records) if record.improving}
    dropped: set[int] = set()
    for task, places in places_by_task.items():
        if task in quotas:
            dropped |= _drop_for_quota(places, improving, quotas[task], share or 0.0)
        elif share is not None:
            dropped |= _drop_for_share(places, improving, share)
    return dropped


def _drop_for_quota(
    places: Sequence[int], improving: Collection[int], quota: int, share: float
) -> set[int]:
    """Return the places that one task drops for its quota and the share of improving targets."""
    first = places[:quota]
    later = places[quota:]
    replaceable = [place for place in first if place not in improving]
    min_improving = math.ceil(share * quota - _ROUNDING)
    num_missing = max(0, min_improving - (len(first) - len(replaceable)))
    arriving = [place for place in later if place in improving][:num_missing]
    leaving = replaceable[: len(arriving)]
    return {*later, *leaving} - set(arriving)


def _drop_for_share(places: Sequence[int], improving: Collection[int], share: float) -> set[int]:
    """Return the places that a group drops so that enough of its other targets improve."""
    replaceable = [place for place in places if place not in improving]
    num_improving = len(places) - len(replaceable)
    # Solves i / (i + n) >= share for n; a rounding error of the quotient never costs a target.
    num_kept = math.floor(num_improving * (1 - share) / share + _ROUNDING)
    return set(replaceable[num_kept:])


def _no_targets_message(summary: Mapping[str, Any]) -> str:
    """Return the message for searches without any target: the reasons, and what to do."""
    rejected = {reason: count for reason, count in summary["rejected"].items() if count > 0}
    # A quota alone always leaves a target, and a share never drops a target that improves.
    if rules.OVER_QUOTA in rejected:
        remedy = (
            "no target improves on the full path, so leave --quota-improving out, or search more "
            "simulations"
        )
    elif rules.NO_KL in rejected:
        remedy = "search again with --kl, or choose another --target"
    elif rules.SAVES_TOO_LITTLE in rejected:
        remedy = "search more simulations, or give a smaller --min-saving"
    else:
        remedy = "search more questions or simulations, or choose another --target"
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    return (
        f"none of the {summary['questions']} searched questions has a target ({reasons}); {remedy}"
    )


def _check_same_model(first: SearchRecords, other: SearchRecords) -> None:
    """Refuse searches of different base models; two ids of the same weights are one model."""
    in_both = first.model.keys() & other.model.keys()
    names = ["fingerprint", "num_layers", "hidden_size", "class"]
    if "fingerprint" not in in_both:
        names += ["id", "revision"]
    for name in names:
        if name not in in_both:
            continue
        value = first.model[name]
        other_value = other.model[name]
        if differ(name, value, other_value, str(other.file)):
            raise RecordError(
                f"{first.file} and {other.file} are of different base models "
                f"({name} {value!r} and {other_value!r}); make one supervision file for each"
            )


def _check_ids(sources: Sequence[SearchRecords]) -> None:
    """Refuse two questions with the same id: readers of the targets couldn't tell them apart."""
    seen: dict[tuple[str, str], tuple[str, Path | None]] = {}
    for source in sources:
        for record in source:
            key = question_key(record.question)
            first_key, file = seen.setdefault((record.task, record.id), (key, source.file))
            if first_key != key:
                raise RecordError(
                    f"{file} and {source.file} have different questions with id {record.id!r} of "
                    f"task {record.task!r}; rename the task of one of them"
                )
