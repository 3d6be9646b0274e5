"""`RoutedModel`: a frozen Hugging Face model with a policy that decides how often each layer runs.

`attach` and `detach` put routing on a model and take it off. The stages get their base model from
`unrouted`.

Axes: B rows, L layers.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig

from drllm.config import ModelConfig
from drllm.errors import CheckpointError, ConfigError, RoutingError
from drllm.model import hub as base_hub
from drllm.model import load as loading
from drllm.model.layers import evaluation_mode
from drllm.model.load import BaseModel
from drllm.model.prompts import Prompt
from drllm.models.routers.checkpoint import complete_config, load_routers, save_routers
from drllm.models.routers.files import find_routers
from drllm.models.routers.hub import push_routers
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.batch_generation import BATCH_SIZE, GeneratedAnswer, generate_many
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import load_bypass
from drllm.models.routing.core import Routing, take_off_routing
from drllm.models.routing.depth_control import TOLERANCE, Calibration, find_depth_bias
from drllm.models.routing.policies import Policy
from drllm.work.listener import Listener


def attach(
    model: Any,
    routers: RouterStack | Path | str | None = None,
    tokenizer: Any = None,
    *,
    policy: Policy | None = None,
    bypass: Bypass | Path | str | None = None,
) -> RoutedModel:
    """Put routing on a model, in place of the routing that it may have already.

    Args:
        model: A model as for `RoutedModel`, a `RoutedModel`, or what `drllm.load` returns.
        routers: Trained routers, their folder, or OWNER/NAME on the hub; None for no routers.
        tokenizer: As for `RoutedModel`.
        policy: As for `RoutedModel`.
        bypass: As for `RoutedModel`, or its file. None takes the bypass of a `BaseModel`.

    Raises:
        DrllmError: `RoutedModel` or `load_routers` raises it. The model is then as it was before.
    """
    if isinstance(routers, (str, Path)):
        routers = load_routers(find_routers(routers))
    if isinstance(model, BaseModel) and bypass is None:
        bypass = model.bypass
    if isinstance(bypass, (str, Path)):
        bypass = load_bypass(bypass)
    if isinstance(model, (RoutedModel, BaseModel)):
        if tokenizer is None:
            tokenizer = vars(model).get("tokenizer")  # None if it isn't loaded yet
        model = model.model
    with ExitStack() as undo:
        put_back = take_off_routing(model)
        undo.callback(put_back)  # if the next line fails
        routed = RoutedModel(model, routers, policy=policy, tokenizer=tokenizer, bypass=bypass)
        undo.pop_all()
    return routed


def detach(model: Any) -> Any:
    """Take the routing off a model, and return the model exactly as it was before.

    A model that isn't routed is returned unchanged. The model may be whatever `attach` takes.

    Raises:
        RoutingError: Other code has put an override over ours.
    """
    if isinstance(model, (RoutedModel, BaseModel)):
        model = model.model
    take_off_routing(model)
    return model


def load_with_bypass(config: ModelConfig | str) -> BaseModel:
    """Load a base model, and its bypass if the settings name one.

    Whether they belong together is checked when the model is routed.

    Args:
        config: The settings, or the name of the model.

    Raises:
        DrllmError: `load` or `load_bypass` raises it.
    """
    if isinstance(config, str) or config.bypass is None:
        return loading.load(config)
    base = loading.load(dataclasses.replace(config, bypass=None))
    return dataclasses.replace(base, bypass=load_bypass(config.bypass))


@contextmanager
def unrouted(
    model: Any, tokenizer: Any = None, listener: Listener | None = None
) -> Iterator[BaseModel]:
    """Yield a stage's base model, without routing and in evaluation mode inside the block.

    After the block the routing is put back, and the model is in the mode that it was in before.

    Args:
        model: The settings or the name of a model to load, or a loaded model: what `load` returns,
            a model of transformers, or a `RoutedModel`.
        tokenizer: The model's tokenizer; None takes the tokenizer that the model comes with.
        listener: Shows that the model is being loaded.
    """
    with ExitStack() as stack:
        if isinstance(model, (str, ModelConfig)):
            stack.enter_context(base_hub.quiet())
            name = model if isinstance(model, str) else model.model
            with (listener or Listener()).busy(f"loading {name}"):
                model = load_with_bypass(model)
        bypass = None
        if isinstance(model, RoutedModel):
            if tokenizer is None:
                tokenizer = model.tokenizer
            bypass = model.bypass
            model = model.model
        if not isinstance(model, BaseModel):
            if tokenizer is None:
                tokenizer = loading.load_tokenizer(model)
            if tokenizer is None:
                raise ConfigError(
                    "the model comes without a tokenizer or a name; give it as tokenizer="
                )
            name = str(getattr(model, "name_or_path", "") or "in memory")
            model = BaseModel(model, tokenizer, name, bypass=bypass)
        stack.enter_context(evaluation_mode(model.model))
        stack.callback(take_off_routing(model.model))
        yield model


def _refuse_options(names: Iterable[str], options: Mapping[str, Any]) -> None:
    """Refuse options of loading for a base model that is loaded already."""
    name = min(names, default=None)
    if name is not None:
        raise ConfigError(
            f"{name}={options[name]!r} has no effect on a base model that is loaded "
            f"already; leave it out, or give the model's id as base"
        )


def _load_base(
    base: Any, identity: Mapping[str, Any], folder: Path, options: Mapping[str, Any]
) -> Any:
    """Return the base model, and load it if necessary.

    Args:
        base: A loaded model, the name or folder of a model, or None.
        identity: The `id` and `revision` of the model that is loaded if `base` is None.
        folder: The folder that names this model, for the error message.
        options: How the model is loaded, as for `load`.
    """
    if isinstance(base, (str, Path)):
        return loading.load(str(base), revision=None, **options)
    if base is not None:
        return base
    if not identity.get("id"):
        raise CheckpointError(
            f"the files in {folder} don't name their base model; give it as base=..."
        )
    return loading.load(str(identity["id"]), revision=identity.get("revision"), **options)


class RoutedModel(Routing):
    """A base model under routing.

    The model isn't copied: `routed.model` is the same object, with the same weights and state-dict
    keys. Its forward passes and its `generate` are routed, whoever calls them.

    A pass without a cache, or with an empty cache, reads a prompt. The decisions for a prompt hold
    for all later tokens on the same cache, or in the same `generate`. Without routers and without a
    policy every layer is executed once, and results equal those of the base model bit for bit.

    Args:
        model: A decoder-only model of transformers, or a PEFT model around one.
        routers: Trained routers for exactly this model.
        policy: A policy that decides in place of routers. Give routers or a policy, not both.
        tokenizer: The model's tokenizer, for functions that start from texts (`search_paths`).
            None loads the tokenizer of the model's name when it is first needed.
        bypass: What runs in place of a skipped layer, fitted for exactly this model; None leaves
            the state as it is.

    All other attributes (`config`, `device`, `parameters()`, ...) are the attributes of the model.

    Raises:
        ArchitectureError: The model's layers can't be routed exactly.
        CheckpointError: The routers were made for another model.
        RoutingError: Both routers and a policy are given, or the model is routed already.

    Source: Dr.LLM section 3; injection into stock models is ours (D-01).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=3, num_attention_heads=4)
        >>> routed = RoutedModel(LlamaForCausalLM(config))
        >>> with routed.fixed([1, 0, 2]):
        ...     output = routed(torch.tensor([[1, 2, 3]]))
        >>> routed.last_route
        tensor([[1, 0, 2]])
    """

    def to(self, *args: Any, **kwargs: Any) -> RoutedModel:
        """Move or convert the model, as its own `to` does. Routers move too, and stay float32."""
        self.model.to(*args, **kwargs)
        return self._move_routers()

    def cpu(self) -> RoutedModel:
        """Move the model to the CPU, and return the routed model."""
        self.model.cpu()
        return self._move_routers()

    def cuda(self, *args: Any, **kwargs: Any) -> RoutedModel:
        """Move the model to a GPU, and return the routed model."""
        self.model.cuda(*args, **kwargs)
        return self._move_routers()

    def float(self) -> RoutedModel:
        """Convert the model to float32, and return the routed model."""
        self.model.float()
        return self

    def double(self) -> RoutedModel:
        """Convert the model to float64, and return the routed model; routers stay float32."""
        self.model.double()
        return self

    def half(self) -> RoutedModel:
        """Convert the model to float16, and return the routed model; routers stay float32."""
        self.model.half()
        return self

    def bfloat16(self) -> RoutedModel:
        """Convert the model to bfloat16, and return the routed model; routers stay float32."""
        self.model.bfloat16()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> RoutedModel:
        """Set whether the model's weights get gradients, and return the routed model."""
        self.model.requires_grad_(requires_grad)
        return self

    def _move_routers(self) -> RoutedModel:
        """Move the routers to the model's device, and return the routed model."""
        if self.routers is not None:
            self.routers.to(self.model.device)
        return self

    def train(self, mode: bool = True) -> RoutedModel:
        """Set the model's training mode, and return the routed model."""
        self.model.train(mode)
        return self

    def eval(self) -> RoutedModel:
        """Set the model's evaluation mode, and return the routed model."""
        return self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        routers: Path | str,
        base: Any = None,
        *,
        tokenizer: Any = None,
        bypass: Bypass | Path | str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> RoutedModel:
        """Load routers and the base model they belong to.

        Args:
            routers: A folder that `drllm train` or `save_pretrained` has written, or OWNER/NAME on
                the hub. If there is a folder of that name, the folder is used.
            base: The base model, or its id or folder. None loads the base model that the routers
                name.
            tokenizer: The base model's tokenizer; None loads it.
            bypass: The bypass that the routers were trained with, or its file.
            revision: Branch, tag or commit of the routers on the hub.
            options: How the base model is loaded, as for `load`: `dtype`, `device`, `device_map`,
                `quantization_config`, `attn_implementation`, ...; `token`, `cache_dir` and
                `local_files_only` are used for the routers too.

        Raises:
            CheckpointError: The routers are broken, can't be loaded, or belong to another model.
            ConfigError: An option has no effect, since the base model is loaded already.
            ModelError: The base model can't be loaded.
        """
        hub_options = base_hub.select_options(options)
        folder = find_routers(routers, revision, **hub_options)
        if not (base is None or isinstance(base, (str, Path))):
            _refuse_options(options.keys() - hub_options.keys(), options)
        stack = load_routers(folder)
        identity = {"id": stack.config.base_model, "revision": stack.config.base_revision}
        model = _load_base(base, identity, folder, options)
        return attach(model, stack, tokenizer, bypass=bypass)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int = 64,
        chat: bool = True,
        route_first: bool = True,
        **options: Any,
    ) -> list[GeneratedAnswer]:
        """Answer many prompts, and decode prompts with equal plans together.

        All prompts are routed first, and then put into batches that run as few layers as possible.
        See `batch_generation.generate_many` for the arguments, exactness and errors.

        Example:
            >>> routed.generate_many(["Name a metal.", "What is ice?"])  # doctest: +SKIP
            [GeneratedAnswer(prompt='Name a metal.', ...), GeneratedAnswer(prompt='What is i...')]
        """
        self.check_attached()
        return generate_many(
            self,
            prompts,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            chat=chat,
            route_first=route_first,
            **options,
        )

    def find_depth_bias(
        self,
        prompts: Sequence[Sequence[int]],
        target_executions: builtins.float,
        *,
        batch_size: int = 16,
        tolerance: builtins.float = TOLERANCE,
    ) -> Calibration:
        """Find the depth bias under which prompts have a target number of executions on average.

        See `depth_control.find_depth_bias` for the method.

        Args:
            prompts: Token ids of each prompt.
            target_executions: Mean executions, from 1 to 2L.
            batch_size: Prompts in a forward pass.
            tolerance: How far the mean may be from the target.

        Returns:
            The bias for `RouterPolicy(routers, depth_bias=...)`, and what it does on the prompts.

        Raises:
            ConfigError: There are no routers or prompts, or the target can't be reached.
        """
        self.check_attached()
        return find_depth_bias(
            self, prompts, target_executions, batch_size=batch_size, tolerance=tolerance
        )

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push: Any,
    ) -> str | None:
        """Save the routers with a model card. The base model isn't copied.

        If the folder holds routers already, all of their files are replaced, or none if this fails.

        Args:
            folder: The folder; made if necessary.
            push_to_hub: Push the routers to the hub too.
            repo_id: OWNER/NAME to push to.
            push: Options of the method `push_to_hub`.

        Returns:
            The address of the commit if the routers are pushed, else None.

        Raises:
            ConfigError: One of `push_to_hub` and `repo_id` is given without the other.
            CheckpointError: The folder can't be written, it holds a README.md that isn't a card of
                routers, or the weights of the routers aren't finite float32 any more.
            RoutingError: There are no routers.
        """
        routers = self._check_routers()
        if push_to_hub != (repo_id is not None) or (push and not push_to_hub):
            raise ConfigError("push_to_hub=True and repo_id='OWNER/NAME' go together; give both")
        save_routers(routers, folder, config=complete_config(routers.config, self.model))
        return None if repo_id is None else self.push_to_hub(repo_id, **push)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload routers",
    ) -> str:
        """Push the routers with a model card to the hub. The base model isn't pushed.

        Args:
            repo: OWNER/NAME; made if necessary.
            private: Make the repository private. A repository that is public already is refused.
            token: A token with write access; None takes the token of HF_TOKEN or of the login.
            revision: Branch, made if necessary; None for the default branch.
            commit_message: First line of the commit.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: The hub or `save_pretrained` refuses, an existing repository isn't
                private, or there is no network.
            RoutingError: There are no routers.
        """
        routers = self._check_routers()
        return push_routers(routers, self.model, repo, private, token, revision, commit_message)

    def _check_routers(self) -> RouterStack:
        """Return the routers; raise a RoutingError if there are none."""
        if self.routers is None:
            raise RoutingError("there are no routers to save: this model follows a policy")
        return self.routers


class _RoutedConfig(PretrainedConfig):  # type: ignore[misc]
    """The key under which transformers knows `RoutedModel`; no model has this config."""


# Else the text-generation pipeline of transformers logs a routed model as unsupported.
AutoModelForCausalLM.register(_RoutedConfig, RoutedModel)
