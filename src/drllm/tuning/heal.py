"""Healing as a stage: a path that leaves layers out gets an adapter, taught by the full path.

Student and teacher are one frozen model: the path with the adapter, and the full path without it.
Only the adapter learns, from the mean KL of their next-token distributions. What is done is kept,
so that a run that is interrupted resumes, and ends with the same adapter.

Axes: B rows, T tokens, D hidden, N real tokens of a batch, V vocabulary.
"""

import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import InitVar, dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import msgspec
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from drllm.config import HealConfig
from drllm.config.fields import changed
from drllm.cost import path_executions
from drllm.errors import ConfigError
from drllm.listener import Listener
from drllm.models.base.devices import on_device
from drllm.models.base.load import BaseModel, resolve_dtype
from drllm.models.base.prompts import Prompt as Conversation
from drllm.models.base.prompts import context_length, encode, render
from drllm.models.healed import save_healed
from drllm.models.routing.adapters import Adapter
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.driver import PathPass
from drllm.models.routing.injection import Driver, LayerCall
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.models.routing.shares import layer_shares
from drllm.models.scoring.batching import batches
from drllm.models.scoring.packing import Request
from drllm.paths import StaticPath, layer_of
from drllm.records.codec import digest_of
from drllm.records.healed import HEALED_FILE, Checked, HealedPath, Losses, read_healed
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer
from drllm.records.resume import Chunks, refuse_other_run
from drllm.records.static_paths import read_path, steps_to_write
from drllm.tasks.base import Task
from drllm.tuning.heal_texts import Source, Tokens, divided, sources_of
from drllm.tuning.judge import Item, Judge, texts_of
from drllm.tuning.parts import KL, LOSS

CHUNKS_FOLDER, TRAINING = "heal.partial", "training"
NAME = "healed"  # of the adapter while it is trained
STEPS, CHECKS = 250, 10
"""Of training, unless a number or a time is given; measurements of the held-out texts in it."""
WARM_UP, MAX_GRAD_NORM = 0.05, 1.0
"""Share of the training in which the learning rate rises; what gradients are clipped to."""
SAVE_SECONDS, MEMORY_GB = 60, 1.0
"""What a kill loses at most; memory for states that paths share where texts are measured."""
LOGITS_AT_ONCE = 2**25
"""Of a distribution over some tokens: 128 MB, and several times that while gradients are made."""
STEPS_AHEAD, ANSWERS_AT_ONCE = 16, 32
"""Steps whose sequences are put into batches together; prompts that are answered together."""


def heal(
    model: Any,
    path: StaticPath | Sequence[StaticPath] | Path | str | None = None,
    tasks: Task | str | Sequence[Task | str] | None = None,
    texts: str | Sequence[str] | None = None,
    config: HealConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> HealedPath:
    """Train an adapter with which a path does what the full path does, and write both.

    The base model stays as it is. What is done is kept; after an interruption the same call
    resumes, and with a number of steps ends with the same adapter.

    Args:
        model: As for `tune`.
        path: A path, or a file as `--path` takes it; None for that of the config. Or several paths,
            such as the routes of trained routers, for one adapter: each step of the training runs
            one of them, drawn at random, and more often one that is given more often. They run with
            the adapter once they have left the full path, as under `RouterPolicy(adapter=...)`.
        tasks: Tasks, their names or files of questions; None for those of the config.
        texts: Texts, or names of files and data sets in one string; None for those of the config.
        config: The settings.
        output_dir: Folder for the healed path; None writes nothing that stays.
        tokenizer: As for `tune`.
        listener: Hears how far it is.
        settings: Settings of `HealConfig` by name, in place of the config's.

    Returns:
        What `path.json` in the folder has: the path or, of several, the commonest, how the KL fell,
        and the losses by source.

    Raises:
        ConfigError: Settings that make no sense, a loss that diverged, or a folder of another run.
        PathError: A path that the model can't run, or that wasn't made for it.
        TaskError: An unknown task, too few texts, or a file that can't be read.

    Source: ours; the adapter is LoRA (arXiv 2106.09685).
    """
    config, listener = changed(HealConfig, config, settings), listener or Listener()
    sources = sources_of(config, tasks, texts)
    paths, file = list[StaticPath](), None
    if path and not isinstance(path, (str, Path)):
        paths = [path] if isinstance(path, StaticPath) else [*path]
    else:
        file = read_path(str(path or config.named_path()))
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        name = "path"
        if file is not None:
            name = file.found.name if file.found else file.file.stem
            paths = [file.path_of(base.identity)]
        plain = Counter(each.check(routed.num_layers).with_adapter("") for each in paths)
        stack.enter_context(only_writer(folder, "healing", "--output-dir"))
        return _Healing(routed, name, plain, sources, config, folder, listener, base).run()


class _State(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How far a training is; what it changes is in the format of safetensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_kl: float | None = None  # a running mean over the last steps
    curve: list[Checked] = []
    tensors: bytes = b""


@dataclass(eq=False)
class _Healing:
    """One run: texts, training, losses."""

    routed: RoutedModel
    name: str
    given: Counter[StaticPath]
    sources: Sequence[Source]
    config: HealConfig
    folder: Path
    listener: Listener
    base: InitVar[BaseModel]

    def __post_init__(self, base: BaseModel) -> None:
        routed, config, L = self.routed, self.config, self.routed.num_layers
        context = context_length(base.model)
        if context and config.max_tokens > context:
            raise ConfigError(
                f"--max-tokens is {config.max_tokens}, and this model reads {context} tokens; give "
                f"at most as many"
            )
        firsts, layers = dict[StaticPath, int](), set[int]()
        several = len(self.given) > 1
        for path, _ in self.given.most_common():
            first = max(config.first_layer, path.departure + 1 if several else 0)
            if own := {layer for layer in map(layer_of, path.steps) if layer >= first}:
                routed.injection.prepare(path)
                firsts[path], layers = first, layers | own
        if not layers and several:
            raise ConfigError(
                f"none of the {len(self.given)} paths runs a layer from --first-layer "
                f"{config.first_layer} on after it has left the full path, so none can have an "
                f"adapter; give other paths, or a lower --first-layer"
            )
        if not layers:
            raise ConfigError(
                f"--first-layer {config.first_layer} leaves no layer that can have an adapter; "
                f"give at most {max(map(layer_of, path.steps))}"
            )
        self.plain = [*firsts]
        commonest, self.counts = self.plain[0], [self.given[path] for path in firsts]
        # A scaling of 1, so that a learning rate means the same at every rank.
        self.adapter = Adapter.fresh(routed, config.rank, config.rank, layers, config.seed)
        routed.add_adapter(NAME, self.adapter)
        self.full = StaticPath(range(L))
        self.paths = [path.with_adapter(NAME, first) for path, first in firsts.items()]
        self.low = _low_precision(base.model) if config.autocast else None
        self.parameters = [each.requires_grad_() for each in self.adapter.parameters()]
        self.best = [each.detach().clone() for each in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)
        self.state = _State()
        shares = layer_shares(routed) if commonest.runs_parts else [(0.5, 0.5)] * L
        self.record = HealedPath(
            **new_manifest("healed_path", model=base.identity, config=config.to_dict()),
            name=self.name,
            steps=steps_to_write(commonest),
            executions=path_executions(commonest, shares),
            num_layers=L,
            first_layer=firsts[commonest],
            others=tuple(map(steps_to_write, self.plain[1:])),
            rank=self.adapter.rank,
            alpha=self.adapter.alpha,
            adapter_sha256="",
            tasks=tuple(source.name for source in self.sources if source.prompts),
            texts=tuple(source.name for source in self.sources if source.texts),
            divided=tuple(source.name for source in self.sources if source.is_divided),
            questions_sha256=digest_of([self.sources]),
            runtime={**base.runtime, "autocast": str(self.low).removeprefix("torch.")},
        )
        identity = _identity(self.record)
        self.chunks = Chunks(self.folder / CHUNKS_FOLDER, identity, stage="healing")

    def run(self) -> HealedPath:
        """Train, or return what an earlier run of the same has written."""
        file = self.folder / HEALED_FILE
        if file.exists():
            found, remedy = read_healed(file), "choose another --output-dir, or delete the old one"
            what = f"the healed path in {file}"
            refuse_other_run(what, _identity(found), _identity(self.record), remedy)
            self.chunks.remove()  # where a kill ended the clean-up
            return found
        self.chunks.open()
        with self.listener.busy("reading the texts"):
            texts = {source.name: self._tokens(source) for source in self.sources}
        size, context = self.config.max_tokens, context_length(self.routed.model)
        for name, own in texts.items():
            if num := sum(len(text) > size for text in own):
                longest = max(map(len, own))
                reads_all = context is None or longest <= context
                self.listener.note(
                    f"{num} of {len(own)} texts of {name} have over {size} tokens and are cut; "
                    f"what follows a cut is trained on without the text before it"
                    + f"; --max-tokens {longest} would cut none"
                    * reads_all
                )
        trained, self.held_out = divided(texts, self.config)
        with self.listener.progress("healing", "") as on_progress:
            self._resume()
            for told in self._train(trained):
                on_progress(min(self._progress, 1.0), 1.0, told)
            on_progress(1.0, 1.0)
        with self.listener.busy("measuring the losses by source"):
            paths = [[self.full] * len(self.paths), self.plain, self.paths]
            means = {name: self._means(LOSS, paths, t) for name, t in self.held_out.items()}
            losses = {
                n: Losses(full=a, path=b, healed=c, num_texts=len(self.held_out[n]))
                for n, (a, b, c) in means.items()
            }
            changes = {"curve": tuple(self.state.curve), "held_out": losses}
            record = msgspec.structs.replace(self.record, **changes)
            found = save_healed(self.folder, record, self.adapter, self.routed)
        self.chunks.remove()
        return found

    def _tokens(self, source: Source) -> list[Tokens]:
        """Return the texts of a source, questions with their answers."""
        if source.texts:
            return [tuple(encode(self.routed.tokenizer, text)) for text in source.texts]
        if not source.is_open:
            items = (item.question for item in texts_of(self.routed, source.prompts))
            return [(*item.context, *item.continuations[0]) for item in items]
        found: list[Tokens] = []
        asked = [prompt.content for prompt in source.prompts]
        for start in range(0, len(asked), ANSWERS_AT_ONCE):
            answer = partial(self._answered, asked[start : start + ANSWERS_AT_ONCE])
            key = f"{source.name} answers from {start}"
            found += self.chunks.once(key, list[Tokens], answer)
        return found

    def _answered(self, prompts: Sequence[Conversation]) -> list[Tokens]:
        """Return prompts with the answers that the full path gives."""
        answers = generate_many(self.routed, prompts, max_new_tokens=self.config.max_tokens)
        tokenizer = self.routed.tokenizer
        texts = [encode(tokenizer, render(tokenizer, prompt, chat=True)) for prompt in prompts]
        return [(*text, *answer.tokens) for text, answer in zip(texts, answers, strict=True)]

    def _drawn(self, seed: str) -> int:
        """Draw one of the paths, the same one for the same seed."""
        return Random(seed).choices(range(len(self.paths)), self.counts)[0]

    @property
    def _progress(self) -> float:
        """The share of the training that is done."""
        steps, minutes = self.config.steps, self.config.minutes
        done = 0.0 if minutes is None else self.state.seconds / (60 * minutes)
        steps = STEPS if steps is None and minutes is None else steps
        return done if steps is None else max(done, self.state.step / steps)

    @property
    def _is_over(self) -> bool:
        kls = [check.held_out_kl for check in self.state.curve]
        waited = len(kls) - 1 - kls.index(min(kls))
        return self._progress >= 1 or waited >= self.config.patience

    def _train(self, texts: Mapping[str, Sequence[Tokens]]) -> Iterator[str]:
        """Train to the end, and say after each step how it went."""
        state, saved = self.state, 0.0
        if not state.curve:
            self._check()
        for tokens in itertools.islice(batches_of(texts, self.config), state.step, None):
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            if self._is_over:
                break
            started, before = time.perf_counter(), self._progress
            path = self.paths[self._drawn(f"{self.config.seed} step {state.step}")]
            kl = self._step(tokens, self._rate(before), path)
            state.step, state.tokens = state.step + 1, state.tokens + sum(map(len, tokens))
            state.train_kl = 0.9 * (kl if state.train_kl is None else state.train_kl) + 0.1 * kl
            state.seconds += time.perf_counter() - started
            if int(min(self._progress, 1.0) * CHECKS) > int(before * CHECKS):
                self._check()
            last = state.curve[-1].held_out_kl
            yield f"step {state.step}, KL {state.train_kl:.3f}, on held-out texts {last:.3f}"
        with torch.no_grad():
            for weight, kept in zip(self.parameters, self.best, strict=True):
                weight.copy_(kept)

    def _rate(self, progress: float) -> float:
        """Return the learning rate: a line up, then half a cosine."""
        rise, fall = min(1.0, (progress + 0.001) / WARM_UP), 1 + math.cos(math.pi * progress)
        return self.config.learning_rate * rise * 0.5 * fall

    def _step(self, tokens: Sequence[Tokens], rate: float, path: StaticPath) -> float:
        """Learn from a batch, and return its mean KL before."""
        teacher, student = self._states(tokens, path)
        ends = student.detach().requires_grad_()
        # Of the tokens of a part there are logits at once; each has a place in the model's context.
        size = max(1, LOGITS_AT_ONCE // self.routed.config.get_text_config().vocab_size)
        size = min(size, context_length(self.routed.model) or size)
        kls: list[Tensor] = []
        for start in range(0, len(ends), size):
            known, own = (states[start : start + size] for states in (teacher, ends))
            with torch.no_grad():
                wanted = self._logits(known).log_softmax(dim=-1)
            ours = self._logits(own).log_softmax(dim=-1)  # [n, V]
            kl = F.kl_div(ours, wanted, reduction="sum", log_target=True) / len(ends)
            kl.backward(inputs=[ends])  # type: ignore[no-untyped-call]
            kls.append(kl.detach())
        total = float(sum(kls))  # read once a step, since the host waits for the device here
        if not math.isfinite(total):
            raise ConfigError(
                f"the KL became {total} at a learning rate of up to "
                f"{self.config.learning_rate:.3g}; heal with a lower --learning-rate"
            )
        self.optimizer.zero_grad()
        student.backward(ends.grad, inputs=self.parameters)  # type: ignore[no-untyped-call]
        clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return total

    def _states(self, tokens: Sequence[Tokens], path: StaticPath) -> tuple[Tensor, Tensor]:
        """Return the last states of all real tokens along the full path and a path, `[N, D]`."""
        # Padded behind, where causal attention lets no real token see it: no mask is needed.
        rows = [torch.tensor(each) for each in tokens]
        ids = on_device(pad_sequence(rows, batch_first=True), self.routed.device)  # [B, T]
        lengths = torch.tensor([len(row) for row in rows])
        places = (torch.arange(int(max(lengths))) < lengths[:, None]).flatten().nonzero()[:, 0]
        pairs = zip(self.full.steps, path.steps, strict=False)
        same = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
        teacher = KeptStates(self.full)
        with torch.no_grad():
            self._run(self.routed.injection.decoder, teacher, ids)
        student = KeptStates(path, teacher.states[same - 1] if same else None, same)
        self._run(self.routed.injection.decoder, student, ids)
        ends = (each.states[-1].flatten(0, 1) for each in (teacher, student))
        full, ours = (states.index_select(0, on_device(places, states.device)) for states in ends)
        return full, ours

    def _logits(self, states: Tensor) -> Tensor:
        """Return the logits `[N, V]` that the model's own norm and head make of last states."""
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self.routed.device)
        ending = KeptStates(self.full, states[None], len(self.full.steps))
        logits: Tensor = self._run(self.routed.model, ending, ids).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _run(self, module: Any, driver: Driver, ids: Tensor) -> Any:
        with self._precision(), self.routed.injection.driven_by(driver):
            return module(input_ids=ids, use_cache=False)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.routed.device.type, self.low) if self.low else nullcontext()

    def _check(self) -> None:
        """Measure the held-out texts, and keep the adapter if it is the best so far."""
        started, state = time.perf_counter(), self.state
        texts = [*itertools.chain(*self.held_out.values())]
        with self._precision():
            [kl] = self._means(KL, [self.paths], texts)
        if all(kl < check.held_out_kl for check in state.curve):
            self.best = [each.detach().clone() for each in self.parameters]
        state.seconds = round(state.seconds + time.perf_counter() - started, 3)
        known = {name: getattr(state, name) for name in ("step", "tokens", "seconds", "train_kl")}
        state.curve.append(Checked(**known, held_out_kl=kl))
        self.listener.note(f"step {state.step}: KL {kl:.3f} on held-out texts")

    @torch.no_grad()
    def _means(
        self, what: str, systems: Sequence[Sequence[StaticPath]], texts: Sequence[Tokens]
    ) -> list[float]:
        """Return the mean KL or next-token loss of texts, each along one drawn path of a system."""
        num = 1 if what == LOSS else None  # tokens before what is scored
        by_path: dict[int, list[Item]] = {}
        for place, text in enumerate(texts):
            item = Item(Request(text[:num], [text[1:] if num else text[:1]]))
            by_path.setdefault(self._drawn(f"held out {place}"), []).append(item)
        losses: list[list[float]] = [[] for _ in systems]
        for path, items in by_path.items():
            judge = Judge(self.routed, items, what, MEMORY_GB)
            found = judge.scores([system[path] for system in systems]).objective
            for own, scores in zip(losses, found, strict=True):
                own += [-float(score) for score in scores]
        return [fmean(own) for own in losses]

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for number, (weight, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            parts = {"weight": weight.detach(), "best": best, **self.optimizer.state[weight]}
            tensors |= {f"{number} {part}": each.cpu() for part, each in parts.items()}
        self.state.tensors = to_safetensors(tensors)
        self.chunks.put(TRAINING, self.state)

    @torch.no_grad()
    def _resume(self) -> None:
        state = self.chunks.get(TRAINING, _State)
        if state is None:
            return
        for name, tensor in from_safetensors(state.tensors).items():
            number, _, part = name.partition(" ")
            weight, best = self.parameters[int(number)], self.best[int(number)]
            if part in ("weight", "best"):
                (weight if part == "weight" else best).copy_(tensor)
            else:  # of the optimiser, which counts its steps on the CPU
                place = weight.device if tensor.dim() else tensor.device
                self.optimizer.state[weight][part] = tensor.to(place)
        self.state = state


def _identity(record: HealedPath) -> dict[str, Any]:
    """Return what must be equal for two runs to be the same one."""
    return {
        "settings": HealConfig(**record.config).decisive(),
        "model": record.model,
        "runtime": record.runtime,
        "path": record.steps,
        "others": record.others,
        "texts_sha256": record.questions_sha256,
    }


class KeptStates(PathPass):
    """Runs a path, or what is left of it from a state on, and keeps the state by layer."""

    def __init__(self, path: StaticPath, start: Tensor | None = None, num_run: int = 0) -> None:
        super().__init__(path)
        self.start, self.states = start, list[Tensor]()
        del self._left[len(self._left) - num_run :]

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the steps that can be run now, `[B, T, D]` to `[B, T, D]`."""
        if self.start is not None and not call.index:
            hidden = self.start
        self.states.append(super().layer(call, hidden))
        return self.states[-1]


def batches_of(
    by_source: Mapping[str, Sequence[Tokens]], config: HealConfig
) -> Iterator[list[Tokens]]:
    """Yield the sequences of each step, without end: the same for the same settings and texts.

    Each source gives as many, drawn at random. Those of a batch are of like length, as many as fit
    into `batch_size` times `max_tokens` tokens.
    """
    random, size = Random(config.seed), config.batch_size * config.max_tokens
    num = -(-STEPS_AHEAD * config.batch_size // len(by_source))
    while True:
        ahead = [text for texts in by_source.values() for text in random.choices(texts, k=num)]
        found = batches([len(text) for text in ahead], len(ahead), size)
        random.shuffle(found)
        yield from ([ahead[row] for row in rows] for rows in found)


def _low_precision(model: Any) -> torch.dtype | None:
    """Return in what float32 weights may compute faster on their device; None where in nothing."""
    is_native = resolve_dtype("auto", model.device) == torch.bfloat16
    if model.device.type == "cpu":  # without instructions for it slower; older torch can't tell
        is_native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if is_native and model.dtype == torch.float32 else None
