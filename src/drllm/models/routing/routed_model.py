"""`RoutedModel`: a frozen Hugging Face model with a policy that decides how often each layer runs.

`attach` and `detach` put routing on a model and take it off. The stages (search, training, tuning,
evaluation) get their base model from `unrouted`.

Axes: B rows, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drllm.config import ModelConfig
from drllm.errors import CheckpointError, ConfigError, RoutingError
from drllm.models.base import hub as base_hub
from drllm.models.base import load as loading
from drllm.models.base.layers import unwrap_peft
from drllm.models.base.load import BaseModel
from drllm.models.healed import load_path
from drllm.models.routers.checkpoint import (
    check_routers,
    complete_config,
    load_routers,
    save_routers,
)
from drllm.models.routers.files import find_routers
from drllm.models.routers.hub import push_routers
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.driver import RoutingDriver
from drllm.models.routing.generate import GenerateHandle, take_off_overrides
from drllm.models.routing.injection import Driver, Injection
from drllm.models.routing.policies import FixedPolicy, FullPolicy, PathPolicy, Policy, RouterPolicy
from drllm.paths import StaticPath
from drllm.records.healed import HEALED_FILE
from drllm.records.removed import refuse_menu
from drllm.records.static_paths import read_path
from drllm.work.listener import Listener


def attach(
    model: Any,
    routers: RouterStack | Path | str | None = None,
    tokenizer: Any = None,
    *,
    policy: Policy | None = None,
) -> RoutedModel:
    """Put routing on a model, in place of the routing that it may have already.

    Args:
        model: A model as for `RoutedModel`, a `RoutedModel`, or what `drllm.load` returns.
        routers: Trained routers, their folder, or OWNER/NAME on the hub; None for no routers.
        tokenizer: As for `RoutedModel`.
        policy: As for `RoutedModel`.

    Raises:
        DrllmError: `RoutedModel` or `load_routers` raises it. The model is then as it was before.
    """
    if isinstance(routers, (str, Path)):
        routers = load_routers(find_routers(routers))
    if isinstance(model, (RoutedModel, BaseModel)):
        if tokenizer is None:
            tokenizer = vars(model).get("tokenizer")  # None if it isn't loaded yet
        model = model.model
    with ExitStack() as undo:
        undo.callback(_take_off(model))  # puts the earlier routing back if the next line fails
        routed = RoutedModel(model, routers, policy=policy, tokenizer=tokenizer)
        undo.pop_all()
    return routed


def detach(model: Any) -> Any:
    """Take the routing off a model, and return the model exactly as it was before.

    A model that isn't routed is returned unchanged.

    Raises:
        RoutingError: Other code has put an override over ours.
    """
    model = model.model if isinstance(model, RoutedModel) else model
    _take_off(model)
    return model


@contextmanager
def unrouted(
    model: Any, tokenizer: Any = None, listener: Listener | None = None
) -> Iterator[BaseModel]:
    """Yield a stage's base model, without routing inside the block.

    The routing is put back after the block.

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
                model = loading.load(model)
        if isinstance(model, RoutedModel):
            if tokenizer is None:
                tokenizer = model.tokenizer
            model = model.model
        if not isinstance(model, BaseModel):
            if tokenizer is None:
                tokenizer = loading.load_tokenizer(model)
            if tokenizer is None:
                raise ConfigError(
                    "the model comes without a tokenizer or a name; give it as tokenizer="
                )
            name = str(getattr(model, "name_or_path", "") or "in memory")
            model = BaseModel(model.eval(), tokenizer, name)
        stack.callback(_take_off(model.model))
        yield model


def _take_off(model: Any) -> Callable[[], None]:
    """Take the routing off a model, and return a function that puts it back."""
    injection = Injection.find(model)
    if injection is None:
        return lambda: None
    base = unwrap_peft(model)
    injection.remove()
    overrides = take_off_overrides(base)

    def put_back() -> None:
        injection.install()
        for name, override in overrides.items():
            setattr(base, name, override)

    return put_back


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


class RoutedModel:
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

    All other attributes (`config`, `device`, `parameters()`, ...) are the attributes of the model.

    Raises:
        ArchitectureError: The model's layers can't be routed exactly.
        CheckpointError: The routers were made for another model.
        RoutingError: Both routers and a policy are given, or the model is routed already.

    Source: Dr.LLM section 3; injection into stock models is ours (D-01).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                      num_hidden_layers=3, num_attention_heads=4)
        >>> routed = RoutedModel(LlamaForCausalLM(config))
        >>> with routed.fixed([1, 0, 2]):
        ...     output = routed(torch.tensor([[1, 2, 3]]))
        >>> routed.last_route
        tensor([[1, 0, 2]])
    """

    config: Any
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self,
        model: Any,
        routers: RouterStack | None = None,
        *,
        policy: Policy | None = None,
        tokenizer: Any = None,
    ) -> None:
        if routers is not None and policy is not None:
            raise RoutingError("give routers or a policy, not both: only one of them can decide")
        if routers is not None:
            check_routers(model, routers)
            if model.device.type != "meta":  # else accelerate keeps the weights elsewhere
                routers = routers.to(model.device)
            policy = RouterPolicy(routers)
        self.model: Any = model
        self.routers = routers
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.driver = RoutingDriver(policy)
        self.injection = Injection(model, self.driver)
        GenerateHandle(unwrap_peft(model), self.driver).put_on()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or "model" not in self.__dict__:
                raise AttributeError(f"'RoutedModel' object has no attribute {name!r}")
            return getattr(self.model, name)

    def __repr__(self) -> str:
        base = unwrap_peft(self.model)
        name = getattr(base, "name_or_path", "")
        parts = [type(base).__name__, f"{self.num_layers} layers"]
        if name:
            parts[0] += f" {name!r}"
        policy = self.driver.policy
        if isinstance(policy, PathPolicy):
            parts.append(policy.path.edits(self.num_layers))
        else:
            parts.append(type(policy).__name__)
        if not self.injection.is_installed:
            parts.append("taken off")
        return f"RoutedModel({', '.join(parts)})"

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the model's forward pass under routing, with the model's arguments and outputs."""
        self._check_attached()
        return self.model(*args, **inputs)

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
        revision: str | None = None,
        **options: Any,
    ) -> RoutedModel:
        """Load routers or a healed path, and the base model they belong to.

        Args:
            routers: A folder that `drllm train` or `save_pretrained` has written, or OWNER/NAME on
                the hub. If there is a folder of that name, the folder is used. A folder of
                `drllm heal` works too: the model then follows the healed path.
            base: The base model, or its id or folder. None loads the base model that the routers
                or the healed path name.
            tokenizer: The base model's tokenizer; None loads it.
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
        refuse_menu(folder)
        if not (base is None or isinstance(base, (str, Path))):
            _refuse_options(options.keys() - hub_options.keys(), options)
        if (folder / HEALED_FILE).is_file():
            plan = read_path(str(folder))
            identity = plan.record.model if plan.record else {}
            model = _load_base(base, identity, folder, options)
            routed = attach(model, tokenizer=tokenizer)
            routed.driver.policy = routed.build_policy(load_path(routed, plan))
            return routed
        stack = load_routers(folder)
        identity = {"id": stack.config.base_model, "revision": stack.config.base_revision}
        model = _load_base(base, identity, folder, options)
        return attach(model, stack, tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if none was given and the model has no name."""
        return loading.load_tokenizer(self.model)

    @property
    def num_layers(self) -> int:
        """The number of layers, L."""
        return self.injection.num_layers

    @property
    def last_route(self) -> Tensor:
        """The decisions for the last prompts of this thread, int `[B, L]`.

        In `generate`, every beam and every answer is a row of its own. If this thread ran no
        prompt, this is the last route of any thread. For a compiled model it always is.

        Raises:
            RoutingError: No prompt has passed yet.
        """
        if not self.driver.last_route:
            raise RoutingError("no prompt has passed through this routed model yet")
        by_layer = torch.tensor(self.driver.last_route)  # [L, B]
        return by_layer.T.contiguous()

    @property
    def policy(self) -> Policy:
        """The current policy: of the innermost `using` or `fixed` block, else of the model."""
        return self.driver.current_policy

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """Generate with the model's own `generate`; decisions are made once per prompt.

        Arguments and outputs are those of `routed.model.generate`. Beams, sampling, several
        answers, assisted decoding and streaming work, with a cache and without.

        Raises:
            RoutingError: The model is detached, or an option would make decisions wrong.
                `prefill_chunk_size` would let a policy decide on the first chunk of the prompt
                alone. `guidance_scale` without a cache would give its second prompt the decisions
                of the first. `assistant_early_exit` would leave out layers without routing.
        """
        self._check_attached()
        return self.model.generate(*args, **inputs)

    def using(self, policy: Policy) -> AbstractContextManager[None]:
        """Let another policy decide inside the block.

        The block is for the thread that entered it. A thread that is started inside doesn't
        inherit the policy: give the policy to `RoutedModel`, or open a block in that thread.
        """
        self._check_attached()
        return self.driver.using(policy)

    def fixed(
        self, plan: StaticPath | Sequence[int] | Sequence[Sequence[int]] | Tensor
    ) -> AbstractContextManager[None]:
        """Pin decisions or a static path inside the block.

        Decisions are `[L]` for every row, or `[B, L]`. A static path may run its layers in any
        order; `last_route` then says how often each layer ran. A healed path needs the model for
        itself: while a pass runs along it, another thread can't run another path.

        Raises:
            PathError: This model can't run the decisions or the path.
            RoutingError: The adapter of a healed path isn't in the model.
        """
        return self.using(self.build_policy(plan))

    def build_policy(
        self, plan: StaticPath | Sequence[int] | Sequence[Sequence[int]] | Tensor
    ) -> Policy:
        """Return the policy that follows a plan. The plan is as for `fixed`."""
        if not isinstance(plan, StaticPath):
            return FixedPolicy(plan, self.num_layers)
        decisions = plan.check(self.num_layers).plan(self.num_layers)
        if not isinstance(decisions, StaticPath):
            return FixedPolicy(decisions, self.num_layers)
        if plan.adapter:
            self.injection.lora.check(plan.adapter)
        return PathPolicy(plan, self.num_layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model inside the block. As with `using`, the block is for one thread."""
        with self.using(FullPolicy()), self.injection.driven_by(Driver()):
            yield

    def prompt_lengths(self, lengths: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Tell routers where each row's prompt ends, inside the block.

        Routers then read the prompt alone, never the continuation that is scored. Lengths are `[B]`
        numbers of real tokens, at least 1.
        """
        return self.driver.prompt_lengths(torch.as_tensor(lengths))

    def detach(self) -> Any:
        """Take the routing off, and return the model exactly as it was before.

        Raises:
            RoutingError: The routing was taken off already, or other code has put an override over
                ours.
        """
        self._check_attached()
        return detach(self.model)

    def _check_attached(self) -> None:
        """Raise a RoutingError if the routing was taken off the model."""
        if not self.injection.is_installed:
            raise RoutingError(
                "this routing was taken off the model, by detach() or by another attach(); use "
                "drllm.attach(model, ...) to put it on again"
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
