"""The stage `heal`: train an adapter for a path that skips layers.

PEFT puts a LoRA adapter on the layers of the path, and only the adapter is trained. The loss is the
mean KL between the next-token distributions of the path and of the full path (see `distillation`).
Some texts are held out (see `heal_texts`). At regular intervals a *check* measures the KL on these
texts. The adapter of the check with the lowest KL is the result. An interrupted run resumes, and
ends with the same adapter.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import msgspec
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from drllm.config import HealConfig
from drllm.config.fields import make_settings, replace_settings
from drllm.cost import path_executions
from drllm.errors import ConfigError
from drllm.extras import need
from drllm.models.base.batching import group_by_length
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import context_length
from drllm.models.routing.healed import save_healed
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.models.scoring.packing import Request
from drllm.paths import StaticPath
from drllm.records.healed import HEALED_FILE, HealedPath, HealPoint, Losses, read_healed
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer
from drllm.records.resume import Chunks, refuse_other_run
from drllm.records.static_paths import load_path, steps_to_write
from drllm.tasks.base import Task
from drllm.tuning.distillation import Distillation, choose_low_precision
from drllm.tuning.heal_texts import TextSource, Tokens, digest_sources, read_sources, split_texts
from drllm.tuning.heal_tokens import TextTokenizer
from drllm.tuning.objectives import KL, LOSS
from drllm.tuning.path_scorer import Item, PathScorer
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener

CHUNKS_FOLDER = "heal.partial"
STATE_KEY = "training"  # the key of the training's state in the folder of chunks
ADAPTER = "healed"  # the adapter's name while it is trained
STEPS = 250  # training steps, unless a number or a time is given
PATIENCE = 3  # the training ends after this many checks in a row without a lower KL
CHECKS = 10  # the number of checks in a training, besides the check before the first step
WARM_UP = 0.05  # share of the training in which the learning rate rises
MAX_GRAD_NORM = 1.0
SAVE_SECONDS = 60  # a killed run loses about this much work
STATE_CACHE_GB = 1.0  # for states that paths share while texts are measured
STEPS_AHEAD = 16  # the sequences of this many steps are drawn, and sorted into batches, together
FINAL_CHECKS = 3
"""The time of this many checks is set aside for the measurements after the last step. These are a
check, which runs two paths, and the losses by source, which run three. So they take less time than
three checks."""


def heal(
    model: Any,
    path: StaticPath | Path | str | None = None,
    tasks: Task | str | Sequence[Task | str] | None = None,
    texts: str | Sequence[str] | None = None,
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
        path: A path, or a file as for `--path`; None takes the config's path.
        tasks: Tasks, names of tasks, or files of questions; None takes the config's tasks.
        texts: A list of texts, or the names of files and data sets in one string; None takes the
            config's texts.
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
    path_file = None
    if not isinstance(path, StaticPath):  # read before the model is loaded, to fail early
        path_file = load_path(str(path or config.require_path()))
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        name = "path"
        if path_file is not None:
            path = path_file.path_for(base.identity)
            name = path_file.named.name if path_file.named else path_file.file.stem
        assert isinstance(path, StaticPath)
        stack.enter_context(only_writer(folder, "healing", "--output-dir"))
        run = HealRun(base, routed, path, name, sources, config, folder, listener)
        return run.run()


class _State(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The state of a training, which is saved."""

    step: int = 0  # steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # duration of all steps and checks
    check_seconds: float = 0.0  # duration of the longest check
    train_kl: float | None = None  # a running mean over the last steps
    curve: list[HealPoint] = []  # one point for each check
    tensors: bytes = b""  # parameters and optimiser, as a file of safetensors; set by `_save`


class HealRun:
    """One run of the stage: it tokenizes texts, trains an adapter, and measures losses.

    Args:
        base: The model.
        routed: The same model with its layers routed.
        path: The path to heal.
        name: The path's name in the record.
        sources: The texts.
        config: The settings.
        folder: The folder for the healed path.
        listener: Receives progress and notes.

    Attributes:
        plain: The path without an adapter.
        healed: The path with the adapter that is trained.
        full: The full path.
        held_out: Name of a source → its held-out sequences.
        parameters: The adapter's weights.
        best: The weights at the check with the lowest KL so far.
    """

    def __init__(
        self,
        base: BaseModel,
        routed: RoutedModel,
        path: StaticPath,
        name: str,
        sources: Sequence[TextSource],
        config: HealConfig,
        folder: Path,
        listener: Listener,
    ) -> None:
        self.base = base
        self.routed = routed
        self.plain = path.check(routed.num_layers).with_adapter("")
        self.healed = path.with_adapter(ADAPTER)
        self.full = StaticPath(range(routed.num_layers))
        self.name = name
        self.sources = sources
        self.config = config
        self.folder = folder
        self.listener = listener
        self.low_precision = choose_low_precision(base.model) if config.autocast else None
        self.state = _State()
        self.held_out: dict[str, list[Tokens]] = {}
        self.parameters: list[nn.Parameter] = []
        self.best: list[Tensor] = []

    def run(self) -> HealedPath:
        """Train, or return the result of an earlier run with the same settings."""
        self.check()
        self.record = self._new_record()
        self.chunks = Chunks(self.folder / CHUNKS_FOLDER, _identity(self.record), stage="healing")
        finished = self._read_finished()
        if finished is not None:
            return finished
        self.add_adapter()
        self.chunks.open()
        sequences = self._read_texts()
        with self.listener.progress("healing", "") as on_progress:
            self._resume()
            for message in self._train(sequences):
                on_progress(min(self._progress, 1.0), 1.0, message)
            on_progress(1.0, 1.0)
        with self.listener.busy("measuring the losses by source"):
            losses = self._measure_losses()
        curve = tuple(self.state.curve)
        record = msgspec.structs.replace(self.record, curve=curve, held_out=losses)
        healed = save_healed(self.folder, record, self.routed.injection, ADAPTER)
        self.chunks.remove()
        return healed

    def check(self) -> None:
        """Refuse settings that don't fit the model or the path."""
        config = self.config
        context = context_length(self.base.model)
        if context and config.max_tokens > context:
            raise ConfigError(
                f"--max-tokens is {config.max_tokens}, and this model reads {context} tokens; give "
                f"at most {context}"
            )
        if not self._adapted_layers():
            raise ConfigError(
                f"--first-layer {config.first_layer} leaves no layer that can have an adapter; "
                f"give at most {max(self.plain.layers)}"
            )

    def add_adapter(self) -> None:
        """Put a new adapter into the model, and create its optimiser and loss."""
        rank = self.config.rank
        self.parameters = self.routed.injection.lora.create(
            ADAPTER,
            rank=rank,
            alpha=rank,  # a scaling of 1, so that a learning rate means the same at every rank
            layers=self._adapted_layers(),
            maps=self.routed.injection.linear_maps,
            seed=self.config.seed,
        )
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)
        self.distillation = Distillation(
            self.routed,
            self.healed,
            min(self._adapted_layers()),
            self.parameters,
            self.low_precision,
        )

    def _adapted_layers(self) -> list[int]:
        """Return the layers that the adapter changes, in order."""
        first_layer = self.config.first_layer
        return sorted({layer for layer in self.plain.layers if layer >= first_layer})

    def _new_record(self) -> HealedPath:
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

    def _read_finished(self) -> HealedPath | None:
        """Return the result that the folder already has; refuse the result of another run."""
        file = self.folder / HEALED_FILE
        if not file.exists():
            return None
        healed = read_healed(file)
        remedy = "choose another --output-dir, or delete the old one"
        name = f"the healed path in {file}"
        refuse_other_run(name, _identity(healed), _identity(self.record), remedy)
        self.chunks.remove()  # the earlier run may have been killed before it removed them
        return healed

    def _read_texts(self) -> dict[str, list[Tokens]]:
        """Tokenize the texts; set `held_out`, and return the sequences to train on by source."""
        tokenizer = TextTokenizer(self.routed, self.config.max_tokens, self.chunks, self.listener)
        texts = tokenizer.tokenize_sources(self.sources)
        split = split_texts(texts, self.config)
        self.held_out = split.held_out
        return split.to_train

    # --- training ---

    @property
    def _progress(self) -> float:
        """The share of the training that is done, by steps or by time; above 1 if it took longer.

        If the settings limit both, the larger share counts.
        """
        steps = self.config.steps
        minutes = self.config.minutes
        if steps is None and minutes is None:
            steps = STEPS
        share = 0.0
        if steps is not None:
            share = self.state.step / steps
        if minutes is not None:
            share = max(share, self._share_of_time(60 * minutes))
        return share

    def _share_of_time(self, seconds: float) -> float:
        """Return the share of the training's time that is over.

        `seconds` is the time for the training and for the measurements after it.
        """
        training_seconds = seconds - FINAL_CHECKS * self.state.check_seconds
        if training_seconds <= 0:
            return 1.0
        return self.state.seconds / training_seconds

    @property
    def _is_over(self) -> bool:
        """Whether the training is complete, or too many checks in a row show no lower KL."""
        kls = [point.held_out_kl for point in self.state.curve]
        best_check = kls.index(min(kls))
        num_checks_since = len(kls) - 1 - best_check
        return self._progress >= 1 or num_checks_since >= PATIENCE

    def _train(self, sequences: Mapping[str, Sequence[Tokens]]) -> Iterator[str]:
        """Train to the end, and yield a message after each step; then use the best adapter.

        Args:
            sequences: Name of a source → the sequences to train on.
        """
        state = self.state
        last_save = 0.0  # so the state is saved before the first step
        if not state.curve:
            self._check_held_out()
        first_block = FirstBlock(self.listener, self.base.model.device)
        # A resumed training skips the batches of the steps that are done.
        for batch in itertools.islice(make_batches(sequences, self.config), state.step, None):
            if time.monotonic() - last_save > SAVE_SECONDS:
                self._save()
                last_save = time.monotonic()
            if self._is_over:
                break
            before = self._progress
            self._step(batch)
            first_block.finish((self._progress - before) / (1 - before))  # of this run's work
            if int(min(self._progress, 1.0) * CHECKS) > int(before * CHECKS):  # a tenth is done
                self._check_held_out()
            kl = state.curve[-1].held_out_kl
            yield f"step {state.step}, KL {state.train_kl:.3f}, on held-out texts {kl:.3f}"
        if state.step == 0:
            self.listener.note(
                f"--minutes {self.config.minutes} left no time to train: measuring the held-out "
                f"texts once takes {state.check_seconds:.0f} s; give more minutes, or a lower "
                f"--num-held-out"
            )
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)

    def _step(self, batch: Sequence[Tokens]) -> None:
        """Train on one batch."""
        started = time.perf_counter()
        state = self.state
        rate = learning_rate(self.config.learning_rate, self._progress)
        kl = float(self.distillation.compute_gradients(batch))  # waits for the device
        if not math.isfinite(kl):
            raise ConfigError(
                f"the KL became {kl} at a learning rate of up to "
                f"{self.config.learning_rate:.3g}; heal with a lower --learning-rate"
            )
        clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        mean = kl if state.train_kl is None else state.train_kl
        state.train_kl = 0.9 * mean + 0.1 * kl
        state.step += 1
        state.tokens += sum(map(len, batch))
        state.seconds += time.perf_counter() - started

    # --- measurements ---

    def _check_held_out(self) -> None:
        """Measure the KL on the held-out texts, and store the adapter if it is the best so far."""
        started = time.perf_counter()
        state = self.state
        texts: list[Tokens] = []
        for source_texts in self.held_out.values():
            texts += source_texts
        with self.distillation.precision():
            [kl] = self._measure_means(KL, [self.healed], texts)
        if all(kl < point.held_out_kl for point in state.curve):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        seconds = time.perf_counter() - started
        state.check_seconds = max(state.check_seconds, seconds)
        state.seconds = round(state.seconds + seconds, 3)
        point = HealPoint(
            step=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            train_kl=state.train_kl,
            held_out_kl=kl,
        )
        state.curve.append(point)
        self.listener.note(f"step {state.step}: KL {kl:.3f} on held-out texts")

    def _measure_losses(self) -> dict[str, Losses]:
        """Return the next-token losses on the held-out texts, by source, along three paths."""
        losses = {}
        for name, texts in self.held_out.items():
            paths = [self.full, self.plain, self.healed]
            full, plain, healed = self._measure_means(LOSS, paths, texts)
            losses[name] = Losses(full=full, path=plain, healed=healed, num_texts=len(texts))
        return losses

    @torch.no_grad()
    def _measure_means(
        self, objective: str, paths: Sequence[StaticPath], texts: Sequence[Tokens]
    ) -> list[float]:
        """Return the mean KL (`KL`) or next-token loss (`LOSS`) of texts along each path."""
        items = []
        for text in texts:
            if objective == KL:  # the KL is over the prompt, but a request needs a continuation
                request = Request(text, [text[:1]])
            else:
                request = Request(text[:1], [text[1:]])
            items.append(Item(request))
        scorer = PathScorer(self.routed, items, objective, STATE_CACHE_GB)
        objectives = scorer.score(paths).objective  # of each path on each text; larger is better
        return [-fmean(values) for values in objectives]

    # --- saving and resuming ---

    def _save(self) -> None:
        """Save the state of the training, with the weights and the optimiser, for `_resume`."""
        tensors: dict[str, Tensor] = {}
        for number, parameter in enumerate(self.parameters):
            tensors[f"{number} weight"] = parameter.detach().cpu()
            tensors[f"{number} best"] = self.best[number].cpu()
            for part, tensor in self.optimizer.state[parameter].items():
                tensors[f"{number} {part}"] = tensor.cpu()
        self.state.tensors = to_safetensors(tensors)
        self.chunks.put(STATE_KEY, self.state)

    @torch.no_grad()
    def _resume(self) -> None:
        """Load the state that was saved, if there is one."""
        state = self.chunks.get(STATE_KEY, _State)
        if state is None:
            return
        for name, tensor in from_safetensors(state.tensors).items():
            number, _, part = name.partition(" ")
            parameter = self.parameters[int(number)]
            if part == "weight":
                parameter.copy_(tensor)
            elif part == "best":
                self.best[int(number)].copy_(tensor)
            elif tensor.dim() == 0:  # the optimiser's number of steps, which stays on the CPU
                self.optimizer.state[parameter][part] = tensor
            else:
                self.optimizer.state[parameter][part] = tensor.to(parameter.device)
        self.state = state


def learning_rate(peak: float, progress: float) -> float:
    """Return the learning rate at a share of the training: linear warm-up times cosine decay."""
    rise = min(1.0, (progress + 0.001) / WARM_UP)  # above 0 at the first step
    fall = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * rise * fall


def make_batches(
    by_source: Mapping[str, Sequence[Tokens]], config: HealConfig
) -> Iterator[list[Tokens]]:
    """Yield a batch of sequences for each step, without end.

    The same settings and sequences give the same batches. Each source gives the same number of
    sequences, drawn at random. The sequences of a batch have similar lengths, and fit into
    `batch_size` times `max_tokens` tokens.

    Args:
        by_source: Name of a source → its sequences.
        config: The settings.
    """
    random = Random(config.seed)
    max_tokens = config.batch_size * config.max_tokens
    num_per_source = math.ceil(STEPS_AHEAD * config.batch_size / len(by_source))
    while True:
        sequences: list[Tokens] = []
        for source_sequences in by_source.values():
            sequences += random.choices(source_sequences, k=num_per_source)
        lengths = [len(sequence) for sequence in sequences]
        groups = group_by_length(lengths, len(sequences), max_tokens)
        random.shuffle(groups)
        for rows in groups:
            yield [sequences[row] for row in rows]


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
