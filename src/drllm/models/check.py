"""Check that routing a model gives exact results, for `drllm ls architectures --try`.

The model runs in two ways. In the first it is routed, and generates for a padded batch, with a
cache and another plan for each row. In the second it isn't routed, and runs each row alone, without
padding or cache, with a list of layers that is the row's path. All logits are compared. The model
may be a tiny random model of a family in `families.yaml`, or any other model.

Axes: B rows, L layers, T tokens, V vocabulary.
"""

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drllm.errors import ArchitectureError, RoutingError, unknown_name
from drllm.model.down_projections import find_down_projections
from drllm.model.hub import quiet
from drllm.model.layers import find_layers
from drllm.model.path_config import reorder_lists
from drllm.model.prompts import pad_left
from drllm.models.families import COMMON, FAMILIES
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.generate import end_tokens
from drllm.paths import to_path

TOLERANCE = 1e-3
"""The largest difference between two logits that counts as rounding, in standard deviations of the
logits. In float32, rounding made differences of at most 1e-4 in all families and supported versions
(docs/architectures.md). When one row attended to one wrong token, the difference was at least
0.3."""

PROMPT_LENGTHS = (5, 2, 12, 3)
NUM_NEW = 8  # number of tokens generated after each prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of trying a model; differences are in standard deviations of the logits.

    The status is one of:

    - `exact`;
    - `refused`: the model can't be routed;
    - `absent`: not in the installed transformers;
    - `broken`: the plain model gives other logits with padding and a cache than without;
    - `differs`: routing is wrong, a defect of drllm.
    """

    family: str  # the `model_type` of transformers
    class_name: str = ""  # empty if no model was made
    status: str
    reason: str = ""  # why the status isn't `exact`
    # The largest difference of the logits at the ends of the prompts; None if not compared.
    prefill: float | None = None
    # The largest difference of the logits at the tokens decoded with the cache.
    decode: float | None = None
    # Whether a refit can change every layer's MLP; None if that wasn't tried.
    can_be_refitted: bool | None = None
    refit_obstacle: str = ""  # why a layer's MLP can't be refitted

    @property
    def greatest_difference(self) -> float | None:
        """The larger of `prefill` and `decode`."""
        if self.prefill is None or self.decode is None:
            return None
        return max(self.prefill, self.decode)


def make_tiny(family: str, seed: int = 0, attention: str | None = None, **overrides: Any) -> Any:
    """Make a tiny frozen model of a family: 6 layers of width 32, float32, random weights.

    Args:
        family: The `model_type` of transformers.
        seed: The seed of the weights.
        attention: An attention implementation of transformers; None for the default.
        overrides: Settings of the config that differ from the table of families.

    Raises:
        ArchitectureError: The table or the installed transformers doesn't have the family.
    """
    if family not in FAMILIES:
        raise ArchitectureError(unknown_name("family", family, FAMILIES))
    if family not in CONFIG_MAPPING:
        raise ArchitectureError(f"the installed transformers has no {family}; upgrade it")
    values = {**COMMON, **FAMILIES[family], **overrides}
    config = CONFIG_MAPPING[family](**copy.deepcopy(values))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval().requires_grad_(False)


def check_family(family: str) -> CheckResult:
    """Check a tiny model of a family.

    Raises:
        ArchitectureError: The table of families doesn't have the family.
    """
    if family in FAMILIES and family not in CONFIG_MAPPING:
        reason = f"not in transformers {transformers.__version__}"
        return CheckResult(family=family, status="absent", reason=reason)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # synchronising threads would take longer than the work
    try:
        with quiet():
            return check_model(make_tiny(family))
    finally:
        torch.set_num_threads(num_threads)


def check_model(model: Any) -> CheckResult:
    """Check a model in float32. The model must not be routed, and stays unchanged."""
    finding = CheckResult(
        family=model.config.model_type, class_name=type(model).__name__, status="exact"
    )
    with quiet():
        try:
            _, layers = find_layers(model)
            prefill, decode = _compare_routed(model, make_plans(len(layers)))
        except (ArchitectureError, RoutingError) as error:
            return replace(finding, status="refused", reason=str(error))
        finding = _try_refit(replace(finding, prefill=prefill, decode=decode), model)
        if max(prefill, decode) <= TOLERANCE:
            return finding
        is_broken = max(_compare_plain(model)) > TOLERANCE
    if is_broken:
        reason = (
            f"transformers {transformers.__version__} itself gives other logits with padding "
            f"and a cache than without; try another version"
        )
        return replace(finding, status="broken", reason=reason)
    reason = "routed and plain logits differ by more than rounding; please report this model"
    return replace(finding, status="differs", reason=reason)


def _try_refit(finding: CheckResult, model: Any) -> CheckResult:
    """Find out whether the MLP of every layer ends in a linear map that a refit can change."""
    _, layers = find_layers(model)
    try:
        find_down_projections(model, range(len(layers)))
    except ArchitectureError as error:
        return replace(finding, can_be_refitted=False, refit_obstacle=str(error))
    return replace(finding, can_be_refitted=True)


def make_plans(num_layers: int) -> list[list[int]]:
    """Return four plans: skip the first layer, repeat all, mix all decisions, run only the middle.

    A plan must run a layer, so for a model of one layer the first plan runs it.
    """
    skip_first = [1] * num_layers
    if num_layers > 1:
        skip_first[0] = 0
    repeat_all = [2] * num_layers
    mix = list(itertools.islice(itertools.cycle((1, 0, 2)), num_layers))
    only_middle = [0] * num_layers
    only_middle[num_layers // 2] = 1
    return [skip_first, repeat_all, mix, only_middle]


@contextmanager
def replace_layers(model: Any, decisions: Sequence[int]) -> Iterator[None]:
    """Replace a model's list of layers by the layers of a path, inside the block.

    Inside the block the model must give the same results as if it were routed along the path. The
    settings that its config has for single layers, such as the kind of attention, follow the path
    too. The model must not be routed, and must run without a cache: a layer that is listed twice
    would write to the same cache entry twice.
    """
    decoder, layers = find_layers(model)
    name = next(name for name, child in decoder.named_children() if child is layers)
    config = decoder.config
    path = to_path(decisions)
    settings = {"num_hidden_layers": len(path), **reorder_lists(vars(config), path, len(layers))}
    original_settings = {key: getattr(config, key) for key in settings}
    try:
        setattr(decoder, name, nn.ModuleList([layers[index] for index in path]))
        for key, value in settings.items():
            setattr(config, key, value)
        yield
    finally:
        setattr(decoder, name, layers)
        for key, value in original_settings.items():
            setattr(config, key, value)


@dataclass(frozen=True, slots=True)
class _Example:
    """The tokens of a prompt, and of the answer that both models read after it."""

    prompt: list[int]
    answer: list[int]


def _compare_routed(model: Any, plans: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Compare a routed batch with the plain model, which runs each prompt alone along its path.

    Args:
        model: The model, which isn't routed.
        plans: L decisions for each prompt.

    Returns:
        The largest difference at the ends of the prompts, and the largest at the decoded tokens, in
        standard deviations of the logits.
    """
    examples = _make_examples(model)
    expected = []
    for example, plan in zip(examples, plans, strict=True):
        with replace_layers(model, plan):
            expected.append(_read_alone(model, example))
    routed = RoutedModel(model)
    try:
        with routed.fixed(plans):
            logits = _generate_batch(model, examples)
    finally:
        routed.detach()
    return _largest_differences(logits, torch.stack(expected))


def _compare_plain(model: Any) -> tuple[float, float]:
    """Compare a padded batch, decoded with a cache, with each prompt alone, all without routing.

    Returns the same two differences as `_compare_routed`.
    """
    examples = _make_examples(model)
    expected = [_read_alone(model, example) for example in examples]
    return _largest_differences(_generate_batch(model, examples), torch.stack(expected))


def _make_examples(model: Any) -> list[_Example]:
    """Draw random prompts and answers without special tokens, the same in every call."""
    rng = random.Random(0)
    special_tokens = {0, 1, 2, *end_tokens(model.generation_config.eos_token_id)}
    vocab_size = model.config.get_text_config().vocab_size
    tokens = [token for token in range(vocab_size) if token not in special_tokens]
    prompts = [rng.choices(tokens, k=length) for length in PROMPT_LENGTHS]
    return [_Example(prompt, rng.choices(tokens, k=NUM_NEW)) for prompt in prompts]


def _read_alone(model: Any, example: _Example) -> Tensor:
    """Return the logits for an answer's tokens, `[T_new, V]`, from one row without a cache."""
    ids = torch.tensor([[*example.prompt, *example.answer]], device=model.device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(example.prompt) - 1 : -1].float().cpu()


def _generate_batch(model: Any, examples: Sequence[_Example]) -> Tensor:
    """Return the logits for all answers, `[B, T_new, V]`, from a padded batch with a cache."""
    ids, mask = pad_left([example.prompt for example in examples], model.device)
    num_read = ids.shape[1]

    def force_answer(row: int, tokens: Tensor) -> list[int]:
        return [examples[row].answer[len(tokens) - num_read]]

    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(do_sample=False, pad_token_id=0),
        max_new_tokens=NUM_NEW,
        use_cache=True,  # in some models the default is False
        prefix_allowed_tokens_fn=force_answer,  # so that both models read the same tokens
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1).float().cpu()


def _largest_differences(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference at the first new token, and at all later new tokens."""
    difference = ((logits - expected).abs() / expected.std()).amax(dim=(0, 2))  # [T_new]
    return float(difference[0]), float(difference[1:].max())
