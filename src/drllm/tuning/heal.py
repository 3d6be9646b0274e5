"""The stage `heal`: repair a path that skips layers in closed form, then train an adapter for it.

First the down-projection before each gap of the path is solved anew (see `heal_repair`). Then PEFT
puts a LoRA adapter on the other linear maps of the path, and only the adapter is trained (see
`heal_training`). Some texts are held out of both (see `heal_texts`). An interrupted run resumes,
and ends with the same files.
"""

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from drllm.config import HealConfig
from drllm.config.fields import make_settings, replace_settings
from drllm.config.heal import NO_REPAIR, REFIT
from drllm.cost import path_executions
from drllm.errors import ConfigError
from drllm.extras import need
from drllm.model.identity import describe_adapters
from drllm.model.layers import parse_layer
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.models.routing.healed import save_healed
from drllm.paths import StaticPath
from drllm.records.healed import HEALED_FILE, HealedPath, read_healed
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer
from drllm.records.static_paths import FULL, PathFile, load_path, steps_to_write
from drllm.tasks.base import Task
from drllm.tuning.distillation import choose_low_precision
from drllm.tuning.heal_checks import (
    HEALED,
    PLAIN,
    REPAIRED,
    LossesBefore,
    TextLosses,
    measure_text_losses,
    summarize_losses,
)
from drllm.tuning.heal_repair import RefitSolver, choose_path_repair, choose_refit_texts
from drllm.tuning.heal_texts import (
    SplitTexts,
    TextArgument,
    TextSource,
    Tokens,
    digest_sources,
    read_sources,
    split_texts,
)
from drllm.tuning.heal_tokens import PROMPTS, TextTokenizer, check_max_tokens, digest_prompts
from drllm.tuning.heal_training import AdapterTraining, draw_batches
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener, OnProgress, write_minutes
from drllm.work.store import ResultStore, refuse_other_run

PARTIAL_FOLDER = "heal.partial"
ADAPTER = "healed"  # the adapter's name while it is trained
SAVE_SECONDS = 60  # a killed run loses about this much work


def heal(
    model: Any,
    path: StaticPath | PathFile | Path | str | None = None,
    tasks: Task | str | Sequence[Task | str] | None = None,
    texts: TextArgument = None,
    config: HealConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> HealedPath:
    """Recover what a path loses, and write the path with its adapter.

    First the weights before the gaps of the path are solved in closed form (a refit). Then LoRA is
    trained from there, unless `minutes` is 0. `repair="none"` trains LoRA alone. The base model
    isn't changed. After an interruption the same call resumes. If the number of steps is set, the
    resumed call ends with the same adapter.

    Args:
        model: As for `tune`.
        path: A path, also what `drllm.load_path` returns, or a file as for `--path`; None takes
            the config's path.
        tasks: Tasks, names of tasks, or files of questions; None takes the config's tasks.
        texts: A list of texts, or the names of files and data sets in one string; None takes the
            config's texts. Or tasks and texts together, as `read_sources` returns them.
        config: The settings; None takes the defaults.
        output_dir: Folder for the healed path; None uses a temporary folder.
        tokenizer: As for `tune`.
        listener: Receives progress and notes.
        settings: Settings of `HealConfig` by name, which replace the config's settings.

    Returns:
        The content of the folder's `path.json`: the path, how it was solved, the KL during the
        training, and the losses by source.

    Raises:
        ConfigError: The settings don't fit the model or the path, the loss diverged, the folder
            belongs to another run, PEFT isn't installed, or a refit alone doesn't lower the loss.
        PathError: The model can't run the path, or the path is for another model, or can't have
            the refit that the settings need.
        ArchitectureError, RoutingError: The model can't have the refit that the settings need.
        ModelError: There isn't enough memory for the refit.
        TaskError: A task is unknown, there are too few texts, or a file can't be read.

    Source: ours; the adapter is LoRA (arXiv 2106.09685).
    """
    config = replace_settings(HealConfig, config, settings)
    config.check()
    listener = listener or Listener()
    if config.is_trained:
        need("heal", "training an adapter (for the refit alone give --minutes 0)")
    sources = read_sources(config, tasks, texts)
    if not isinstance(path, StaticPath | PathFile):  # read now, before the model is loaded
        path = load_path(str(path or config.require_path()))
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        base.refuse_bypass("heal repairs a path")
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        name = "path"
        if isinstance(path, PathFile):
            name = path.name
            path = path.path_for(base.identity)
        stack.enter_context(only_writer(folder, "healing", "--output-dir"))
        run = HealRun(base, routed, path, name, sources, config, folder, listener)
        return run.run()


@dataclass(frozen=True)
class HealRun:
    """One run of the stage: it prepares texts, repairs the path, trains an adapter, and saves it.

    Attributes:
        base: The model.
        routed: The same model with its layers routed.
        path: The path to heal.
        name: The path's name in the record.
        sources: The texts.
        config: The settings.
        folder: The folder for the healed path.
        listener: Receives progress and notes.
    """

    base: BaseModel
    routed: RoutedModel
    path: StaticPath
    name: str
    sources: Sequence[TextSource]
    config: HealConfig
    folder: Path
    listener: Listener

    @property
    def full(self) -> StaticPath:
        """The full path."""
        return StaticPath(range(self.routed.num_layers))

    @property
    def plain(self) -> StaticPath:
        """The path without an adapter."""
        return self.path.check(self.routed.num_layers).with_adapter("")

    @property
    def healed(self) -> StaticPath:
        """The path with the adapter that is trained."""
        return self.path.with_adapter(ADAPTER)

    @property
    def adapted_layers(self) -> list[int]:
        """The layers that the adapter changes, in order."""
        first_layer = self.config.first_layer
        return sorted({layer for layer in self.plain.layers if layer >= first_layer})

    @property
    def low_precision(self) -> torch.dtype | None:
        """A dtype to train in faster; None computes in the model's dtype."""
        if not (self.config.autocast and self.config.is_trained):
            return None
        return choose_low_precision(self.base.model)

    def run(self) -> HealedPath:
        """Repair and train, or return the result of an earlier run with the same settings."""
        self.check_settings()
        repair = choose_path_repair(self.routed, self.plain, self.config, self.listener)
        record = self.make_record(repair)
        store = ResultStore(self.folder / PARTIAL_FOLDER, _identity(record), stage="healing")
        finished = self.read_finished(record)
        if finished is not None:
            store.remove()  # the earlier run may have been killed before it removed them
            return finished
        self.check_lora()
        store.open()
        # Results of earlier versions were kept without it.
        store.expect("prompts", {PROMPTS: record.prompts_sha256})
        texts = self.prepare_texts(store)
        if repair == REFIT:
            record = self.repair(record, texts, store)
        before = self.measure_before(record, texts, store)
        if record.refit is not None:
            record = self.check_repair(record, before, store)
        if self.config.is_trained:
            record = self.train_adapter(record, texts, before, store)
        after = self.measure_after(texts, before)
        healed = self.save(record, before, after)
        store.remove()
        return healed

    def check_settings(self) -> None:
        """Refuse settings that don't fit the model or the path."""
        check_max_tokens(self.base.model, self.config.max_tokens)
        if self.config.is_trained and not self.adapted_layers:
            raise ConfigError(
                f"--first-layer {self.config.first_layer} leaves no layer that can have an "
                f"adapter; give at most {max(self.plain.layers)}"
            )

    def make_record(self, repair: str) -> HealedPath:
        """Return the record of this run; the refit, the curve, the losses and the adapter follow.

        `repair` is `REFIT` or `NO_REPAIR`.
        """
        runtime = {
            **self.base.runtime,
            **describe_adapters(self.base.model),
            "autocast": str(self.low_precision).removeprefix("torch."),
        }
        config = self.config.to_dict() | {"repair": repair}
        manifest = new_manifest("healed_path", model=self.base.identity, config=config)
        rank = self.config.rank if self.config.is_trained else 0
        return HealedPath(
            **manifest,
            name=self.name,
            steps=steps_to_write(self.plain),
            executions=path_executions(self.plain),
            num_layers=self.routed.num_layers,
            first_layer=self.config.first_layer,
            rank=rank,
            alpha=rank,
            adapter_sha256="",
            tasks=tuple(source.name for source in self.sources if source.prompts),
            texts=tuple(source.name for source in self.sources if source.texts),
            divided=tuple(source.name for source in self.sources if source.is_divided),
            questions_sha256=digest_sources(self.sources),
            prompts_sha256=digest_prompts(self.base, self.sources),
            runtime=runtime,
        )

    def read_finished(self, record: HealedPath) -> HealedPath | None:
        """Return the result that the folder already has; refuse the result of another run."""
        file = self.folder / HEALED_FILE
        if not file.exists():
            return None
        healed = read_healed(file)
        remedy = "choose another --output-dir, or delete the old one"
        name = f"the healed path in {file}"
        # Older records have no digest of the prompts, so it isn't compared.
        stored = _identity(healed) | {PROMPTS: healed.prompts_sha256 or record.prompts_sha256}
        current = _identity(record) | {PROMPTS: record.prompts_sha256}
        refuse_other_run(name, stored, current, remedy)
        return healed

    def check_lora(self) -> None:
        """Refuse a model that can't have LoRA, before any text is read."""
        if self.config.is_trained:
            self.create_lora()
            self.routed.injection.adapters.drop(ADAPTER)

    def create_lora(self) -> list[nn.Parameter]:
        """Put new LoRA weights into the model, and return them."""
        rank = self.config.rank
        return self.routed.injection.create_lora(
            ADAPTER,
            rank=rank,
            alpha=rank,  # a scaling of 1, so that a learning rate means the same at every rank
            layers=self.adapted_layers,
            seed=self.config.seed,
        )

    def begin_training(self, before: LossesBefore | None = None) -> AdapterTraining:
        """Put a new adapter into the model, beside the refit if there is one.

        Returns its training. `before` is the measurement whose time counts.
        """
        parameters = self.create_lora()
        refit_layers = map(parse_layer, self.routed.injection.refits.weights(ADAPTER))
        first_layer = min([*self.adapted_layers, *refit_layers])
        training = AdapterTraining(
            self.routed, self.healed, first_layer, parameters, self.config, self.low_precision
        )
        if before is not None:
            training.count_measurement(before.seconds, before.seconds_per_path)
        return training

    def prepare_texts(self, store: ResultStore) -> SplitTexts:
        """Tokenize the texts, and hold some out."""
        tokenizer = TextTokenizer(self.routed, self.config.max_tokens, store, self.listener)
        texts = tokenizer.tokenize_sources(self.sources)
        return split_texts(texts, self.config)

    def repair(self, record: HealedPath, texts: SplitTexts, store: ResultStore) -> HealedPath:
        """Solve the refit, and put it into the model. Without enough texts there is none."""
        calibration_texts = choose_refit_texts(texts.to_train, self.config, self.listener)
        if not calibration_texts:
            return record
        solver = RefitSolver(self.routed, self.plain, calibration_texts, store, self.listener)
        solved = solver.solve()
        self.routed.injection.add_adapter(ADAPTER, refit=solved.weights)
        return msgspec.structs.replace(record, refit=solved.to_record())

    def measure_before(
        self, record: HealedPath, texts: SplitTexts, store: ResultStore
    ) -> LossesBefore:
        """Measure the losses of the full path, of the plain path, and with the refit."""
        paths = {FULL: self.full, PLAIN: self.plain}
        if record.refit is not None:
            paths[REPAIRED] = self.healed
        measure = partial(_measure_before, self.routed, paths, texts.held_out)
        with self.listener.busy("measuring the losses by source"):
            return store.get_or_make("losses before", LossesBefore, measure)

    def check_repair(
        self, record: HealedPath, before: LossesBefore, store: ResultStore
    ) -> HealedPath:
        """Take the refit out again if it doesn't lower the loss on held-out texts.

        Raises:
            ConfigError: It doesn't lower the loss, and nothing is trained.
        """
        if before.is_improved:
            self.listener.note(f"refit: next-token loss on held-out texts {before.describe()}")
            return record
        reason = (
            f"the refit doesn't lower the next-token loss on held-out texts: {before.describe()}"
        )
        if not self.config.is_trained:
            store.remove()
            raise ConfigError(
                f"{reason}; give more texts, of several kinds, or train LoRA alone (--repair none)"
            )
        self.listener.note(f"{reason}; LoRA starts from the plain path")
        self.routed.injection.adapters.drop(ADAPTER)
        return msgspec.structs.replace(record, refit=None)

    def train_adapter(
        self, record: HealedPath, texts: SplitTexts, before: LossesBefore, store: ResultStore
    ) -> HealedPath:
        """Train LoRA, and return the record with the curve of the training."""
        training = self.begin_training(before)
        with self.listener.progress("healing", "") as on_progress:
            training.resume(store)
            self.train(training, texts, store, on_progress)
            on_progress(1.0, 1.0)
        return msgspec.structs.replace(record, curve=tuple(training.state.curve))

    def train(
        self,
        training: AdapterTraining,
        texts: SplitTexts,
        store: ResultStore,
        on_progress: OnProgress,
    ) -> None:
        """Train to the end, with checks and saves on the way; then use the best adapter."""
        held_out: list[Tokens] = []
        for source_texts in texts.held_out.values():
            held_out += source_texts
        if not training.state.curve:
            self.check(training, held_out)
        first_block = FirstBlock(self.listener, self.base.model.device)
        last_save = 0.0  # so the state is saved before the first step
        batches = draw_batches(texts.to_train, self.config)
        for batch in itertools.islice(batches, training.state.step):  # done before an interruption
            training.distillation.teacher.register(batch)
        for batch in batches:
            if time.monotonic() - last_save > SAVE_SECONDS:
                training.save(store)
                last_save = time.monotonic()
            if training.is_over:
                break
            progress_before = training.progress
            num_parts_done = training.num_parts_done
            training.step(batch)
            share = (training.progress - progress_before) / (1 - progress_before)
            first_block.finish(share)  # of this run's work
            if training.num_parts_done > num_parts_done:
                self.check(training, held_out)
            on_progress(min(training.progress, 1.0), 1.0, training.describe())
        if not training.is_checked:
            self.check(training, held_out)
        if training.state.step == 0:
            self.note_no_time(training)
        training.use_best()

    def note_no_time(self, training: AdapterTraining) -> None:
        """Note that the time limit left no time for a step."""
        assert self.config.minutes is not None  # without a limit there are steps
        self.listener.note(
            f"{write_minutes(self.config.minutes)} minutes left no time to train: measuring the "
            f"held-out texts once takes {training.state.check_seconds:.0f} s; give more "
            f"--minutes, or a lower --num-held-out"
        )

    def check(self, training: AdapterTraining, held_out: Sequence[Tokens]) -> None:
        """Measure the KL on the held-out texts, and note it."""
        point = training.check(held_out)
        self.listener.note(f"step {point.step}: KL {point.held_out_kl:.3f} on held-out texts")

    def measure_after(self, texts: SplitTexts, before: LossesBefore) -> dict[str, TextLosses]:
        """Return the next-token losses along the healed path, by source."""
        if not self.config.is_trained:
            return {
                source: TextLosses(by_path={HEALED: losses.by_path[REPAIRED]})
                for source, losses in before.by_source.items()
            }
        with self.listener.busy("measuring the losses by source"):
            return measure_text_losses(self.routed, {HEALED: self.healed}, texts.held_out)

    def save(
        self, record: HealedPath, before: LossesBefore, after: Mapping[str, TextLosses]
    ) -> HealedPath:
        """Write the healed path, and return its record."""
        losses = summarize_losses(before, after, has_refit=record.refit is not None)
        record = msgspec.structs.replace(record, held_out=losses)
        return save_healed(self.folder, record, self.routed.injection, ADAPTER)


def _identity(record: HealedPath) -> dict[str, Any]:
    """Return the values by which a run recognises its own files."""
    # Older records have no repair. They also have settings that no longer exist, which
    # `make_settings` ignores.
    config = {"repair": NO_REPAIR, **record.config}
    settings = make_settings(HealConfig, config).decisive()
    if settings["repair"] == NO_REPAIR:
        del settings["repair"]
        del settings["refit_tokens"]
    return {
        "settings": settings,
        "model": record.model,
        "runtime": record.runtime,
        # Only the layers: older records also have a scale for each step, which is always 1.
        "path": record.path.layers,
        "texts_sha256": record.questions_sha256,
    }


def _measure_before(
    routed: RoutedModel,
    paths: Mapping[str, StaticPath],
    texts_by_source: Mapping[str, Sequence[Tokens]],
) -> LossesBefore:
    """Measure the losses before the training, and how long that takes."""
    started = time.perf_counter()
    losses = measure_text_losses(routed, paths, texts_by_source)
    return LossesBefore(by_source=losses, seconds=time.perf_counter() - started)
