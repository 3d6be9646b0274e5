"""How long one training step of `drllm heal` takes, against one written with autograd alone.

Ours: the full path's states of a sequence are kept, so the full path runs once however often the
sequence is drawn; the KL of a few tokens at a time and its gradient are written down.
Theirs: in each step the full path and the student run on the whole batch, and autograd
differentiates the KL of all tokens' distributions.
Both train the same LoRA weights of the same path on the same batches, taking turns in one run; the
gradients are compared. Ours is timed on sequences drawn for the first time, and drawn again.
The bound is the time of the student's layers, there and back, and of the head: for the teacher, for
the student, and back.

    python benchmarks/heal_step.py [--quick] [--json FILE] [--clock cpu] [--model MODEL]
        [--device DEVICE] [--dtype DTYPE] [--without LAYERS] [--batches N] [--repeats N]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import common
import torch
from common import bound, operations
from common.comparison import Comparison
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from drllm.config import HealConfig
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tasks.texts import Tokens
from drllm.tuning.distillation import Distillation, choose_low_precision

QUICK = {"batches": 2, "repeats": 1}
WHOLE = {"batches": 4, "repeats": 3}
WITHOUT = "14,15,16,17,18"
"""The layers that are left out by default: of SmolLM2, five of 30, chosen under repair."""
ROWS = 4
TOKENS = 170  # of a sequence; texts of questions are about as long
ADAPTER = "measured"
TOLERANCE = 2e-3
"""Largest difference of the gradients in float32, as a share of the gradient."""

OURS = "drllm: the teacher's states kept, the KL of a few tokens at a time"
THEIRS = "teacher and student in each step, the KL of all tokens by autograd"


class Steps:
    """Both ways to compute the gradients of a batch.

    Args:
        routed: The model.
        path: The path to train.
        low_precision: The dtype of autocast; None computes in the model's dtype.
    """

    def __init__(
        self, routed: RoutedModel, path: StaticPath, low_precision: torch.dtype | None
    ) -> None:
        self.routed = routed
        self.path = path.with_adapter(ADAPTER)
        self.low_precision = low_precision
        rank = HealConfig().rank
        self.parameters: list[nn.Parameter] = routed.injection.create_lora(
            ADAPTER, rank=rank, alpha=rank, layers=path.layers, seed=0
        )
        for parameter in self.parameters:  # half of them begin at 0, and would get no gradient
            nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(0))

    def make_ours(self) -> Distillation:
        """Return our way, which has kept no states yet."""
        return Distillation(self.routed, self.path, 0, self.parameters, self.low_precision)

    def run_theirs(self, batch: Sequence[Tokens]) -> None:
        """Compute the gradients by the obvious way."""
        ids = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)
        ids = ids.to(self.routed.device)
        lengths = torch.tensor([len(tokens) for tokens in batch])
        is_real = (torch.arange(ids.shape[1]) < lengths[:, None]).to(ids.device)
        for parameter in self.parameters:
            parameter.grad = None
        full = StaticPath(range(self.routed.num_layers))
        enabled = self.low_precision is not None
        with torch.autocast(ids.device.type, self.low_precision, enabled=enabled):
            with torch.no_grad(), self.routed.fixed(full):
                teacher = self.routed(input_ids=ids, use_cache=False).logits[is_real]
            with self.routed.fixed(self.path):
                student = self.routed(input_ids=ids, use_cache=False).logits[is_real]
        kl = F.kl_div(
            student.float().log_softmax(dim=-1),
            teacher.float().log_softmax(dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        kl.backward(inputs=self.parameters)

    def gradient(self) -> Tensor:
        """Return the gradients as one vector."""
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters])


def draw_batches(base: BaseModel, number: int) -> list[list[Tokens]]:
    """Draw batches of random tokens; what the tokens are changes no time."""
    generator = torch.Generator().manual_seed(0)
    size = base.model.config.get_text_config().vocab_size
    batches = []
    for _ in range(number):
        ids = torch.randint(size, (ROWS, TOKENS), generator=generator)
        batches.append([tuple(row) for row in ids.tolist()])
    return batches


def seconds_at_least(base: BaseModel, path: StaticPath, steps: Steps, clock: Any) -> float:
    """Return the time of a step's layers and head, at the speed that this machine has for each."""
    with steps.make_ours().precision():
        seconds = bound.cheapest(base, TOKENS, clock)
    layers = 2 * len(path.layers) * seconds.layers  # forwards, and the gradients of the states
    head = 3 * seconds.head  # the teacher, the student, and the gradients of its states
    return ROWS * TOKENS * (layers + head)


def compare(
    base: BaseModel,
    steps: Steps,
    path: StaticPath,
    batches: Sequence[Sequence[Tokens]],
    repeats: int,
    clock: Any,
) -> dict[str, Any]:
    """Let both ways compute the gradients of all batches, in turns."""
    gradients: dict[str, Tensor] = {}

    def ours() -> dict[str, float]:
        distillation = steps.make_ours()
        seconds = {}
        for draw in ("first", "again"):
            started = clock()
            for batch in batches:
                distillation.compute_gradients(batch)
            seconds[draw] = (clock() - started) / len(batches)
        gradients["ours"] = steps.gradient()
        return seconds

    def theirs() -> dict[str, float]:
        started = clock()
        for batch in batches:
            steps.run_theirs(batch)
        gradients["theirs"] = steps.gradient()
        return {"each": (clock() - started) / len(batches)}

    runs = common.run_in_turns({"ours": ours, "theirs": theirs}, repeats)
    difference = (gradients["ours"] - gradients["theirs"]).norm() / gradients["theirs"].norm()
    if steps.low_precision is None:
        is_other = int(float(difference) > TOLERANCE)
        common.refuse_differences(base, f"gradients, by {float(difference):.1e}", is_other)
    bound_s = seconds_at_least(base, path, steps, clock)
    times = [(run["ours"], run["theirs"]["each"]) for run in runs]
    distillation = steps.make_ours()
    distillation.compute_gradients(batches[0])  # keeps the teacher's states
    again_s = statistics.median(ours["again"] for ours, _ in times)
    run_again = partial(distillation.compute_gradients, batches[0])
    rest = operations.explain_rest(run_again, base, TOKENS, bound_s / again_s)
    return {
        "speedup": {
            draw: statistics.median(each / ours[draw] for ours, each in times)
            for draw in ("first", "again")
        },
        "bound": statistics.median(each / bound_s for _, each in times),
        "seconds": {
            "first": statistics.median(ours["first"] for ours, _ in times),
            "again": again_s,
            "theirs": statistics.median(each for _, each in times),
            "bound": bound_s,
        },
        "rest": rest,
        "largest_difference": float(difference),
        "runs": runs,
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__ or "", "few batches, under a minute")
    common.add_clock(parser)
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--without", default=WITHOUT, help="the layers to leave out")
    parser.add_argument("--batches", type=int, help="batches of a run")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    clock = common.clock_of(options)
    base = common.base_of(options)
    without = set(map(int, options.without.split(",")))
    path = StaticPath(layer for layer in range(base.num_layers) if layer not in without)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    steps = Steps(routed, path, choose_low_precision(base.model))
    batches = draw_batches(base, sizes["batches"])
    result = compare(base, steps, path, batches, sizes["repeats"], clock)
    seconds = result["seconds"]
    print(
        f"{len(without)} of {base.num_layers} layers out, {ROWS} sequences of {TOKENS} tokens a "
        f"step: {seconds['first']:.2f} s on new sequences (speedup "
        f"{result['speedup']['first']:.2f} over autograd alone, {seconds['theirs']:.2f} s), "
        f"{seconds['again']:.2f} s on sequences drawn again ({result['speedup']['again']:.2f}); "
        f"the gradients differ by {result['largest_difference']:.1e}\n"
        f"  bound {seconds['bound']:.2f} s; share of it reached on sequences drawn again "
        f"{seconds['bound'] / seconds['again']:.0%}"
    )
    figures = {
        **result,
        "ours": OURS,
        "theirs": THEIRS,
        "without": sorted(without),
        "low_precision": str(steps.low_precision),
        **common.describe_run(base, options),
        **sizes,
    }
    comparisons = [
        Comparison("heal: a step on new sequences", result["speedup"]["first"], result["bound"]),
        Comparison(
            "heal: a step on sequences drawn again",
            result["speedup"]["again"],
            result["bound"],
            result["rest"],
        ),
    ]
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
