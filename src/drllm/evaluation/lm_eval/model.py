"""The routed model for lm-evaluation-harness ("the harness"), which is used by `--model drllm`.

Axes: P prompts, L layers.
"""

import datetime
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
from drllm.config.fields import replace_settings
from drllm.cost import path_executions
from drllm.errors import ConfigError, RoutingError
from drllm.evaluation.lm_eval.arguments import (
    HFLM_ARGUMENTS,
    LOADING_ARGUMENTS,
    ModelSource,
    check_batch_size,
    check_windows,
    read_depth,
    refuse_unknown_arguments,
    resolve_source,
    select_arguments,
)
from drllm.evaluation.lm_eval.generation import drop_repeats, limit_answers
from drllm.evaluation.lm_eval.prefix import CommonPrefix
from drllm.evaluation.lm_eval.scoring import (
    HarnessRequest,
    OptionScore,
    RequestScorer,
    RouteCounts,
)
from drllm.model.batching import MemoryBatcher, PathSize
from drllm.model.load import BaseModel, load
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.depth_control import encode_calibration, make_policy, read_calibration
from drllm.models.routing.policies import PathPolicy, Policy
from drllm.paths import Decisions
from drllm.records.static_paths import read_path
from drllm.work.launcher import count_processes
from drllm.work.listener import quiet

MAX_ROWS = 64  # the harness' default of `max_batch_size`
PROCESS_TIMEOUT = datetime.timedelta(weeks=52)
"""How long a process waits for the others, which may have much more to do. If one dies, the wait
ends earlier."""
FIXED_PLAN_ADVICE = "give a fixed plan (path=FILE, or static_routing=true)"
"""The advice in messages about requests without a prompt."""


@register_model("drllm")
class RoutedLM(HFLM):  # type: ignore[misc]
    """A routed model for the harness. Its parameters are the harness' `--model_args`.

    All continuations of a question follow one copy of its context. The routers read the context
    alone, so each question has one route. Without routers and without a path every layer is
    executed once, and all results equal the results of the harness' `hf` model.

    Args:
        pretrained: A base model (alias, hub id or folder), or a folder of routers, which names its
            base model. From Python also a `BaseModel`; or a `RoutedModel` without routers, whose
            weights may be in other processes if nothing is run.
        routers: The routers of a base model: a folder or a hub id; from Python also a
            `RouterStack`.
        base: The base model of a folder of routers, if its config names none.
        num_windows: The number of windows W. It is only compared with the routers', since trained
            routers can't change it.
        path: a static path to run for every prompt, as for `read_path`.
        device: auto, cpu, cuda, cuda:1 or mps. Each of several processes gets its own GPU.
        batch_size: Rows in a pass; a question with all its continuations is one row. `auto` chooses
            by memory.
        max_batch_size: Maximum rows in a pass with `auto`.
        max_length: Maximum number of tokens read; by default the model's context length.
        arguments: Settings of `DepthConfig` and `ModelConfig` by name (`DEPTH_ARGUMENTS` and
            `LOADING_ARGUMENTS`), and arguments of the harness' `HFLM` (`HFLM_ARGUMENTS`).

    Attributes:
        policy: Decides on all prompts whose options are scored.
        choose_policy: Returns the policy for a batch of prompts that are to be answered; by default
            `policy`. An evaluation replaces it.
        generated_routes: The route of each prompt that was answered.

    Raises:
        ConfigError: An argument is unknown or has no effect.
        CheckpointError: The routers belong to another model, or have another number of windows.
        ModelError: The base model can't be loaded.

    Source: ours; lm-evaluation-harness' `HFLM` (docs/differences.md, D-27).
    """

    def __init__(
        self,
        pretrained: str | BaseModel | RoutedModel,
        *,
        routers: str | RouterStack | None = None,
        base: str | None = None,
        num_windows: int | None = None,
        path: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = MAX_ROWS,
        max_length: int | None = None,
        **arguments: Any,
    ) -> None:
        parameters = [*signature(RoutedLM).parameters][:-1]  # without `arguments`
        refuse_unknown_arguments(arguments, parameters)
        batch_size = check_batch_size(batch_size)
        routed: RoutedModel | None = None
        if isinstance(pretrained, RoutedModel):
            routed = pretrained
            pretrained = _describe_base(routed)
        depth = read_depth(arguments)
        loading = select_arguments(arguments, LOADING_ARGUMENTS)
        source = resolve_source(pretrained, routers, base)
        check_windows(num_windows, source.routers, pretrained)

        accelerator = None
        if isinstance(pretrained, BaseModel):
            self.base = pretrained
        else:
            accelerator = _join_processes(device)
            if accelerator is not None:
                device = str(accelerator.device)
            self.base = _load_base(source, device, loading)
        self._init_hflm(
            accelerator,
            batch_size=batch_size,
            max_batch_size=max_batch_size or MAX_ROWS,
            max_length=max_length,
            trust_remote_code=loading.get("trust_remote_code", False),
            **select_arguments(arguments, HFLM_ARGUMENTS),
        )
        self.routed = routed or self._make_routed_model(source.routers)
        self.routers_source: str | None = None
        if source.routers is not None:
            self.routers_source = str(routers or pretrained)
        self.path_source: str | None = None
        self.policy = self._make_policy(path, depth)
        self.choose_policy: Callable[[list[str]], Policy] = lambda _prompts: self.policy
        self.scorer = RequestScorer(
            self.routed, self.max_length, self.batch_size, self.max_batch_size
        )
        self.shared_counts = RouteCounts()  # the counts of all processes
        self.generated_routes: dict[str, Decisions] = {}
        self._prompts: list[str] = []  # the prompts that `_model_generate` answers next
        self._prefix = CommonPrefix(self.routed)

    def _make_routed_model(self, routers: RouterStack | None) -> RoutedModel:
        """Return the loaded base model with routers."""
        return RoutedModel(
            self.base.model, routers, tokenizer=self.base.tokenizer, bypass=self.base.bypass
        )

    def _make_policy(self, path: str | None, depth: DepthConfig) -> Policy:
        """Return the policy of a path, or of the settings of depth; remember the path's name."""
        if path is None:
            return _make_depth_policy(self.routed, depth, self.tokenizer)
        _refuse_second_plan(path, self.routed, depth)
        self.path_source = path
        return self.routed.build_policy(read_path(path).path(self.routed.num_layers))

    def _init_hflm(self, accelerator: Accelerator | None, **settings: Any) -> None:
        """Initialise the harness' own class with the loaded base model.

        Args:
            accelerator: Knows the processes that share the work; None for one process.
            settings: Parameters of `HFLM`.
        """
        with quiet("lm_eval.models.huggingface"):  # it warns if the model is loaded already
            super().__init__(self.base.model, tokenizer=self.base.tokenizer, **settings)
        if accelerator is not None:  # the harness' class sets these only if it loads the model
            self.accelerator = accelerator
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "RoutedLM":
        """Make a model from `--model_args` (`arg_dict`) and the flags of batch size and device."""
        for name in ("batch_size", "max_batch_size", "device"):
            if name in arg_dict:
                raise ConfigError(
                    f"{name}={arg_dict[name]} isn't a model argument; give "
                    f"--{name} {arg_dict[name]}"
                )
        if "pretrained" not in arg_dict:
            raise ConfigError(
                "no model is named; give --model_args pretrained=NAME, where NAME is a folder of "
                "routers or a base model (alias, hub id or folder)"
            )
        flags = {name: value for name, value in (additional_config or {}).items() if value}
        pretrained = str(arg_dict["pretrained"])  # a name of digits is read as a number
        return cls(**{**arg_dict, "pretrained": pretrained}, **flags)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[OptionScore]:
        """Score continuations; the continuations of a question are scored together."""
        if self.enable_thinking:
            raise ConfigError(
                "enable_thinking=true is for generated answers, and this task scores options; "
                "leave it out"
            )
        encoded = [self.encode_request(request) for request in requests]
        is_silent = disable_tqdm or self.rank != 0
        with tqdm(desc="scoring", total=len(encoded), disable=is_silent) as bar:
            answers, _ = self.scorer.score(
                encoded, self.policy, by_prompt=self.policy.reads_prompt, on_progress=bar.update
            )
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def encode_request(self, instance: Instance) -> HarnessRequest:
        """Encode a request of the harness; an empty context becomes the model's prefix token."""
        question = (instance.task_name, instance.doc_id)
        context, continuation = instance.args
        if context != "":
            context_ids, continuation_ids = self._encode_pair(context, continuation)
            return HarnessRequest(question, context_ids, continuation_ids)
        if self.policy.reads_prompt:
            raise RoutingError(
                f"{instance.task_name} scores text without a prompt, and the route depends on the "
                f"prompt; {FIXED_PLAN_ADVICE}"
            )
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[0] != self.prefix_token_id:
            tokens = [self.prefix_token_id, *tokens]
        return HarnessRequest(question, tokens[:1], tokens[1:])

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[OptionScore]:
        """Score windows of long texts for the harness' rolling log-likelihoods.

        The windows have no prompt, so the plan must not depend on the prompt.
        """
        if self.policy.reads_prompt:
            raise RoutingError(
                f"rolling log-likelihoods have no prompt, and the route depends on the prompt; "
                f"{FIXED_PLAN_ADVICE}"
            )
        windows = []
        for place, (_, context, continuation) in enumerate(requests):
            windows.append(HarnessRequest(place, context, continuation))
        answers, _ = self.scorer.score(windows, self.policy, by_prompt=False)
        return answers

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        """Encode prompts, and store their texts, which `_model_generate` isn't called with."""
        self._prompts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Generate answers for a batch under its policy, and store the routes."""
        policy = self.choose_policy(self._prompts)
        prefixed = self._prefix.read(policy, context, kwargs)
        if prefixed is not None:
            context = prefixed.ids
            kwargs = prefixed.options
        with self.routed.using(policy):
            output = super()._model_generate(context, *args, **kwargs)
        if prefixed is not None:
            routes = prefixed.routes
        else:  # with several beams, a prompt has as many rows, all with its route
            rows_per_prompt = len(self.routed.last_route) // len(self._prompts)
            routes = self.routed.last_route[::rows_per_prompt]
        self.scorer.counts.add(routes)
        for prompt, route in zip(self._prompts, routes.tolist(), strict=True):
            self.generated_routes[prompt] = tuple(route)
        return output

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers. Decisions are made while the prompt is read, and hold for the answer.

        If the model has no room for a whole answer, the answer is shorter, and a warning is logged
        (see `limit_answers`).
        """
        remaining, places = drop_repeats(requests)
        remaining = limit_answers(
            remaining, self.tok_encode, self.max_length, self.max_gen_toks, warns=self.rank == 0
        )
        texts: list[str] = super().generate_until(remaining, disable_tqdm=disable_tqdm)
        return [texts[place] for place in places]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Return how many answers to generate at once with `auto`, by memory."""
        size = PathSize(self.max_length, 1, keeps_kv=True)
        num_rows: int = min(self.max_batch_size, MemoryBatcher(self.routed.model).num_paths(size))
        if self.world_size > 1:  # all processes use the smallest number
            num_rows = int(self.all_gather(torch.tensor([num_rows], device=self.device)).min())
        return num_rows

    def barrier(self) -> None:
        """Wait for all processes, and add up their counts. The harness calls it in each process."""
        super().barrier()
        if self.world_size > 1:
            counts = self.scorer.counts
            values = torch.tensor([[counts.prompts, counts.executions]], device=self.device)
            prompts, executions = self.all_gather(values).sum(dim=0).tolist()
            self.shared_counts = RouteCounts(prompts, executions)

    def get_model_info(self) -> dict[str, Any]:
        """Return the information that the harness writes into its results.

        `prompts` is the number of questions of all processes, or of windows for rolling texts.
        """
        counts = self.scorer.counts
        if self.world_size > 1:
            counts = self.shared_counts
        executions = counts.executions / max(counts.prompts, 1)
        if isinstance(self.policy, PathPolicy):
            executions = path_executions(self.policy.path)
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
                "prompts": counts.prompts,
                "executions_a_forward": executions,
            },
        }


def _join_processes(device: str | None) -> Accelerator | None:
    """Give each of several processes a GPU of its own, or all of them the CPU.

    Return None if there is only one process.
    """
    if count_processes() <= 1:
        return None
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )


def _describe_base(routed: RoutedModel) -> BaseModel:
    """Return the base model under a routed model."""
    name = str(getattr(routed.model, "name_or_path", "") or "in memory")
    return BaseModel(routed.model, routed.tokenizer, name)


def _load_base(source: ModelSource, device: str | None, loading: Mapping[str, Any]) -> BaseModel:
    """Load the base model at the revision in `loading`, or else at the routers' revision."""
    settings = {
        **loading,
        "model": source.base,
        "revision": loading.get("revision") or source.revision,
        "device": device or "auto",
    }
    return load(replace_settings(ModelConfig, None, settings))


def _make_depth_policy(routed: RoutedModel, depth: DepthConfig, tokenizer: Any) -> Policy:
    """Make the policy of the depth settings; `target_executions` needs a calibration file."""
    texts: list[tuple[str, bool]] = []
    if depth.calibration is not None:
        texts = read_calibration(Path(depth.calibration))
    prompts = encode_calibration(texts, tokenizer, chat=False)
    policy, _ = make_policy(routed, depth, prompts)
    return policy


def _refuse_second_plan(path: str, routed: RoutedModel, depth: DepthConfig) -> None:
    """Refuse routers and depth settings beside a static path."""
    rival: str | None = "routers"
    if routed.routers is None:
        rival = depth.find_setting()
    if rival is not None:
        raise ConfigError(f"path={path} and {rival} would both decide; leave one out")
