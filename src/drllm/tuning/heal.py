"""The stage `heal`: train an adapter for a path that skips layers.

PEFT puts a LoRA adapter on the layers of the path, and only the adapter is trained (see
`heal_training`), on texts of which some are held out (see `heal_texts`). An interrupted run
resumes, and ends with the same adapter.
"""

import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from drllm.config import HealConfig
from drllm.config.fields import make_settings, replace_settings
from drllm.cost import path_executions
from drllm.errors import ConfigError
from drllm.extras import need
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import context_length
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.models.routing.healed import save_healed
from drllm.paths import StaticPath
from drllm.records.healed import HEALED_FILE, HealedPath, Losses, read_healed
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer
from drllm.records.static_paths import PathFile, load_path, steps_to_write
from drllm.tasks.base import Task
from drllm.tuning.distillation import choose_low_precision
from drllm.tuning.heal_checks import measure_losses
from drllm.tuning.heal_texts import (
    SplitTexts,
    TextArgument,
    TextSource,
    Tokens,
    digest_sources,
    read_sources,
    split_texts,
)
from drllm.tuning.heal_tokens import TextTokenizer
from drllm.tuning.heal_training import AdapterTraining, make_batches
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener, OnProgress
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
    """Train an adapter that recovers what a path loses, and write the path and the adapter.

    The base model isn't changed. After an interruption the same call resumes. If the number of
    steps is set, the resumed call ends with the same adapter.

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
        The content of the folder's `path.json`: the path, the KL during the training, and the
        losses by source.

    Raises:
        ConfigError: The settings don't fit the model or the path, the loss diverged, the folder
            belongs to another run, or PEFT isn't installed.
        PathError: The model can't run the path, or the path is for another model.
        TaskError: A task is unknown, there are too few texts, or a file can't be read.

    Source: ours; the adapter is LoRA (arXiv 2106.09685).
    """
    config = replace_settings(HealConfig, config, settings)
    listener = listener or Listener()
    need("heal", "healing")
    sources = read_sources(config, tasks, texts)
    if not isinstance(path, StaticPath | PathFile):  # read now, before the model is loaded
        path = load_path(str(path or config.require_path()))
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        name = "path"
        if isinstance(path, PathFile):
            name = path.named.name if path.named else path.file.stem
            path = path.path_for(base.identity)
        stack.enter_context(only_writer(folder, "healing", "--output-dir"))
        run = HealRun(base, routed, path, name, sources, config, folder, listener)
        return run.run()


@dataclass(frozen=True)
class HealRun:
    """One run of the stage: it prepares texts, trains and checks an adapter, and saves it.

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
        """A dtype to compute in faster; None computes in the model's dtype."""
        return choose_low_precision(self.base.model) if self.config.autocast else None

    def run(self) -> HealedPath:
        """Train, or return the result of an earlier run with the same settings."""
        self.check_settings()
        record = self.make_record()
        store = ResultStore(self.folder / PARTIAL_FOLDER, _identity(record), stage="healing")
        finished = self.read_finished(record)
        if finished is not None:
            store.remove()  # the earlier run may have been killed before it removed them
            return finished
        training = self.begin_training()
        store.open()
        texts = self.prepare_texts(store)
        with self.listener.progress("healing", "") as on_progress:
            training.resume(store)
            self.train(training, texts, store, on_progress)
            on_progress(1.0, 1.0)
        losses = self.measure_losses(texts)
        healed = self.save(record, training, losses)
        store.remove()
        return healed

    def check_settings(self) -> None:
        """Refuse settings that don't fit the model or the path."""
        config = self.config
        context = context_length(self.base.model)
        if context and config.max_tokens > context:
            raise ConfigError(
                f"--max-tokens is {config.max_tokens}, and this model reads {context} tokens; give "
                f"at most {context}"
            )
        if not self.adapted_layers:
            raise ConfigError(
                f"--first-layer {config.first_layer} leaves no layer that can have an adapter; "
                f"give at most {max(self.plain.layers)}"
            )

    def make_record(self) -> HealedPath:
        """Return the record of this run; the curve, the losses and the adapter come later."""
        autocast = str(self.low_precision).removeprefix("torch.")
        manifest = new_manifest(
            "healed_path", model=self.base.identity, config=self.config.to_dict()
        )
        return HealedPath(
            **manifest,
            name=self.name,
            steps=steps_to_write(self.plain),
            executions=path_executions(self.plain),
            num_layers=self.routed.num_layers,
            first_layer=self.config.first_layer,
            rank=self.config.rank,
            alpha=self.config.rank,
            adapter_sha256="",
            tasks=tuple(source.name for source in self.sources if source.prompts),
            texts=tuple(source.name for source in self.sources if source.texts),
            divided=tuple(source.name for source in self.sources if source.is_divided),
            questions_sha256=digest_sources(self.sources),
            runtime={**self.base.runtime, "autocast": autocast},
        )

    def read_finished(self, record: HealedPath) -> HealedPath | None:
        """Return the result that the folder already has; refuse the result of another run."""
        file = self.folder / HEALED_FILE
        if not file.exists():
            return None
        healed = read_healed(file)
        remedy = "choose another --output-dir, or delete the old one"
        name = f"the healed path in {file}"
        refuse_other_run(name, _identity(healed), _identity(record), remedy)
        return healed

    def begin_training(self) -> AdapterTraining:
        """Put a new adapter into the model, and return its training."""
        rank = self.config.rank
        parameters = self.routed.injection.create_lora(
            ADAPTER,
            rank=rank,
            alpha=rank,  # a scaling of 1, so that a learning rate means the same at every rank
            layers=self.adapted_layers,
            seed=self.config.seed,
        )
        first_layer = min(self.adapted_layers)
        return AdapterTraining(
            self.routed, self.healed, first_layer, parameters, self.config, self.low_precision
        )

    def prepare_texts(self, store: ResultStore) -> SplitTexts:
        """Tokenize the texts, and hold some out."""
        tokenizer = TextTokenizer(self.routed, self.config.max_tokens, store, self.listener)
        texts = tokenizer.tokenize_sources(self.sources)
        return split_texts(texts, self.config)

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
        batches = make_batches(texts.to_train, self.config)
        # A resumed training skips the batches of the steps that are done.
        for batch in itertools.islice(batches, training.state.step, None):
            if time.monotonic() - last_save > SAVE_SECONDS:
                training.save(store)
                last_save = time.monotonic()
            if training.is_over:
                break
            before = training.progress
            num_parts_done = training.num_parts_done
            training.step(batch)
            first_block.finish((training.progress - before) / (1 - before))  # of this run's work
            if training.num_parts_done > num_parts_done:
                self.check(training, held_out)
            on_progress(min(training.progress, 1.0), 1.0, training.describe())
        if training.state.step == 0:
            self.listener.note(
                f"--minutes {self.config.minutes} left no time to train: measuring the held-out "
                f"texts once takes {training.state.check_seconds:.0f} s; give more minutes, or a "
                f"lower --num-held-out"
            )
        training.use_best()

    def check(self, training: AdapterTraining, held_out: Sequence[Tokens]) -> None:
        """Measure the KL on the held-out texts, and note it."""
        point = training.check(held_out)
        self.listener.note(f"step {point.step}: KL {point.held_out_kl:.3f} on held-out texts")

    def measure_losses(self, texts: SplitTexts) -> dict[str, Losses]:
        """Return the next-token losses on the held-out texts, by source."""
        with self.listener.busy("measuring the losses by source"):
            return measure_losses(self.routed, self.full, self.plain, self.healed, texts.held_out)

    def save(
        self, record: HealedPath, training: AdapterTraining, losses: dict[str, Losses]
    ) -> HealedPath:
        """Write the healed path, and return its record."""
        curve = tuple(training.state.curve)
        record = msgspec.structs.replace(record, curve=curve, held_out=losses)
        return save_healed(self.folder, record, self.routed.injection, ADAPTER)


def _identity(record: HealedPath) -> dict[str, Any]:
    """Return the values by which a run recognises its own files."""
    return {
        # Older records have settings that no longer exist; `make_settings` ignores them.
        "settings": make_settings(HealConfig, record.config).decisive(),
        "model": record.model,
        "runtime": record.runtime,
        # Only the layers: older records also have a scale for each step, which is always 1.
        "path": record.path.layers,
        "texts_sha256": record.questions_sha256,
    }
