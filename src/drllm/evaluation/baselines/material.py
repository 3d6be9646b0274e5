"""What baselines are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from drllm.paths import Path
from drllm.records import SearchRecord, SupervisionRecord

if TYPE_CHECKING:
    from drllm.models.routing.routed_model import RoutedModel
    from drllm.models.scoring.packing import Question

PathMeasure: TypeAlias = Callable[[Sequence[Path]], list[float]]
"""Returns how good each of several candidates, decisions or paths, is; the larger the better."""


@dataclass(frozen=True)
class Material:
    """What baselines may be fitted on, never what is reported on.

    Attributes:
        routed: The model with its routers.
        prompts: Token ids of each calibration prompt, `[N]`.
        questions: The same questions with their options; empty if answers are generated.
        golds: The right option of each question.
        search: The search log of the training questions; empty if not given.
        targets: The routers' own targets; empty if not given.
        seed: Of what is trained.
    """

    routed: RoutedModel
    prompts: Sequence[Sequence[int]]
    questions: Sequence[Question] = ()
    golds: Sequence[int] = ()
    search: Sequence[SearchRecord] = ()
    targets: Sequence[SupervisionRecord] = ()
    seed: int = 0
