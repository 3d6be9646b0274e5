"""Temperature scaling: how far routers' probabilities can be believed, and what mends it best.

A temperature T divides all logits of a stack, so no decision changes unless depth control is used,
which sets a price against the logits, or blends probabilities. One T for all layers, not one each:
of a layer's few hundred held-out decisions nearly all execute, so that its own T would be noise;
and one T keeps the order in which a depth bias reaches the layers.

Axes: M decisions (held-out examples times layers), L layers, C = 3 decisions.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from drllm.bisection import bisect
from drllm.models.routers.stack import RouterStack
from drllm.records.layers import Calibration
from drllm.training.features import parts_of
from drllm.training.trainer import Trainer

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures beyond these aren't taken: where every held-out decision is right, 0 would fit best,
and where none of them is, infinity."""
BINS = 15


def measure(routers: RouterStack, trainer: Trainer) -> Calibration | None:
    """Compare what routers say of the held-out examples with their targets.

    Class weights and the focal exponent play no part in it, as in routing. The
    routers are on the CPU; where the trainer has held nothing out, None is returned.
    """
    if not trainer.held_out:
        return None
    examples = trainer.examples
    with torch.no_grad():
        parts = [
            routers(examples.rows(rows).float(), examples.filled[rows])
            for rows in parts_of(trainer.held_out)
        ]
    said = torch.cat(parts).double().flatten(0, 1)  # [M, C]
    wanted = trainer.targets[trainer.held_out].flatten(0, 1)  # [M, C]
    temperature = fit_temperature(said, wanted)
    if trainer.config.calibrate and temperature in (LOWEST, HIGHEST):
        logger.warning(
            "the temperature that fits the held-out targets best lies beyond %g; they are too few, "
            "or the routers decide all of them alike",
            temperature,
        )
    found: dict[str, Any] = {}
    for when, logits in (("before", said), ("after", said / temperature)):
        confidence, decided = logits.softmax(dim=-1).max(dim=-1)
        hits = wanted.gather(-1, decided[:, None])[:, 0]
        found[f"ece_{when}"] = calibration_error(confidence, hits)
        found[f"nll_{when}"] = float(-(wanted * logits.log_softmax(dim=-1)).sum(dim=-1).mean())
    return Calibration(temperature=temperature, num_decisions=len(said), bins=BINS, **found)


def fold(routers: RouterStack, temperature: float) -> None:
    """Divide what routers will say by a temperature, in their last layer's weights."""
    with torch.no_grad():
        routers.decision_weight.div_(temperature)
        routers.decision_bias.div_(temperature)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature at which logits give targets (both `[M, C]`) the largest likelihood.

    The mean log-likelihood is concave in 1/T, so its slope, E_target[z] − E_p[z], has one zero,
    which is bisected; the same logits give the same digits. It is from `LOWEST` to `HIGHEST`, the
    nearer one where the best lies beyond; 1 where no temperature is better, all logits of each
    decision being equal.

    Source: Guo et al. 2017 (arXiv 1706.04599), section 4.2.
    """
    behind = (targets * logits).sum(dim=-1, keepdim=True) - logits  # [M, C]

    def is_too_hot(log_temperature: float) -> bool:
        # Summed over differences, which are 0 at a label, a slope that is all but 0 keeps its sign.
        share = (logits / math.exp(log_temperature)).softmax(dim=-1)
        return bool((share * behind).sum() >= 0)

    if bool((logits == logits[:, :1]).all()):
        return 1.0
    low, high = math.log(LOWEST), math.log(HIGHEST)
    if is_too_hot(low):
        return LOWEST
    if not is_too_hot(high):
        return HIGHEST
    _, high = bisect(is_too_hot, low, high)
    return math.exp(high)


def calibration_error(confidence: Tensor, hits: Tensor) -> float:
    """Return the expected calibration error, the mean |confidence − hits| of `BINS` bins at most.

    Bins are of equal mass; decisions of exactly equal confidence count as hit in their common
    share. Confidence `[M]` is the probability of what was decided; hits `[M]` are 1 where that is
    the target, else 0.

    Source: Naeini et al. 2015; Nixon et al. 2019 (arXiv 1904.01685) for equal mass; sharing ties
        is ours.
    """
    values, order = confidence.double().sort()
    hit = torch.cat([values.new_zeros(1), hits[order].double().cumsum(dim=0)])  # [M + 1]
    start, end = torch.searchsorted(values, values), torch.searchsorted(values, values, right=True)
    shared = (hit[end] - hit[start]) / (end - start)  # [M], by confidence
    num_bins = min(BINS, len(values))
    parts = zip(values.tensor_split(num_bins), shared.tensor_split(num_bins), strict=True)
    gaps = sum(len(sure) * abs(float(sure.mean()) - float(hit.mean())) for sure, hit in parts)
    return gaps / len(values)
