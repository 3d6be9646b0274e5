"""Repair a shortened model, and teach it the right answers that the user has.

The repairs run in their order, by default a refit and then LoRA. One that doesn't help on the check
part of the questions is undone. A refit has to lower the next-token loss of questions with their
right answers, and LoRA the loss that it trains.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from drllm.config import LearnConfig
from drllm.config.fields import replace_settings
from drllm.errors import ArchitectureError, ModelError, PathError, RoutingError
from drllm.model.layers import evaluation_mode
from drllm.model.load import BaseModel
from drllm.model.submodel import list_kept_layers
from drllm.models.routed_model import unrouted
from drllm.prune.repairs.base import REPAIRS, Lessons
from drllm.records.codec import hash_values, write_atomically, write_json
from drllm.tasks.base import Task
from drllm.tasks.parts import Questions, read_questions
from drllm.work.listener import Listener
from drllm.work.store import refuse_other_run

RUN_FILE = "learn.json"
LORA = "lora"


def learn(
    model: Any,
    questions: Task | str | Sequence[Task | str] | Questions | None = None,
    *,
    teacher: Any,
    texts: str | Sequence[str] | None = None,
    config: LearnConfig | None = None,
    tokenizer: Any = None,
    work: Path | str | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Repair a shortened model in place, and teach it right answers.

    A refit comes first, then LoRA for some minutes, unless `minutes` is 0. Both put new tensors in
    place, so that the full model stays as it is. After an interruption the same call with the same
    folder `work` goes on.

    Args:
        model: What `shorten` returned, or a checkpoint of it that was loaded.
        questions: Tasks, names of tasks, or files of questions: with options, with right answers in
            text, chats, or prompts without answers, which the full model answers first.
        teacher: The full model, its name, or what `load` returns.
        texts: Texts that the model must still be able to write, or the names of files in one
            string; None takes the config's texts.
        config: The settings; None takes the defaults.
        tokenizer: The tokenizer; None takes that of the full model.
        work: The folder of an interrupted run; None keeps nothing.
        listener: Receives progress and notes.
        settings: Settings of `LearnConfig` by name, which replace the config's settings.

    Returns:
        A report as plain JSON: the loss on the check part before and after each repair, and whether
        it was kept.

    Raises:
        ConfigError: A repair is unknown, the loss diverged, or the folder belongs to another run.
        TaskError: A task is unknown or has too few questions.
        PathError, ArchitectureError, RoutingError, ModelError: A repair that was asked for by name
            isn't possible.

    Source: ours.
    """
    config = replace_settings(LearnConfig, config, settings)
    listener = listener or Listener()
    questions = read_questions(config, questions, texts)
    with ExitStack() as stack:
        folder = Path(work or stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(unrouted(teacher, tokenizer, listener))
        base.refuse_bypass("learning repairs a model")
        stack.enter_context(evaluation_mode(model))
        lessons = Lessons.read(base, questions, config.max_tokens, listener)
        return run_repairs(model, base, lessons, config, folder, listener)


def run_repairs(
    model: Any,
    base: BaseModel,
    lessons: Lessons,
    config: LearnConfig,
    folder: Path,
    listener: Listener,
) -> dict[str, Any]:
    """Repair a shortened model; see `learn`. Repairs that an earlier run has finished are read."""
    names = [name.strip() for name in config.repairs.split(",") if name.strip()]
    if config.minutes == 0:
        names = [name for name in names if name != LORA]
    is_default = config.repairs == LearnConfig.repairs
    repairs = {}
    for name in names:
        repair = REPAIRS.get(name)(config)
        try:
            repair.check(model, base.model)
        except (ArchitectureError, ModelError, PathError, RoutingError) as error:
            if not is_default:
                raise
            listener.note(f"without {name}: {error}")
            continue
        repairs[name] = repair

    identity = {
        "settings": config.decisive(),
        "model": base.identity,
        "layers": list_kept_layers(model),
        "questions_sha256": hash_values([lessons.fit, lessons.check]),
    }
    keep_identity(folder / RUN_FILE, identity)

    report: dict[str, Any] = {"repairs": []}
    for name, repair in repairs.items():
        before = {key: each.data for key, each in model.named_parameters()}
        kept_file = folder / f"{name}.json"
        if kept_file.exists():
            entry = json.loads(kept_file.read_text(encoding="utf-8"))
            if entry["kept"]:
                _put_tensors(model, load_file(folder / f"{name}.safetensors"))
        else:
            started = time.monotonic()
            details = repair.fit(model, base.model, lessons, folder, listener)
            entry = {
                "name": name,
                "kept": details["after"] < details["before"],
                "minutes": round((time.monotonic() - started) / 60, 2),
                **details,
            }
            if entry["kept"]:
                changed = {}
                for key, each in model.named_parameters():
                    if each.data_ptr() != before[key].data_ptr():
                        changed[key] = each.detach().contiguous()
                write_atomically(folder / f"{name}.safetensors", save(changed))
            else:
                _put_tensors(model, before)
                listener.note(
                    f"{name} was undone: the loss on the check part is {details['after']:.3f}, and "
                    f"was {details['before']:.3f}"
                )
            write_json(kept_file, entry)
            (folder / f"{name}.state.safetensors").unlink(missing_ok=True)
        report["repairs"].append(entry)
    return report


def keep_identity(file: Path, identity: Mapping[str, Any]) -> None:
    """Write what identifies a run, or refuse to continue the work of another run."""
    if file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        remedy = f"choose another folder, or delete {file.parent}"
        refuse_other_run(f"the work in {file.parent}", earlier, identity, remedy)
    else:
        write_json(file, identity)


def _put_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give some parameters of a model other tensors; the present ones aren't written to."""
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name].to(parameter.device)
