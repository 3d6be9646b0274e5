"""The training of a path's adapter: its state, a step, a check, and when it is over.

The loss is the mean KL between the next-token distributions of the path and of the full path (see
`distillation`). A *check* measures the KL on the held-out texts. The adapter of the check with the
lowest KL is the result.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from random import Random

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from drllm.config import HealConfig
from drllm.errors import ConfigError
from drllm.model.batching import group_by_length
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.healed import HealPoint
from drllm.statistics.ranges import Amount, Count
from drllm.tuning.distillation import Distillation
from drllm.tuning.heal_checks import measure_kl
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.kept_tensors import KeptTensors
from drllm.work.store import ResultStore

STATE_KEY = "training"  # the key under which the state is kept
STEPS = 250  # training steps, unless a number or a time is given
PATIENCE = 3  # the training ends after this many checks in a row without a lower KL
EARLIEST_STOP = 0.5  # but not before this share of it, while the learning rate is high
CHECKS = 10  # the number of checks in a training, besides the check before the first step
WARM_UP = 0.05  # share of the training in which the learning rate rises
MAX_GRAD_NORM = 1.0
STEPS_AHEAD = 16  # the sequences of this many steps are drawn, and sorted into batches, together


class TrainingState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The state of a training, as it is kept for a resumed run."""

    step: Count = 0  # steps done
    tokens: Count = 0  # tokens trained on
    seconds: Amount = 0.0  # duration of the training and of all measurements
    check_seconds: Amount = 0.0  # duration of the last check
    train_kl: float | None = None  # a running mean over the last steps
    curve: list[HealPoint] = []  # one point for each check
    tensors: KeptTensors | None = None  # parameters and optimiser; set by `save`


class AdapterTraining:
    """The training of an adapter that is in the model.

    Args:
        routed: The model.
        healed: The path with the adapter.
        first_layer: The lowest layer that the adapter changes, by LoRA or a refit.
        parameters: The adapter's weights.
        config: The settings.
        low_precision: A dtype for autocast; None computes in the model's dtype.

    Attributes:
        state: The state so far.
        best: The weights at the check with the lowest KL so far.
    """

    def __init__(
        self,
        routed: RoutedModel,
        healed: StaticPath,
        first_layer: int,
        parameters: Sequence[nn.Parameter],
        config: HealConfig,
        low_precision: torch.dtype | None,
    ) -> None:
        self.routed = routed
        self.healed = healed
        self.parameters = parameters
        self.config = config
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        self.distillation = Distillation(routed, healed, first_layer, parameters, low_precision)
        self.state = TrainingState()
        self.loss_seconds = 0.0  # to measure the losses after the training
        self._step_seconds = 0.0  # duration of the last step
        self._last_time = time.perf_counter()  # up to here `state.seconds` counts
        self.best = [parameter.detach().clone() for parameter in parameters]

    @property
    def progress(self) -> float:
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
            share = max(share, self._share_of_time(self.state.seconds))
        return share

    def _share_of_time(self, seconds: float) -> float:
        """Return some seconds as a share of the time for the training.

        The measurements after the training, a check and the losses, are in the time limit too.
        """
        assert self.config.minutes is not None
        training_seconds = 60 * self.config.minutes - self.state.check_seconds - self.loss_seconds
        return 1.0 if training_seconds <= 0 else seconds / training_seconds

    @property
    def has_time(self) -> bool:
        """Whether there is time for at least half of another step."""
        if self.config.minutes is None:
            return True
        return self._share_of_time(self.state.seconds + self._step_seconds / 2) < 1

    def count_measurement(self, seconds: float, loss_seconds: float) -> None:
        """Count a measurement before the training.

        Args:
            seconds: How long it took.
            loss_seconds: How long the measurement after the training takes.
        """
        self.state.seconds += seconds
        self.loss_seconds = loss_seconds

    def _count_time(self) -> None:
        """Add the time since the last call to `state.seconds`, whatever was done in it."""
        now = time.perf_counter()
        self.state.seconds += now - self._last_time
        self._last_time = now

    @property
    def num_parts_done(self) -> int:
        """How many of the `CHECKS` parts of the training are done."""
        return int(min(self.progress, 1.0) * CHECKS)

    def describe(self) -> str:
        """Describe the last step."""
        kl = self.state.curve[-1].held_out_kl
        return f"step {self.state.step}, KL {self.state.train_kl:.3f}, on held-out texts {kl:.3f}"

    @property
    def is_over(self) -> bool:
        """Whether the training is complete, or too many checks in a row show no lower KL."""
        kls = [point.held_out_kl for point in self.state.curve]
        best_check = kls.index(min(kls))
        num_checks_since = len(kls) - 1 - best_check
        if self.progress >= 1 or not self.has_time:
            return True
        # After a good repair, the KL may rise until the learning rate falls.
        return self.progress >= EARLIEST_STOP and num_checks_since >= PATIENCE

    @property
    def is_checked(self) -> bool:
        """Whether the present weights were measured on the held-out texts."""
        return self.state.curve[-1].step == self.state.step

    def step(self, batch: Sequence[Tokens]) -> None:
        """Train on one batch.

        Raises:
            ConfigError: The loss diverged.
        """
        state = self.state
        seconds_before = state.seconds
        rate = learning_rate(self.config.learning_rate, self.progress)
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
        self._count_time()
        self._step_seconds = state.seconds - seconds_before

    def check(self, texts: Sequence[Tokens]) -> HealPoint:
        """Measure the KL on the held-out texts, and copy the weights if they are the best so far.

        Returns the new point of the curve.
        """
        self._count_time()
        state = self.state
        seconds_before = state.seconds
        with self.distillation.precision():
            kl = measure_kl(self.routed, self.healed, texts)
        if all(kl < point.held_out_kl for point in state.curve):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        self._count_time()
        state.check_seconds = state.seconds - seconds_before
        point = HealPoint(
            step=state.step,
            tokens=state.tokens,
            seconds=round(state.seconds, 3),
            train_kl=state.train_kl,
            held_out_kl=kl,
        )
        state.curve.append(point)
        return point

    @torch.no_grad()
    def use_best(self) -> None:
        """Give the adapter the weights of the check with the lowest KL."""
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)

    def save(self, store: ResultStore) -> None:
        """Keep the state, with the weights and the optimiser, for `resume`."""
        self._count_time()
        tensors: dict[str, Tensor] = {}
        for number, parameter in enumerate(self.parameters):
            tensors[f"{number} weight"] = parameter
            tensors[f"{number} best"] = self.best[number]
            for part, tensor in self.optimizer.state[parameter].items():
                tensors[f"{number} {part}"] = tensor
        self.state.tensors = KeptTensors.pack(tensors)
        store.put(STATE_KEY, self.state)

    @torch.no_grad()
    def resume(self, store: ResultStore) -> None:
        """Load the state that was kept, if there is one."""
        state = store.get(STATE_KEY, TrainingState)
        if state is None or state.tensors is None:
            return
        for name, tensor in state.tensors.unpack().items():
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


def draw_batches(
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
