"""The stage `train`: it reads targets, and writes a folder of routers for each seed.

`train` is the stage for Python users. It reads the targets, computes the routers' inputs once, with
`training.features`, and then trains each seed with a `training.trainer.Trainer`. The inputs may be
computed on Ray. The trainings run in this process, and don't need the base model.

A folder of routers holds `router_config.json`, `routers.safetensors`, `metrics.jsonl`,
`layers.json` and `README.md`.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drllm.agreement import TRAIN, VALIDATION, Counts, compute_metrics
from drllm.config import TrainConfig
from drllm.config.fields import replace_settings
from drllm.errors import CheckpointError, ConfigError
from drllm.model.load import BaseModel
from drllm.model.prompts import PromptForm, infer_form
from drllm.models.routers.checkpoint import check_foreign_files, load_routers, save_routers
from drllm.models.routers.places import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.workers import open_workers
from drllm.records.codec import delete_file, encode, write_atomically
from drllm.records.layers import LAYERS_FILE, Layers
from drllm.records.manifest import write_or_remove
from drllm.records.places import check_folder, stage_folder
from drllm.records.supervision import (
    RejectedQuestion,
    TargetSet,
    check_targets,
    check_targets_model,
)
from drllm.training import CHECKPOINT_FILE
from drllm.training.checkpoint import (
    TARGETS,
    is_done,
    make_identity,
    resume_training,
    save_checkpoint,
)
from drllm.training.feature_store import FEATURES_FOLDER, FeatureStore
from drllm.training.features import Features, collect_features
from drllm.training.inputs import TargetSource, collect_targets
from drllm.training.targets import REJECTED_FILE, describe_reasons
from drllm.training.trackers import RUN_FILE, log_rows, run_trackers
from drllm.training.trainer import DivergedError, Trainer
from drllm.work.listener import Listener, OnProgress, logger

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInfo:
    """What the routers' config records about the prompts of the targets.

    Attributes:
        rewards: Names of the rewards that the prompts were made for.
        form: The form that all prompts have, such as a chat template; None if they differ.
    """

    rewards: Sequence[str] = ()
    form: PromptForm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """What the routers of all seeds are trained on.

    Attributes:
        features: The training set.
        base_identity: Identity of the base model.
        prompts: What the routers' config records about the prompts.
        device: Where to train.
    """

    features: Features
    base_identity: Mapping[str, Any]
    prompts: PromptInfo
    device: torch.device


def train(
    model: Any,
    targets: TargetSource,
    config: TrainConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    features: Path | str | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> RouterStack:
    """Train routers for a frozen model on target paths, and write each seed's folder.

    If the call is killed, the same call resumes it. The routers are the same as without the
    interruption, bit for bit on the same machine with the same number of threads.

    Args:
        model: A name or a `ModelConfig`; without Ray also what `load` returns, a `RoutedModel`, or
            a causal language model of transformers.
        targets: The result of `drllm.supervise`; or a file `supervision.jsonl`, or several.
        config: The settings.
        output_dir: Folder for the first seed's routers. The routers of a further seed S go to its
            folder `seed_S`. None trains a single seed in a temporary folder.
        tokenizer: The model's tokenizer. None takes the tokenizer that comes with the model, or
            loads the tokenizer by the model's name.
        features: A folder that keeps the routers' inputs for further trainings. None keeps them in
            the output folder, and deletes them when the routers are trained.
        listener: Receives notes and progress.
        settings: Settings of `TrainConfig` by name; they replace the settings in `config`.

    Returns:
        The first seed's routers.

    Raises:
        ConfigError: A setting has no effect or can't be used, the output folder can't be written,
            the workers of Ray can't be started, or the training diverged.
        RecordError: The targets don't fit the model, or the features can't be written.
        CheckpointError: The folder holds another training, or can no longer be written.
    """
    config = replace_settings(TrainConfig, config, settings)
    if output_dir is None and config.num_seeds > 1:
        raise ConfigError(f"--num-seeds {config.num_seeds} needs a folder for the routers")
    target_set = collect_targets(targets, config)
    with ExitStack() as stack:
        if output_dir is None:
            output_dir = stage_folder(None, stack) / "routers"
        return train_on_targets(
            model,
            target_set,
            config,
            Path(output_dir),
            tokenizer=tokenizer,
            features=features,
            listener=listener,
        )


def train_on_targets(
    model: Any,
    targets: TargetSet,
    config: TrainConfig,
    output: Path,
    *,
    tokenizer: Any = None,
    features: Path | str | None = None,
    listener: Listener | None = None,
) -> RouterStack:
    """Train routers on targets that are read already; otherwise as `train`.

    Args:
        model: As for `train`.
        targets: The result of `collect_targets`.
        config: The settings.
        output: Folder for the first seed's routers; the folders of further seeds are inside.
        tokenizer: As for `train`.
        features: As for `train`.
        listener: As for `train`.
    """
    listener = listener or Listener()
    check_folder(output, "output")
    store = FeatureStore(Path(features or output / FEATURES_FOLDER), config.feature_dtype)
    seeds = config.by_seed(output)
    inputs = _compute_inputs(model, tokenizer, targets, seeds, store, listener)
    temporary_store = None if features else store
    unfinished = _find_unfinished(seeds, inputs, temporary_store)
    _write_rejected(output, inputs.features.rejected, len(targets.records), listener)
    _train_seeds(inputs, unfinished, listener, temporary_store)
    return load_routers(output)


def _compute_inputs(
    model: Any,
    tokenizer: Any,
    targets: TargetSet,
    seeds: Mapping[Path, TrainConfig],
    store: FeatureStore,
    listener: Listener,
) -> TrainingInputs:
    """Load the base model, here or in the workers of Ray, and run it along the targets.

    Folders that the training would be refused for at its end are refused before the model runs.

    Args:
        model: As for `train`.
        tokenizer: As for `train`.
        targets: The targets.
        seeds: The settings of each seed, by the folder of its routers.
        store: The folder of the features.
        listener: Receives notes and progress.
    """
    config = next(iter(seeds.values()))  # the seeds differ in nothing that is read here
    with open_workers(model, tokenizer, config, listener) as workers:
        identity = workers.executor.identity
        _refuse_folders(seeds, identity)
        rewards = getattr(targets.records, "rewards", ())  # an attribute of `Supervision`
        if targets.files:
            rewards = check_targets(targets.files, identity)
        else:
            check_targets_model(getattr(targets.records, "model", {}), identity, "this supervision")
        features = collect_features(
            workers,
            targets.records,
            num_windows=config.num_windows,
            store=store,
            listener=listener,
        )
        texts = [(record.question, record.prompt) for record in targets.records]
        form = infer_form(workers.base.tokenizer, texts)
        return TrainingInputs(
            features=features,
            base_identity=identity,
            prompts=PromptInfo(rewards=rewards, form=form),
            device=_choose_device(workers.base),
        )


def _choose_device(base: BaseModel) -> torch.device:
    """Return where the routers are trained: where the base model is.

    With Ray, the base model is in other processes. Then it is the same kind of device, if this
    process has one.
    """
    device: torch.device = base.model.device
    if device.type != "meta":
        return device
    if base.runtime["device"] == "cuda" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _refuse_folders(seeds: Mapping[Path, TrainConfig], base_identity: Mapping[str, Any]) -> None:
    """Refuse folders of other settings or of another base model, and foreign files in them."""
    for folder, config in seeds.items():
        if not is_done(folder, make_identity(config, base_identity)):
            check_foreign_files(folder)


def _train_seeds(
    inputs: TrainingInputs,
    unfinished: Mapping[Path, TrainConfig],
    listener: Listener,
    temporary_store: FeatureStore | None,
) -> None:
    """Train the seeds that aren't done.

    Args:
        inputs: What the routers are trained on.
        unfinished: The settings of these seeds, by the folder of their routers.
        listener: Receives progress.
        temporary_store: Features to delete when all seeds are done; None keeps the features.
    """
    folders = list(unfinished)
    for folder, config in unfinished.items():
        fit_seed(
            inputs.features,
            inputs.base_identity,
            config,
            folder,
            prompts=inputs.prompts,
            device=inputs.device,
            listener=listener,
        )
        # The features are deleted before the last checkpoint. So if the process is killed in
        # between, the training counts as unfinished, and the next call deletes both.
        if temporary_store is not None and folder == folders[-1]:
            temporary_store.remove()
        remove_state(folder)
    if temporary_store is not None:  # also if no seed was left to train
        temporary_store.remove()


def _find_unfinished(
    seeds: Mapping[Path, TrainConfig], inputs: TrainingInputs, temporary_store: FeatureStore | None
) -> dict[Path, TrainConfig]:
    """Return the seeds whose routers aren't trained yet, by their folders.

    Raises CheckpointError if a folder holds another training. The temporary features, which may be
    large, are deleted then.
    """
    unfinished = {}
    try:
        for folder, config in seeds.items():
            identity = make_identity(config, inputs.base_identity, inputs.features.digest)
            if not is_done(folder, identity):
                unfinished[folder] = config
    except CheckpointError:
        if temporary_store is not None:
            temporary_store.remove()
        raise
    return unfinished


def _write_rejected(
    output: Path, rejected: Sequence[RejectedQuestion], num_targets: int, listener: Listener
) -> None:
    """Write the targets that were set aside to `REJECTED_FILE`, and note how many they are."""
    path = output / REJECTED_FILE
    write_or_remove(path, rejected)
    if rejected:
        listener.note(
            f"{len(rejected)} of {num_targets} targets are set aside "
            f"({describe_reasons(rejected)}): {path}"
        )


def train_seed(
    features: Features,
    base_identity: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    *,
    prompts: PromptInfo | None = None,
    device: torch.device | str = "cpu",
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Train the routers of one seed on features, write their folder, and remove the checkpoint.

    The arguments and the result are the same as for `fit_seed`.
    """
    rows = fit_seed(
        features,
        base_identity,
        config,
        output,
        prompts=prompts,
        device=device,
        listener=listener,
    )
    remove_state(output)
    return rows


def fit_seed(
    features: Features,
    base_identity: Mapping[str, Any],
    config: TrainConfig,
    output: Path,
    *,
    prompts: PromptInfo | None = None,
    device: torch.device | str = "cpu",
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Train the routers of one seed and save them.

    A checkpoint is written after every epoch, and the same call resumes from it. The last
    checkpoint stays until `remove_state`: while it is there, the training counts as unfinished.

    Args:
        features: The training set.
        base_identity: Identity of the base model.
        config: The settings, with this seed as the only seed.
        output: The routers' folder.
        prompts: What to record about the prompts; None records nothing.
        device: Where to train.
        listener: Receives progress.

    Returns:
        The lines of `metrics.jsonl`; see `Trainer.train_epoch`.
    """
    listener = listener or Listener()
    trainer = Trainer(features, base_identity, config, device=device)
    for note in trainer.notes():
        logger.warning("%s", note)
    identity = make_identity(config, base_identity, features.digest)
    output.mkdir(parents=True, exist_ok=True)
    resume_training(output, identity, trainer)
    with (
        listener.progress("training", "steps") as progress,
        run_trackers(config.trackers, trainer, output) as trackers,
    ):
        counts = _run_epochs(trainer, identity, output, trackers, progress)
    layers = Layers(
        epoch=trainer.epochs_done, train=counts[TRAIN], validation=counts.get(VALIDATION)
    )
    write_atomically(output / LAYERS_FILE, encode(layers) + b"\n")
    routers = trainer.build_routers()
    training = _describe_training(trainer, layers, identity, prompts or PromptInfo())
    routers.config = dataclasses.replace(routers.config, training=training)
    save_routers(routers, output)
    return trainer.metrics


def remove_state(output: Path) -> None:
    """Delete the files that a training needs to be resumed, once its routers are saved."""
    delete_file(output / RUN_FILE)
    # The checkpoint goes last, since without it the training counts as finished.
    delete_file(output / CHECKPOINT_FILE)


@dataclass(frozen=True)
class _StepReporter:
    """Reports the steps of a training to the progress bar and to trackers."""

    trainer: Trainer
    trackers: Sequence[Any]
    progress: OnProgress

    def __call__(self, num_done: int, counts: Counts) -> None:
        """Report a step; `num_done` is the number of finished steps."""
        self.progress(num_done, self.trainer.schedule.num_steps)
        if not self.trackers:
            return
        rate = self.trainer.schedule.rate(num_done - 1)
        row = {"split": "step", **compute_metrics(counts), "learning_rate": rate}
        log_rows(self.trackers, [row], num_done)


def _run_epochs(
    trainer: Trainer,
    identity: Mapping[str, Any],
    output: Path,
    trackers: Sequence[Any],
    progress: OnProgress,
) -> dict[str, Counts]:
    """Train the remaining epochs; write metrics and a checkpoint after every epoch.

    Returns:
        The counts of the final routers, as `Trainer.evaluate` returns them.
    """
    report_step = _StepReporter(trainer, trackers, progress)
    progress(trainer.steps_done, trainer.schedule.num_steps)
    try:
        while not trainer.is_over:
            trainer.train_epoch(report_step)
            _write_metrics(trainer, output)
            save_checkpoint(output, identity, trainer)
            rows = [row for row in trainer.metrics if row["epoch"] == trainer.epochs_done]
            log_rows(trackers, rows, trainer.steps_done)
        return trainer.evaluate()
    except DivergedError:
        # Resumed from the checkpoint, the training would diverge again.
        delete_file(output / CHECKPOINT_FILE)
        raise


def _write_metrics(trainer: Trainer, output: Path) -> None:
    """Write `METRICS_FILE` with the lines of the finished epochs."""
    lines = [json.dumps(row) + "\n" for row in trainer.metrics]
    write_atomically(output / METRICS_FILE, "".join(lines))


def _describe_training(
    trainer: Trainer, layers: Layers, identity: Mapping[str, Any], prompts: PromptInfo
) -> dict[str, Any]:
    """Return what the routers' config records about their training."""
    prompt_form = None
    if prompts.form is not None:
        prompt_form = dataclasses.asdict(prompts.form)
    return {
        "targets": identity[TARGETS],
        "rewards": list(prompts.rewards),
        "prompt_form": prompt_form,
        "settings": trainer.config.decisive(),
        "steps": trainer.steps_done,
        "warmup_steps": trainer.schedule.num_warmup_steps,
        "class_weights": list(trainer.class_weights),
        "num_trained": len(trainer.train_rows),
        "num_held_out": len(trainer.validation_rows),
        "tasks": dict(sorted(Counter(trainer.features.tasks).items())),
        "metrics": [row for row in trainer.metrics if row["epoch"] == layers.epoch],
        "against_baselines": layers.against_baselines(),
    }


def discard(output: Path, config: TrainConfig) -> None:
    """Delete checkpoints, weights and features, so that the next training starts anew."""
    for folder in config.by_seed(output):
        delete_file(folder / CHECKPOINT_FILE)
        delete_file(folder / WEIGHTS_FILE)
    FeatureStore(output / FEATURES_FOLDER).remove()
