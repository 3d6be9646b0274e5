"""Training as a stage: targets in, for each seed a folder of routers out.

A folder of routers holds `router_config.json`, `routers.safetensors`, `metrics.jsonl`,
`layers.json` and `README.md`.
"""

import dataclasses
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from drllm.agreement import TRAIN, VALIDATION, Counts, compute_metrics
from drllm.config import TrainConfig
from drllm.config.fields import changed
from drllm.errors import ConfigError
from drllm.listener import Listener, logger
from drllm.models.base.prompts import PromptForm, form_of
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.routed_model import unrouted
from drllm.processes import from_first, is_first
from drllm.records.codec import encode, write_atomically
from drllm.records.layers import LAYERS_FILE, Layers
from drllm.records.manifest import write_or_remove
from drllm.records.places import check_folder
from drllm.records.supervision import SupervisionRecord, check_targets, join_supervision
from drllm.training import checkpoint
from drllm.training.checkpoint import CHECKPOINT_FILE, is_done
from drllm.training.feature_store import FEATURES_FOLDER, Store
from drllm.training.features import Features, assist, collect, digest
from drllm.training.targets import REJECTED_FILE, reasons_of
from drllm.training.trackers import RUN_FILE, check_trackers, tell, tracked
from drllm.training.trainer import DivergedError, Trainer, divide

METRICS_FILE = "metrics.jsonl"


def train(
    model: Any,
    targets: Sequence[SupervisionRecord] | Sequence[Path] | Path | str,
    config: TrainConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    features: Path | str | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> RouterStack:
    """Train routers for a frozen model on target paths, and write each seed's folder.

    Killed anywhere, the same call resumes and ends with the routers of an unbroken one, bit for
    bit on the same machine with the same number of threads.

    Args:
        model: A name or a `ModelConfig`, what `load` returns, a `RoutedModel`, or a causal language
            model of transformers.
        targets: One target path a question, from `drllm.supervise`; or a `supervision.jsonl`, or
            several.
        config: The settings.
        output_dir: Receives the first seed's routers, those of a further seed S go to `seed_S` in
            it. None trains in a temporary folder.
        tokenizer: The model's; None loads the one of its name, unless it comes with one.
        features: A folder that keeps the routers' inputs for further trainings. Without it they
            are in the output folder and deleted when the routers are trained.
        listener: Is told of progress.
        settings: Settings of `TrainConfig` by name, in place of the config's.

    Returns:
        The first seed's routers.

    Raises:
        ConfigError: A setting without effect or that can't be used; a folder that can't be
            written; a training that diverged.
        RecordError: Targets that this model can't be trained on; features that can't be kept.
        CheckpointError: A folder that holds another training, or can't be written any more.
    """
    config, listener = changed(TrainConfig, config, settings), listener or Listener()
    if output_dir is None and config.num_seeds > 1:
        raise ConfigError(f"--num-seeds {config.num_seeds} needs a folder for the routers")
    config.check_effects()
    check_trackers(config.trackers)
    given = [targets] if isinstance(targets, (str, Path)) else targets
    files = [Path(each) for each in given if isinstance(each, (str, Path))]
    records: Any = join_supervision(files) if files else targets
    with ExitStack() as stack:
        output = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()) + "/routers")
        check_folder(output, "output")
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        if not is_first():
            assist(base.model, config.num_windows)
            return from_first(lambda: load_routers(output))
        known = check_targets(files, base.identity) if files else getattr(records, "rewards", ())
        seeds = config.by_seed(output)
        for own in seeds.values():
            divide([target.question for target in records], own)
        store = Store(Path(features or output / FEATURES_FOLDER), config.feature_dtype)
        examples = collect(
            base.model,
            base.tokenizer,
            records,
            num_windows=config.num_windows,
            store=store,
            listener=listener,
        )
        rejected = examples.rejected
        write_or_remove(output / REJECTED_FILE, rejected)
        if rejected:
            listener.note(
                f"drllm: {len(rejected)} of {len(records)} targets are set aside "
                f"({reasons_of(rejected)}): {output / REJECTED_FILE}"
            )
        identity_of = functools.partial(
            checkpoint.identity_of, base_identity=base.identity, targets=digest(examples)
        )
        form = form_of(base.tokenizer, ((each.question, each.prompt) for each in records))
        left = [folder for folder, one in seeds.items() if not is_done(folder, identity_of(one))]
        for folder in left:
            train_on(
                examples,
                base.identity,
                seeds[folder],
                folder,
                rewards=known,
                form=form,
                device=base.model.device,
                used=store if folder == left[-1] and features is None else None,
                listener=listener,
            )
        if features is None:
            store.remove()
        return from_first(lambda: load_routers(output))


def train_on(
    examples: Features,
    base_identity: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    *,
    rewards: Sequence[str] = (),
    form: PromptForm | None = None,
    device: torch.device | str = "cpu",
    used: Store | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Train the routers of one seed on features, and write their folder.

    After every epoch a checkpoint is written, from which the same call resumes. It is removed last
    of all, after the `used` features if nothing needs them any more, so that a call that was killed
    before leaves nothing that the next one doesn't remove. Steps that stopping early spares are
    told as done.

    Returns the lines of `metrics.jsonl`. Those of the training part are counted while training:
    each example before the step that learns from it.
    """
    listener = listener or Listener()
    trainer = Trainer(examples, base_identity, config, device=device)
    for note in trainer.notes():
        logger.warning("%s", note)
    identity = checkpoint.identity_of(config, base_identity, digest(examples))
    kept = output / CHECKPOINT_FILE
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.resume(output, identity, trainer)
    with (
        listener.progress("fitting", "steps") as progress,
        tracked(config.trackers, trainer, output) as trackers,
    ):

        def on_step(done: int, counts: Counts) -> None:
            progress(done, trainer.steps)
            if trackers:
                row = {
                    "split": "step",
                    **compute_metrics(counts),
                    "learning_rate": trainer.rate(done - 1),
                }
                tell(trackers, [row], done)

        progress(trainer.epochs_done * trainer.steps_per_epoch, trainer.steps)
        try:
            while not trainer.is_over:
                trainer.epoch(on_step)
                lines = "".join(json.dumps(row) + "\n" for row in trainer.rows)
                write_atomically(output / METRICS_FILE, lines)
                checkpoint.save(output, identity, trainer)
                done = trainer.epochs_done
                rows = (row for row in trainer.rows if row["epoch"] == done)
                tell(trackers, rows, done * trainer.steps_per_epoch)
            if trainer.best is not None:
                progress(trainer.steps, trainer.steps)
            parts = trainer.evaluate()
        except DivergedError:  # resumed, it would diverge again
            kept.unlink(missing_ok=True)
            raise
    last = trainer.epochs_done
    epoch = trainer.best[0] if trainer.best else last
    layers = Layers(epoch=epoch, train=parts[TRAIN], validation=parts.get(VALIDATION))
    write_atomically(output / LAYERS_FILE, encode(layers) + b"\n")
    training: dict[str, Any] = {
        "targets": identity["targets_or_base_dtype_sha256"],
        "rewards": list(rewards),
        "prompt_form": form and dataclasses.asdict(form),
        "settings": trainer.config.decisive(),
        "steps": last * trainer.steps_per_epoch,
        "warmup_steps": trainer.warmup,
        "class_weights": list(trainer.class_weights),
        "num_trained": len(trainer.trained),
        "num_held_out": len(trainer.held_out),
        "tasks": dict(sorted(Counter(examples.tasks).items())),
        "metrics": [row for row in trainer.rows if row["epoch"] == epoch],
        "against_baselines": layers.against_baselines(),
    }
    if trainer.best is not None:
        training |= {"best_epoch": epoch, "last_epoch": last}
    stack = trainer.routers()
    stack.config = dataclasses.replace(stack.config, training=training)
    save_routers(stack, output)
    if used is not None:
        used.remove()
    (output / RUN_FILE).unlink(missing_ok=True)  # the trackers' runs are complete
    kept.unlink(missing_ok=True)
    return trainer.rows


def discard(output: Path, config: TrainConfig) -> None:
    """Delete what earlier trainings left in a folder, so that the next one starts from nothing."""
    for folder in config.by_seed(output):
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    Store(output / FEATURES_FOLDER).remove()
