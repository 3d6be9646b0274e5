"""A routed model as lm-evaluation-harness knows models: `--model drllm`.

Axes: P prompts, L layers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from drllm.config import DepthConfig, ModelConfig
from drllm.config.fields import changed
from drllm.errors import CheckpointError, ConfigError, RoutingError, unknown_name
from drllm.evaluation.lm_eval.prefix import CommonPrefix
from drllm.evaluation.lm_eval.scoring import (
    HarnessRequest,
    OptionScore,
    RequestScorer,
    fitted,
    without_padding,
)
from drllm.listener import quiet
from drllm.models.base.load import BaseModel, load
from drllm.models.healed import load_path
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routers.depth_control import encode_calibration, make_policy, read_calibration
from drllm.models.routers.files import CONFIG_FILE, find_routers
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import PathPolicy, Policy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.routing.shares import executions_along
from drllm.models.scoring.batching import MemoryBatcher, PathSize
from drllm.paths import Decisions
from drllm.processes import PATIENCE, launched
from drllm.records.static_paths import read_path

MAX_ROWS = 64  # as the harness' `max_batch_size`
PASSED_ON = (
    *("add_bos_token", "prefix_token_id", "truncation"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)
"""Arguments of the harness' own class that keep their meaning."""
PUBLISHED = "is_static_routing"  # the published name of `static_routing`
DEPTH = (*(each.name for each in dataclasses.fields(DepthConfig)), PUBLISHED)
LOADING = ("dtype", "revision", "trust_remote_code", "attn_implementation")
FIXED = "give a fixed plan (path=FILE, or static_routing=true)"


@register_model("drllm")
class RoutedLM(HFLM):  # type: ignore[misc]
    """A base model under routing.

    All continuations of a question follow one copy of its context, and the routers read
    that context alone: one route for each question. Without routers and without a plan every
    layer is executed once, and all numbers are those of the harness' `hf` model.

    Args:
        pretrained: A base model (alias, hub id or folder), or a folder of routers, which names
            its base. From Python also a `BaseModel`.
        routers: With a base model: its routers, a folder or a hub id; from Python also routers.
        base: With a folder of routers: the base model, where its config names none that is here.
        num_windows: Windows W of the routers; a check, since trained routers can't change it.
        path: FILE or FILE:NAME, a static path that is run whatever the prompt, see `read_path`.
        device: auto, cpu, cuda, cuda:1, mps. Of several processes each takes its own.
        batch_size: Rows a pass, as the harness has it; a question with all its continuations is
            one. `auto` goes by memory.
        max_batch_size: Maximum rows a pass with `auto`.
        max_length: Maximum tokens read; the model's own context length unless given.
        others: Settings of `DepthConfig` and of `ModelConfig` by name (`DEPTH` and `LOADING`), and
            arguments of the harness' `HFLM` that keep their meaning (`PASSED_ON`).

    Raises:
        ConfigError: An argument that there isn't, or that has no effect.
        CheckpointError: Routers of another model, or with other windows.
        ModelError: A base model that can't be had.

    Source: ours; lm-evaluation-harness' `HFLM` (docs/differences.md, D-27).
    """

    def __init__(
        self,
        pretrained: str | BaseModel,
        *,
        routers: str | RouterStack | None = None,
        base: str | None = None,
        num_windows: int | None = None,
        path: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = MAX_ROWS,
        max_length: int | None = None,
        **others: Any,
    ) -> None:
        for name in others:
            if name not in (known := (*DEPTH, *LOADING, *PASSED_ON)):
                known = (*known, *signature(RoutedLM).parameters)
                raise ConfigError(unknown_name("model argument", name, known))
        batch_size = 1 if batch_size is None else batch_size
        if not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", str(batch_size)):
            raise ConfigError(f"--batch_size is '{batch_size}'; give auto or a number from 1")
        knobs = {name: others.pop(name) for name in DEPTH if name in others}
        if knobs.pop(PUBLISHED, False):
            knobs["static_routing"] = True
        depth = changed(DepthConfig, None, knobs)
        depth.knob()
        stack, source, named = _routers_and_base(pretrained, routers, base)
        if num_windows is not None and stack is None:
            raise ConfigError(
                f"num_windows={num_windows} needs routers, and pretrained={pretrained} is no "
                f"folder of routers{_not_there(pretrained)}; give their folder, or leave "
                f"num_windows out"
            )
        own = num_windows if stack is None else stack.config.num_windows
        if num_windows not in (None, own):
            raise CheckpointError(
                f"num_windows is {num_windows}, but these routers were trained with {own}; give "
                f"num_windows={own}, or leave it out"
            )
        accelerator = None
        if launched() > 1 and not isinstance(pretrained, BaseModel):
            # Each process takes a device of its own, or all the CPU, where that is asked for.
            accelerator = Accelerator(
                cpu=device == "cpu" or not torch.cuda.is_available(),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        loading = {name: others.pop(name) for name in LOADING if name in others}
        loaded = pretrained
        if not isinstance(loaded, BaseModel):
            loading |= {"model": source, "revision": loading.get("revision") or named}
            loading["device"] = str(accelerator.device) if accelerator else device or "auto"
            loaded = load(changed(ModelConfig, None, loading))
        with quiet("lm_eval.models.huggingface"):  # it warns of a model that is loaded already
            super().__init__(
                loaded.model,
                tokenizer=loaded.tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size or MAX_ROWS,
                max_length=max_length,
                trust_remote_code=loading.get("trust_remote_code", False),
                **others,
            )
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        self.base = loaded
        self.routed = RoutedModel(loaded.model, stack, tokenizer=loaded.tokenizer)
        self.routers_source = None if stack is None else str(routers or pretrained)
        self.path_source: str | None = None
        self.policy = self._policy(depth, path)
        sizes = self.max_length, self.batch_size, self.max_batch_size
        self.scorer = RequestScorer(self.routed, *sizes)
        self.shared_counts = self.scorer.counts
        self._contexts: list[str] = []
        # Which policy decides on the answers to a batch's prompts.
        self.policy_of: Callable[[list[str]], Policy] = lambda _contexts: self.policy
        self.generated_routes: dict[str, Decisions] = {}
        self._prefix = CommonPrefix(self.routed)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "RoutedLM":
        """Make a model of `--model_args` and of the harness' flags (batch sizes, device)."""
        for name in ("batch_size", "max_batch_size", "device"):
            if name in arg_dict:
                raise ConfigError(
                    f"{name}={arg_dict[name]} is no model argument; give --{name} {arg_dict[name]}"
                )
        if "pretrained" not in arg_dict:
            raise ConfigError(
                "no model is named; give --model_args pretrained=NAME: a folder of routers, or a "
                "base model (alias, hub id or folder)"
            )
        flags = {name: value for name, value in (additional_config or {}).items() if value}
        return cls(**{**arg_dict, "pretrained": str(arg_dict["pretrained"])}, **flags)

    def _policy(self, depth: DepthConfig, path: str | None) -> Policy:
        if path is not None:
            if other := "routers" if self.routed.routers is not None else depth.knob():
                raise ConfigError(f"path={path} and {other} would both decide; leave one out")
            plan = read_path(path)
            named = plan.found.name if plan.found else ""
            self.path_source = f"{plan.file}:{named}" if named else str(plan.file)
            return self.routed.policy_of(load_path(self.routed, plan))
        texts = [] if depth.calibration is None else read_calibration(Path(depth.calibration))
        prompts = encode_calibration(texts, self.tokenizer, chat=False)
        return make_policy(self.routed, depth, prompts)[0]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[OptionScore]:
        """Score continuations, those of one question together; see `scoring.asked`."""
        if self.enable_thinking:
            raise ConfigError("enable_thinking=true fits generated answers only; leave it out")
        rows = [self.request_of(each) for each in requests]
        with tqdm(desc="scoring", total=len(rows), disable=disable_tqdm or self.rank != 0) as bar:
            answers, _ = self.scorer.score(
                rows, self.policy, by_prompt=self.policy.reads_prompt, on_progress=bar.update
            )
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def request_of(self, instance: Instance) -> HarnessRequest:
        """Return a request of the harness as tokens."""
        question = (instance.task_name, instance.doc_id)
        context, continuation = instance.args
        if context != "":
            return HarnessRequest(question, *self._encode_pair(context, continuation))
        if self.policy.reads_prompt:
            raise RoutingError(
                f"{instance.task_name} scores text without a prompt, so nothing can decide on "
                f"its route; {FIXED}"
            )
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        whole = tokens if tokens[0] == self.prefix_token_id else [self.prefix_token_id, *tokens]
        return HarnessRequest(question, whole[:1], whole[1:])

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[OptionScore]:
        """Score windows of a text (rolling log-likelihoods), each by itself, without a prompt."""
        if self.policy.reads_prompt:
            raise RoutingError(
                f"rolling log-likelihoods have no prompt, so nothing can decide on their route; "
                f"{FIXED}"
            )
        rows = [HarnessRequest(place, *tokens) for place, (_, *tokens) in enumerate(requests)]
        return self.scorer.score(rows, self.policy, by_prompt=False)[0]

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        """Encode prompts, and remember whose routes come next."""
        self._contexts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        policy, routes = self.policy_of(self._contexts), None
        if found := self._prefix.before(policy, context, kwargs):
            context, kwargs, routes = found
        with self.routed.using(policy):
            output = super()._model_generate(context, *args, **kwargs)
        if routes is None:
            copies = len(self.routed.last_route) // len(self._contexts)
            routes = self.routed.last_route[::copies]
        self.scorer.count(routes)
        self.generated_routes.update(zip(self._contexts, map(tuple, routes.tolist()), strict=True))
        return output

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers; decisions are taken in the prefill, and pinned.

        Answers that the model has no room for are shorter, with a warning (see `scoring.fitted`).
        """
        wanted, places = without_padding(requests)
        room = self.max_length, self.max_gen_toks
        asked = fitted(wanted, self.tok_encode, *room, warns=self.rank == 0)
        texts: list[str] = super().generate_until(asked, disable_tqdm=disable_tqdm)
        return [texts[place] for place in places]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Return how many answers are generated at once with `auto`: as many as memory allows."""
        size = PathSize(self.max_length, 1, keeps_kv=True)
        found: int = min(self.max_batch_size, MemoryBatcher(self.routed.model).num_paths(size))
        if self.world_size > 1:
            found = int(self.all_gather(torch.tensor([found], device=self.device)).min())
        return found

    def barrier(self) -> None:
        """Wait for all processes, and add up what they counted: the harness calls it in each."""
        super().barrier()
        if self.world_size > 1:
            own = torch.tensor([self.scorer.counts], device=self.device)
            self.shared_counts = self.all_gather(own).sum(dim=0).tolist()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes next to its results.

        `prompts` are those of all processes, each question once, of rolling texts the windows.
        """
        prompts, executed = self.shared_counts if self.world_size > 1 else self.scorer.counts
        executions: float = executed / max(prompts, 1)
        if isinstance(self.policy, PathPolicy):  # a part of a layer costs its share
            executions = executions_along(self.routed, self.policy.path)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": self.base.revision or "",
            "model_sha": self.base.revision or "",
            "drllm": {
                "version": version("drllm"),
                "base": self.base.identity,
                "routers": self.routers_source,
                "policy": type(self.policy).__name__,
                "path": self.path_source,
                "num_layers": self.routed.num_layers,
                "prompts": prompts,
                "executions_a_forward": executions,
            },
        }


def _routers_and_base(
    pretrained: str | BaseModel, routers: str | RouterStack | None, base: str | None
) -> tuple[RouterStack | None, str, str | None]:
    """Return the routers, the base model's name, and its revision where the routers name one."""
    stack = routers if isinstance(routers, RouterStack) else None
    is_folder = isinstance(pretrained, str) and (Path(pretrained) / CONFIG_FILE).is_file()
    if isinstance(routers, str) and not is_folder:
        stack = load_routers(find_routers(Path(routers)))
    if isinstance(pretrained, BaseModel):
        return stack, pretrained.name, None
    if not is_folder:
        if base is not None:
            raise ConfigError(
                f"base={base} has no effect: pretrained={pretrained} is no folder of routers"
                f"{_not_there(pretrained)}; give the base as pretrained and the routers as routers="
            )
        return stack, pretrained, None
    if routers is not None:
        raise ConfigError(
            f"pretrained={pretrained} is a folder of routers, and routers={routers} is given too; "
            f"give the base model as pretrained, or leave routers out"
        )
    stack = load_routers(pretrained)
    config = stack.config
    if base is None and not config.base_model:
        raise CheckpointError(
            f"the routers in {pretrained} don't name their base model; give it as base=MODEL"
        )
    return stack, base or config.base_model, None if base else config.base_revision


def _not_there(pretrained: str | BaseModel) -> str:
    """Say that there is no such folder, where a name looks like one: not for an alias."""
    folder = Path(pretrained) if isinstance(pretrained, str) else Path()
    return "" if folder.exists() or len(folder.parts) == 1 else " (there is no such folder)"
