"""What the questions to test give, each along a path of its own."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from common.compare import ACCURACY
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.depth_control import find_depth_bias
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.healed import HealedPath
from drllm.records.static_paths import PathFile
from drllm.tuning.objectives import GOLD, LOSS
from drllm.tuning.path_scorer import make_items, make_text_items, score_paths

STATE_CACHE_GB = 1.0
CALIBRATED_ON = 64
"""Questions of `select` on which a depth is found."""
GOLD_LOG_PROBABILITY = "gold log-probability"
TEXT_LOSS = "loss of texts"

Values = dict[str, list[float]]
Plans = Sequence[StaticPath]


class QuestionSet:
    """Questions with options, of which the first few are read as texts too."""

    def __init__(self, routed: RoutedModel, prompts: Sequence[Any], num_texts: int = 0) -> None:
        self.routed = routed
        self.items = make_items(routed, prompts, GOLD)
        self.prompts = [list(item.request.context) for item in self.items]
        self.texts = make_text_items(routed, prompts[:num_texts])
        self.num_texts = len(self.texts)

    def evaluate(self, plans: Plans) -> Values:
        """Return what each question gives along its own path."""
        num = len(plans)
        values: Values = {ACCURACY: [0.0] * num, GOLD_LOG_PROBABILITY: [0.0] * num}
        if self.num_texts:
            values[TEXT_LOSS] = [0.0] * self.num_texts
        places_of: dict[StaticPath, list[int]] = {}
        for place, path in enumerate(plans):
            places_of.setdefault(path, []).append(place)
        for path, places in places_of.items():
            items = [self.items[place] for place in places]
            scores = score_paths(self.routed, items, [path], GOLD, STATE_CACHE_GB)
            results = zip(places, scores.right[0], scores.objective[0], strict=True)
            for place, right, gold in results:
                values[ACCURACY][place] = right
                values[GOLD_LOG_PROBABILITY][place] = gold
            self._read_texts(path, places, values)
        return values

    def _read_texts(self, path: StaticPath, places: Sequence[int], values: Values) -> None:
        """Fill in the loss of those questions that are read as texts too."""
        read = [place for place in places if place < self.num_texts]
        if not read:
            return
        texts = [self.texts[place] for place in read]
        scores = score_paths(self.routed, texts, [path], LOSS, STATE_CACHE_GB)
        for place, value in zip(read, scores.objective[0], strict=True):
            values[TEXT_LOSS][place] = -value


def tokens_of(routed: RoutedModel, prompts: Sequence[Any]) -> list[list[int]]:
    """Return what the model reads of prompts with options, without the options."""
    return [list(item.request.context) for item in make_items(routed, prompts, GOLD)]


def depth_bias_of(
    routed: RoutedModel,
    routers: RouterStack,
    prompts: Sequence[Sequence[int]],
    executions: float | None,
) -> float:
    """Return the depth bias that brings prompts to a mean number of executions; 0 for None."""
    if executions is None:
        return 0.0
    return find_depth_bias(routed, prompts, executions, routers=routers).depth_bias


def executions_of(path: StaticPath) -> int:
    """Return how many layers a path runs."""
    return len(path.layers)


def mean_executions(plans: Plans) -> float:
    """Return how many layers the paths run on average."""
    return fmean(map(executions_of, plans))


def hash_path(path: PathFile) -> str:
    """Return the hash of a path: of its adapter too, if it is healed."""
    adapter = path.record.adapter_sha256 if isinstance(path.record, HealedPath) else ""
    return hash_values([path.static, path.decisions, path.skipped, adapter])
