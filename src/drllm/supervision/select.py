"""Pick targets for all questions: leave out duplicates, apply the rule, then enforce quotas.

`supervise` is the whole stage: from search records to `supervision.jsonl` with its manifest.
`supervise_to_file` is the same with a file of any name. A question may be in several search
records, for example in those of two tasks. Only its first record counts, and the others are
duplicates.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from drllm.config import SearchConfig, SuperviseConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError, RecordError, unknown_name
from drllm.records.identity import compare_bypass, differ
from drllm.records.manifest import new_manifest, write_or_remove, write_records
from drllm.records.places import resolve
from drllm.records.search import SearchRecord, SearchRecords, TriedPath, read_search
from drllm.records.splits import question_key
from drllm.records.supervision import (
    SUPERVISION_FILE,
    RejectedQuestion,
    SupervisionRecord,
    rejected_path,
)
from drllm.supervision import rules
from drllm.supervision.rules import Candidates
from drllm.supervision.summary import summarise

SearchSource: TypeAlias = SearchRecords | Path | str
"""The records of one search, or the file that holds them."""

_TOLERANCE = 1e-9  # rounding errors below this never change a number of targets


class Supervision(tuple[SupervisionRecord, ...]):
    """The targets of searched questions, in the order of the questions.

    Attributes:
        reasons: For each search record, why it has no target; None if it has a target.
        summary: Counts of questions, paths and targets; see `summarise`.
        rewards: Names of the rewards of the searches that the targets come from.
        model: The identity of the model that was searched; empty if it isn't known.
    """

    reasons: tuple[str | None, ...]
    summary: dict[str, Any]
    rewards: tuple[str, ...]
    model: Mapping[str, Any] = MappingProxyType({})


def supervise(
    searches: SearchSource | Sequence[SearchRecord | SearchSource],
    config: SuperviseConfig | None = None,
    output_dir: Path | str | None = None,
    **settings: Any,
) -> Supervision:
    """Pick the targets of searched questions, and write them to `supervision.jsonl`.

    A manifest is written beside it. Questions without a target are written with their reasons to
    `supervision.rejected.jsonl`. If every question has a target, this file is removed.

    Args:
        searches: Results of `search_paths`, or `search.jsonl` files, all of the same base model.
            They may be the shards of one search. Their order is kept. A question in several
            searches counts once.
        config: The rule and the quotas.
        output_dir: The folder for the files, which are replaced if they exist; None writes nothing.
        settings: Settings of `SuperviseConfig` by name; they replace the settings in `config`.

    Raises:
        ConfigError: Settings don't fit the searches.
        RecordError: A search can't be used: there is none, a file is missing, damaged, named twice
            or also the output, base models differ, or two questions have the same id. Or no
            question has a target. Nothing is written in these cases.
    """
    config = replace_settings(SuperviseConfig, config, settings)
    file = None if output_dir is None else Path(output_dir) / SUPERVISION_FILE
    return supervise_to_file(searches, config, file)


def supervise_to_file(
    searches: SearchSource | Sequence[SearchRecord | SearchSource],
    config: SuperviseConfig,
    file: Path | None,
) -> Supervision:
    """Do the same as `supervise`, but write the targets to a file of any name.

    Questions without a target go to NAME.rejected.jsonl beside the file NAME.jsonl.
    """
    sources = _list_sources(searches)
    _check_files(sources, file)
    read_quotas(config.quotas)  # wrong quotas are refused before large files are read
    all_records: list[SearchRecords] = []
    for source in sources:
        if isinstance(source, Path):
            source = read_search(source)
        all_records.append(source)
    pairs = itertools.combinations(_name_searches(all_records), 2)
    for (name, first), (other_name, second) in pairs:
        _check_same_model(name, first, other_name, second)
    _check_ids(all_records)
    records = list(itertools.chain.from_iterable(all_records))
    supervision = pick_targets(records, config)
    if not supervision:
        raise RecordError(_describe_no_targets(supervision.summary))
    supervision.model = next((source.model for source in all_records if source.model), {})
    if file is not None:
        write_supervision(supervision, all_records, file, config)
    return supervision


def _list_sources(
    searches: SearchSource | Sequence[SearchRecord | SearchSource],
) -> list[SearchRecords | Path]:
    """Return all sources as a list, in their order; neighbouring single records are one source."""
    if isinstance(searches, SearchRecords):
        return [searches]
    if isinstance(searches, (str, Path)):
        return [Path(searches)]
    sources: list[SearchRecords | Path] = []
    single_records: list[SearchRecord] = []
    for item in searches:
        if isinstance(item, SearchRecord):
            single_records.append(item)
            continue
        if single_records:
            sources.append(_join_records(single_records))
            single_records = []
        sources.append(item if isinstance(item, SearchRecords) else Path(item))
    if single_records:
        sources.append(_join_records(single_records))
    return sources


def _join_records(records: Sequence[SearchRecord]) -> SearchRecords:
    """Return single records as one source; refuse records of different numbers of layers."""
    first = records[0]
    for record in records:
        if record.num_layers != first.num_layers:
            raise RecordError(
                f"question {record.id!r} was searched on {record.num_layers} layers, but question "
                f"{first.id!r} on {first.num_layers}; give paths of one model"
            )
    return SearchRecords.of(records)


def _check_files(sources: Sequence[SearchRecords | Path], output: Path | None) -> None:
    """Refuse an empty list, a file that is named twice, and an output that is also an input."""
    if not sources:
        raise RecordError("no search file is given; name at least one search.jsonl")
    inputs: set[Path] = set()
    for source in sources:
        file = source.file if isinstance(source, SearchRecords) else source
        if file is None:
            continue
        place = resolve(file)
        if place in inputs:
            raise RecordError(f"{file} is given twice; name each search file once")
        inputs.add(place)
    if output is not None:
        for file in (output, rejected_path(output)):
            if resolve(file) in inputs:
                raise RecordError(f"{file} is both read and written; choose another output file")


def write_supervision(
    supervision: Supervision,
    sources: Sequence[SearchRecords],
    output: Path,
    config: SuperviseConfig,
) -> None:
    """Write the targets with their manifest, and the questions without a target.

    Args:
        supervision: The targets.
        sources: The searches that the targets come from, in the order of `supervision.reasons`.
        output: The file for the targets.
        config: The settings, for the manifest.
    """
    inputs = [source.file for source in sources if source.file is not None]
    manifest = new_manifest(
        "supervision",
        # Every source describes the same model, some with fewer fields.
        model=max((source.model for source in sources), key=len),
        config=config.to_dict(),
        inputs=inputs,
        extra={"summary": supervision.summary, "rewards": list(supervision.rewards)},
    )
    is_from_files = len(inputs) == len(sources)
    if is_from_files:
        counts = _count_by_source(supervision, sources)
        manifest["files"] = dict(zip(manifest["inputs"], counts, strict=True))
    # Rejected questions are written first. So targets with a manifest never lie beside rejected
    # questions of an earlier run.
    records = itertools.chain.from_iterable(sources)
    rejected_questions = [
        RejectedQuestion.of(record, reason)
        for record, reason in zip(records, supervision.reasons, strict=True)
        if reason is not None
    ]
    write_or_remove(rejected_path(output), rejected_questions)
    write_records(output, supervision, manifest)


def _count_by_source(
    supervision: Supervision, sources: Sequence[SearchRecords]
) -> list[dict[str, Any]]:
    """Return the counts of each source that the manifest records, under the manifest's names."""
    counts: list[dict[str, Any]] = []
    start = 0
    for source in sources:
        reasons = Counter(supervision.reasons[start : start + len(source)])
        start += len(source)
        num_duplicates = reasons[rules.DUPLICATE]
        counts.append(
            {
                "questions": reasons.total() - num_duplicates,
                "copies": num_duplicates,
                "targets": reasons[None],
                "rejected": {reason: reasons[reason] for reason in rules.REASONS},
            }
        )
    return counts


def check_settings(
    config: SuperviseConfig, tasks: Collection[str], search: SearchConfig | None = None
) -> dict[str, int]:
    """Return the quotas; refuse settings that don't fit the tasks or the search.

    Args:
        config: The settings of the targets.
        tasks: Names of the tasks that are or will be searched.
        search: The settings of the search, if it is still to come.
    """
    if search is not None and not search.kl and config.target == "least_kl":
        raise ConfigError(
            "--target least_kl needs the KL of paths, which --no-kl leaves out; leave --no-kl out, "
            "or choose another rule, such as --target shortest"
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

    Records with the same text are of one question, even if their tasks differ. Only the first of
    them counts, whether it has a target or not. Quotas are filled in the order of the questions.
    """
    quotas = check_settings(config, {record.task for record in records})
    reasons: list[str | None] = []
    targets_by_place: dict[int, SupervisionRecord] = {}  # by the place of the search record
    earlier_keys: set[str] = set()
    for place, record in enumerate(records):
        candidates = _find_candidates(record, config, earlier_keys)
        earlier_keys.add(question_key(record.question))
        if isinstance(candidates, str):
            reasons.append(candidates)
        else:
            reasons.append(None)
            targets_by_place[place] = _make_target(record, candidates[0])
    places = list(targets_by_place)
    for number in find_surplus(list(targets_by_place.values()), quotas, config.quota_improving):
        place = places[number]
        del targets_by_place[place]
        reasons[place] = rules.OVER_QUOTA
    supervision = Supervision(targets_by_place.values())
    supervision.reasons = tuple(reasons)
    num_rejected = Counter(reason for reason in reasons if reason is not None)
    supervision.summary = summarise(records, supervision, num_rejected)
    supervision.rewards = tuple(sorted({records[place].reward for place in targets_by_place}))
    return supervision


def _find_candidates(
    record: SearchRecord, config: SuperviseConfig, earlier_keys: Collection[str]
) -> Candidates:
    """Return the candidates for a record's target; a reason if its question came earlier."""
    if question_key(record.question) in earlier_keys:
        return rules.DUPLICATE
    return rules.find_candidates(record, config.target, min_saving=config.min_saving)


def _make_target(record: SearchRecord, path: TriedPath) -> SupervisionRecord:
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
                f"least 1, separated by commas, for example arc_easy=400,dart-1=200"
            )
        if task in quotas:
            raise ConfigError(f"--quotas names task {task!r} twice; name it once")
        quotas[task] = int(count)
    return quotas


def find_surplus(
    records: Sequence[SupervisionRecord], quotas: Mapping[str, int], share: float | None
) -> set[int]:
    """Return the places of the targets to drop for the quotas and the share of improving targets.

    An improving target is right where the full path is wrong. Targets are dropped group by group.
    If there are quotas, each task is a group; otherwise all targets are one group.

    A task with a quota keeps its first targets. With a share too, more improving targets may be
    needed. Then improving targets from beyond the quota replace the first targets that don't
    improve. If there are too few improving targets, the task stays below the share.

    A group with a share but no quota drops its last targets that don't improve, until the share is
    reached.

    Args:
        records: All targets, in the order of their questions.
        quotas: Task → maximum number of targets.
        share: Minimum share of improving targets; None for no minimum.

    Source: `data_generation.py` of Dr.LLM's published code (commit 14e8837) for quota and share
        together; the share without a quota is ours (docs/differences.md, D-11).
    """
    groups: dict[str, list[int]] = {}  # task → places; the task is "" without quotas
    for place, record in enumerate(records):
        task = record.task if quotas else ""
        groups.setdefault(task, []).append(place)
    improving = {place for place, record in enumerate(records) if record.improving}
    surplus: set[int] = set()
    for task, places in groups.items():
        if task in quotas:
            surplus |= _drop_for_quota(places, improving, quotas[task], share or 0.0)
        elif share is not None:
            surplus |= _drop_for_share(places, improving, share)
    return surplus


def _drop_for_quota(
    places: Sequence[int], improving: Collection[int], quota: int, share: float
) -> set[int]:
    """Return the places that one task drops for its quota and the share of improving targets."""
    within_quota = places[:quota]
    beyond_quota = places[quota:]
    replaceable = [place for place in within_quota if place not in improving]
    num_improving = len(within_quota) - len(replaceable)
    min_improving = math.ceil(share * quota - _TOLERANCE)
    num_missing = max(0, min_improving - num_improving)
    improving_beyond = [place for place in beyond_quota if place in improving]
    replacements = improving_beyond[:num_missing]
    replaced_places = replaceable[: len(replacements)]
    return {*beyond_quota, *replaced_places} - set(replacements)


def _drop_for_share(places: Sequence[int], improving: Collection[int], share: float) -> set[int]:
    """Return the places that a group drops, so that enough of the targets that stay improve."""
    not_improving = [place for place in places if place not in improving]
    num_improving = len(places) - len(not_improving)
    # The largest number n with num_improving / (num_improving + n) >= share.
    max_not_improving = math.floor(num_improving * (1 - share) / share + _TOLERANCE)
    return set(not_improving[max_not_improving:])


def _describe_no_targets(summary: Mapping[str, Any]) -> str:
    """Return the message if no question has a target: the reasons, and what to do."""
    num_rejected = {reason: count for reason, count in summary["rejected"].items() if count > 0}
    # A quota always leaves a target, and a share never drops improving targets. So targets were
    # dropped because none of them improves.
    if rules.OVER_QUOTA in num_rejected:
        remedy = (
            "no target improves on the full path, so leave --quota-improving out, or search more "
            "simulations"
        )
    elif rules.NO_KL in num_rejected:
        remedy = "search again with --kl, or choose another --target"
    elif rules.SAVES_TOO_LITTLE in num_rejected:
        remedy = "search more simulations, or give a smaller --min-saving"
    else:
        remedy = "search more questions or simulations, or choose another --target"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in num_rejected.items())
    return (
        f"none of the {summary['questions']} searched questions has a target ({reasons}); {remedy}"
    )


def _name_searches(sources: Sequence[SearchRecords]) -> list[tuple[str, SearchRecords]]:
    """Return searches with their names for messages: their files, or their numbers from 1."""
    pairs = []
    for number, source in enumerate(sources, start=1):
        name = f"search {number}" if source.file is None else str(source.file)
        pairs.append((name, source))
    return pairs


def _check_same_model(
    name: str, first: SearchRecords, other_name: str, second: SearchRecords
) -> None:
    """Refuse searches of different base models.

    Models are compared by the fingerprint of their weights, since the same weights may have two
    ids. Without fingerprints they are compared by id and revision.

    Args:
        name: The first search's name in messages.
        first: A search.
        other_name: The second search's name in messages.
        second: Another search.
    """
    difference = compare_bypass(first.model, second.model)
    if difference:
        raise RecordError(
            f"{name} and {other_name} were made with {difference}; make one supervision file for "
            f"each"
        )
    common_keys = first.model.keys() & second.model.keys()
    keys = ["fingerprint", "num_layers", "hidden_size", "class"]
    if "fingerprint" not in common_keys:
        keys += ["id", "revision"]
    for key in keys:
        if key not in common_keys:
            continue
        first_value = first.model[key]
        second_value = second.model[key]
        if differ(key, first_value, second_value, other_name):
            raise RecordError(
                f"{name} and {other_name} are of different base models ({key} {first_value!r} and "
                f"{second_value!r}); make one supervision file for each"
            )


def _check_ids(sources: Sequence[SearchRecords]) -> None:
    """Refuse two different questions of a task with the same id.

    Readers of the targets couldn't tell them apart.
    """
    # (task, id) → key of the first question with this id, and the name of its search
    first_questions: dict[tuple[str, str], tuple[str, str]] = {}
    for name, source in _name_searches(sources):
        for record in source:
            key = question_key(record.question)
            first_key, first_name = first_questions.setdefault(
                (record.task, record.id), (key, name)
            )
            if first_key != key:
                raise RecordError(
                    f"{first_name} and {name} have different questions with id {record.id!r} of "
                    f"task {record.task!r}; rename the task of one of them"
                )
