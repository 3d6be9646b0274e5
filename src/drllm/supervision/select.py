"""All questions' targets: the rule for each, copies counted once, quotas over the rest.

`supervise` is the stage: search records in, `supervision.jsonl` with its manifest out.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.config import SearchConfig, SuperviseConfig
from drllm.config.fields import changed
from drllm.errors import ConfigError, RecordError, unknown_name
from drllm.records.identity import differ
from drllm.records.manifest import new_manifest, write_or_remove, write_records
from drllm.records.search import SearchRecord, SearchRecords, TriedPath, read_search
from drllm.records.splits import question_key
from drllm.records.supervision import RejectedQuestion, SupervisionRecord, rejected_path
from drllm.supervision import rules
from drllm.supervision.summary import summarise

_ROUNDING = 1e-9


class Supervision(tuple[SupervisionRecord, ...]):
    """The targets, one per question that has one, in order; and what became of the others."""

    reasons: tuple[str | None, ...]  # one per question: why it has no target, None where it has one
    summary: dict[str, Any]  # counts, as `summarise` describes them
    rewards: tuple[str, ...]  # those that the prompts of the targets were made for, by name


def supervise(
    searches: SearchRecords | Path | str | Sequence[SearchRecord | SearchRecords | Path | str],
    config: SuperviseConfig | None = None,
    output: Path | str | None = None,
    **settings: Any,
) -> Supervision:
    """Pick the targets of searched questions, and write them with their manifest.

    The questions without a target are written to `supervision.rejected.jsonl` (or what it is
    called after the output), each with its reason; where all have one, there is no such file
    afterwards.

    Args:
        searches: Search records, from `search_paths` or `search.jsonl` files of one base model
            (the shards of a search, say), in this order; a question that stands in several of them
            counts once.
        config: The rule and the quotas.
        output: The `supervision.jsonl` to write, replaced if it is there; None writes nothing.
        settings: Settings of `SuperviseConfig` by name, in place of the config's.

    Raises:
        ConfigError: Settings that can't be followed.
        RecordError: No file; one named twice; a file that can't be trusted; searches of different
            base models or numbers of layers; two questions with one id; a file to write that is
            one of the inputs; no target at all. Nothing is written then.
    """
    config = changed(SuperviseConfig, config, settings)
    output = None if output is None else Path(output)
    if isinstance(searches, str | Path | SearchRecords):
        searches = [searches]
    if searches and isinstance(searches[0], SearchRecord):
        searches = [SearchRecords.of(searches)]  # type: ignore[arg-type]
    given: list[Any] = [Path(one) if isinstance(one, str) else one for one in searches]
    named = [one.file if isinstance(one, SearchRecords) else one for one in given]
    files = [file.resolve() for file in named if file is not None]
    for file in filter(None, named):
        if files.count(file.resolve()) > 1:
            raise RecordError(f"{file} is given twice; name each search file once")
    for file in () if output is None else (output, rejected_path(output)):
        if file.resolve() in files:
            raise RecordError(f"{file} is both read and written; choose another output file")
    if not given:
        raise RecordError("no search file is given; name at least one search.jsonl")
    read_quotas(config.quotas)  # what can't be read is refused before large files are
    sources = [one if isinstance(one, SearchRecords) else read_search(one) for one in given]
    for first, other in itertools.combinations(sources, 2):
        _check_same_model(first, other)
    _check_ids(sources)
    supervision = targets(list(itertools.chain(*sources)), config)
    if not supervision:
        raise RecordError(_without_targets(supervision.summary))
    if output is not None:
        write(supervision, sources, output, config)
    return supervision


def write(
    supervision: Supervision,
    sources: Sequence[SearchRecords],
    output: Path,
    config: SuperviseConfig,
) -> None:
    """Write what `targets` made of all records of the sources, which are of one base model."""
    inputs = [source.file for source in sources if source.file is not None]
    manifest = new_manifest(
        "supervision",
        model=max((source.model for source in sources), key=len),  # the one that tells most
        config=config.to_dict(),
        inputs=inputs,
        extra={"summary": supervision.summary, "rewards": list(supervision.rewards)},
    )
    if len(inputs) == len(sources):
        reasons = iter(supervision.reasons)
        counts = (Counter(itertools.islice(reasons, len(source))) for source in sources)
        manifest["files"] = {
            name: {
                "questions": found.total() - found[rules.TWICE],
                "copies": found[rules.TWICE],
                "targets": found[None],
                "rejected": {reason: found[reason] for reason in rules.REASONS},
            }
            for name, found in zip(manifest["inputs"], counts, strict=True)
        }
    # First, so that targets with a manifest never lie next to the rejects of others.
    rejected = [
        RejectedQuestion.of(record, reason)
        for record, reason in zip(itertools.chain(*sources), supervision.reasons, strict=True)
        if reason is not None
    ]
    write_or_remove(rejected_path(output), rejected)
    write_records(output, supervision, manifest)


def check_settings(
    config: SuperviseConfig, tasks: Collection[str], search: SearchConfig | None = None
) -> dict[str, int]:
    """Refuse settings that can't be followed with these tasks' questions; return the quotas."""
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


def targets(records: Sequence[SearchRecord], config: SuperviseConfig) -> Supervision:
    """Pick a target path for each searched question.

    Questions with the same text, in whatever tasks, are one question; the first one counts, with
    or without a target. Quotas are filled in the order of the questions.
    """
    quotas = check_settings(config, {record.task for record in records})
    reasons: list[str | None] = []
    found: dict[int, SupervisionRecord] = {}  # by the record's place
    seen: set[str] = set()
    for place, record in enumerate(records):
        key = question_key(record.question)
        paths: list[TriedPath] | str = rules.TWICE
        if key not in seen:
            seen.add(key)
            paths = rules.candidates(record, config.target, min_saving=config.min_saving)
        reasons.append(paths if isinstance(paths, str) else None)
        if not isinstance(paths, str):
            target = paths[0]
            found[place] = SupervisionRecord(
                question=record.question,
                optimal_layer_config=target.decisions,
                answer=record.answer,
                prompt=record.prompt,
                id=record.id,
                task=record.task,
                executions=target.executions,
                improving=rules.is_improving(target, record),
                margin=target.margin,
            )
    places = list(found)
    for dropped in over_quota(list(found.values()), quotas, config.quota_improving):
        del found[places[dropped]]
        reasons[places[dropped]] = rules.OVER_QUOTA
    supervision = Supervision(found.values())
    supervision.reasons = tuple(reasons)
    supervision.summary = summarise(records, supervision, Counter(filter(None, reasons)))
    supervision.rewards = tuple(sorted({records[place].reward for place in found}))
    return supervision


def read_quotas(text: str | None) -> dict[str, int]:
    """Read quotas as users write them: a comma list of TASK=COUNT; None for no quotas."""
    quotas: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        task, _, count = (piece.strip() for piece in part.rpartition("="))
        if not task or not count.isdecimal() or int(count) < 1:
            raise ConfigError(
                f"--quotas: {part.strip()!r} is no quota; give TASK=COUNT with a count of at "
                f"least 1, several of them with commas between, e.g. arc_easy=400,dart-1=200"
            )
        if task in quotas:
            raise ConfigError(f"--quotas names task {task!r} twice; name it once")
        quotas[task] = int(count)
    return quotas


def over_quota(
    kept: Sequence[SupervisionRecord], quotas: Mapping[str, int], share: float | None
) -> set[int]:
    """Return the places of the targets that have to go.

    A task with a quota keeps its first targets. With a share too, and as long as too few of them
    improve, the next improving target beyond the quota takes the place of the first one that
    doesn't; a task that runs out of improving targets stays below the share, as in the published
    code. With a share and no quota the last targets that don't improve go, until the others have
    the share; each task by itself where any task has a quota, else all of them together.

    Source: `data_generation.py` of Dr.LLM's published code (commit 14e8837) for quota and share
        together; the share without a quota is ours (docs/differences.md, D-11).
    """
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(kept):
        groups.setdefault(record.task if quotas else "", []).append(place)
    dropped: set[int] = set()
    for task, places in groups.items():
        if task in quotas:
            first, later = places[: quotas[task]], places[quotas[task] :]
            others = [place for place in first if not kept[place].improving]
            wanted = math.ceil((share or 0) * quotas[task] - _ROUNDING)
            missing = max(0, wanted - (len(first) - len(others)))
            arriving = [place for place in later if kept[place].improving][:missing]
            dropped |= {*later, *others[: len(arriving)]} - {*arriving}
        elif share is not None:
            others = [place for place in places if not kept[place].improving]
            # i / (i + n) >= share; a rounding error of the quotient never costs a target.
            improving = len(places) - len(others)
            dropped |= {*others[math.floor(improving * (1 - share) / share + _ROUNDING) :]}
    return dropped


def _without_targets(summary: Mapping[str, Any]) -> str:
    rejected = {reason: n for reason, n in summary["rejected"].items() if n}
    # A quota alone leaves targets, a share leaves the improving ones.
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
    reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    return (
        f"none of the {summary['questions']} searched questions has a target ({reasons}); {remedy}"
    )


def _check_same_model(first: SearchRecords, other: SearchRecords) -> None:
    """Refuse files of two base models; another id for the same weights is fine."""
    known = first.model.keys() & other.model.keys()
    others = () if "fingerprint" in known else ("id", "revision")
    for name in ("fingerprint", "num_layers", "hidden_size", "class", *others):
        values = first.model.get(name), other.model.get(name)
        if name in known and differ(name, *values, str(other.file)):
            raise RecordError(
                f"{first.file} and {other.file} are of different base models "
                f"({name} {first.model[name]!r} and {other.model[name]!r}); "
                f"make one supervision file for each"
            )


def _check_ids(sources: Sequence[SearchRecords]) -> None:
    """Refuse two questions under one id, which readers of the targets could not tell apart."""
    seen: dict[tuple[str, str], tuple[str, Path | None]] = {}
    for source in sources:
        for record in source:
            key = question_key(record.question)
            text, file = seen.setdefault((record.task, record.id), (key, source.file))
            if text != key:
                raise RecordError(
                    f"{file} and {source.file} have different questions with id {record.id!r} of "
                    f"task {record.task!r}; rename the task of one of them"
                )
