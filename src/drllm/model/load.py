"""Load a base model from an alias, a hub id or a folder: frozen, with its tokenizer.

Weights are read from safetensors only. Code that comes with a model runs only if the user allows
it. Long errors of transformers become one line.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drllm.config import ModelConfig
from drllm.config.fields import list_kinds
from drllm.errors import ConfigError, ModelError, unknown_name
from drllm.model import hub
from drllm.model.aliases import ALIASES
from drllm.model.identity import describe
from drllm.model.layers import unwrap_peft
from drllm.model.places import check_alias_settings, locate
from drllm.records.identity import BYPASS
from drllm.work.listener import logger

MAX_NAMES = 3  # maximum number of weights that an error names

# Errors that transformers raises for a tokenizer that it can't open.
_TOKENIZER_ERRORS: tuple[type[Exception], ...] = (
    *hub.ERRORS,
    ImportError,
    KeyError,
    RuntimeError,
    SafetensorError,
    ValueError,
)
# Errors that transformers raises for a model that it can't open; TypeError is for unknown options.
_MODEL_ERRORS: tuple[type[Exception], ...] = (*_TOKENIZER_ERRORS, TypeError)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen base model, ready to run.

    Attributes:
        model: The model, in evaluation mode; no parameter requires gradients.
        tokenizer: The tokenizer. It pads on the left, with the end token if there is no padding
            token.
        name: Alias, hub id or folder, as the user wrote it. It is the hub id for an alias whose
            package isn't installed.
        revision: Commit of a hub model; None for an alias or a folder.
        bypass: What runs in place of a skipped layer (`models.routing.bypass`); None for nothing.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    bypass: Any = None

    @property
    def num_layers(self) -> int:
        """The number of layers L."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The entries by which manifests and router checkpoints identify the model.

        A bypass is one of them, since states and labels found with it aren't those without it.
        """
        identity = {"id": self.name, "revision": self.revision, **describe(self.model)}
        if self.bypass is not None:
            identity[BYPASS] = self.bypass.sha256
        return identity

    def refuse_bypass(self, what: str) -> None:
        """Refuse a bypass where a model is shortened.

        Args:
            what: What is to be done, with its subject: "learning repairs a model".

        Raises:
            ConfigError: The model has a bypass.
        """
        if self.bypass is not None:
            raise ConfigError(
                f"{what} without a bypass, which stands in for layers that routes skip; leave "
                f"--bypass out"
            )

    @property
    def runtime(self) -> dict[str, Any]:
        """How the model runs: settings that may change the results, but not the identity."""
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attn_implementation": self.model.config._attn_implementation,
        }


def load(model: ModelConfig | str, **options: Any) -> BaseModel:
    """Load a base model and its tokenizer, and freeze the model.

    The model is in evaluation mode, and none of its weights requires gradients: every stage of
    drllm leaves the base model as it is. To train the model itself, call
    `base.model.requires_grad_().train()`. `attach` doesn't freeze a model that you loaded yourself.

    Args:
        model: The settings; or an alias, a hub id or a folder.
        options: Further settings by name (`dtype` may be a `torch.dtype`), and options of
            transformers' `from_pretrained`: `device_map`, `quantization_config`, `token`,
            `cache_dir`, ...

    Raises:
        ConfigError: A device, an attention implementation or a revision is unavailable, or has no
            effect; or a bypass is given, which belongs to `attach`.
        ModelError: The model doesn't exist, is gated or incomplete, isn't a decoder-only language
            model, or needs code of its own; or the network is needed but can't be reached.
    """
    config, options = _split_options(model, options)
    if config.bypass is not None:
        raise ConfigError(
            f"bypass={config.bypass!r} has no effect on loading; load the model without it, then "
            f"give it to attach(model, bypass=...)"
        )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if options.get("device_map") is not None and config.device != "auto":
        raise ConfigError(
            f"device={config.device!r} has no effect with device_map; leave one of the two out"
        )
    # With a device map the weights are read to the GPU one by one, so they needn't all fit into the
    # CPU's memory. Quantised weights need a device map, since they can't be moved to the GPU later.
    if device.type == "cuda" or options.get("quantization_config") is not None:
        options.setdefault("device_map", {"": device})
    _check_attention(config.attn_implementation)
    name = config.model
    if name in ALIASES:
        config = _resolve_alias(config)

    with hub.quiet():
        source, revision = locate(config, options)
        is_replaced = config.model != name
        # The warning comes after `locate`, which raises an error if the hub can't be used.
        if is_replaced:
            logger.warning(
                "%s isn't installed, so %s is the hub's %s, which has other weights",
                ALIASES[name].package,
                name,
                config.model,
            )
        tokenizer, base_model = _open(config, source, revision, dtype, options)
    if options.get("device_map") is None:
        base_model.to(device)
    base_model.name_or_path = config.model  # transformers sets the folder of an alias
    base_model.eval()
    base_model.requires_grad_(False)
    return BaseModel(base_model, _set_left_padding(tokenizer), name=config.model, revision=revision)


def load_tokenizer(model: Any) -> Any:
    """Load a model's tokenizer by the model's name; None if the model has no name."""
    base = unwrap_peft(model)
    name = getattr(base, "name_or_path", "")
    if not name:
        return None
    commit = getattr(base.config, "_commit_hash", None)
    config = ModelConfig(model=name, revision=None if Path(name).is_dir() else commit)
    with hub.quiet():
        source, revision = locate(config, {})
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        except _TOKENIZER_ERRORS as error:
            raise _explain(error, config) from error
    return _set_left_padding(tokenizer)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is CUDA, else MPS, else the CPU.

    Raises ConfigError if this machine doesn't have the device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return _choose_gpu()
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    kind, _, digits = name.partition(":")
    index = int(digits) if digits else 0
    count = _count_devices(kind)
    if index >= count:
        noun = "device" if count == 1 else "devices"
        raise ConfigError(
            f"--device is {name!r}, but this machine has {count} {kind} {noun}; use --device auto "
            f"or cpu"
        )
    return torch.device(name)


def _choose_gpu() -> torch.device:
    """Return the current GPU; under torchrun, the GPU of this process."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return torch.device("cuda")
    return torch.device(f"cuda:{int(local_rank) % torch.cuda.device_count()}")


def _count_devices(kind: str) -> int:
    """Return how many devices of a kind (`cpu`, `cuda` or `mps`) this machine has."""
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return 1


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights; `auto` is bfloat16 if the GPU supports it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    has_bfloat16 = False
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _split_options(
    model: ModelConfig | str, options: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Split options into our settings and options of transformers."""
    settings: dict[str, Any] = {"model": model} if isinstance(model, str) else model.to_dict()
    transformers_options: dict[str, Any] = {}
    for name, value in options.items():
        if name == "torch_dtype":  # the name in transformers 4
            settings["dtype"] = value
        elif name in list_kinds(ModelConfig):
            settings[name] = value
        else:
            transformers_options[name] = value
    settings["dtype"] = str(settings.get("dtype", "auto")).removeprefix("torch.")
    return ModelConfig(**settings), transformers_options


def _check_attention(name: str | None) -> None:
    """Refuse a name that isn't an attention implementation of transformers."""
    if name is None or "/" in name:  # OWNER/NAME is a kernel on the hub
        return
    names = {key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in key}
    names.add("eager")
    if name not in names:
        message = unknown_name("attention implementation", name, names)
        raise ConfigError(f"--attn-implementation: {message}")


def _resolve_alias(config: ModelConfig) -> ModelConfig:
    """Convert the packaged model if necessary. Without the package, name the hub's model."""
    check_alias_settings(config)
    packaged = ALIASES[config.model]
    if packaged.provide_checkpoint() is None:
        return dataclasses.replace(config, model=packaged.hub_id)
    return config


def _open(
    config: ModelConfig,
    source: str,
    revision: str | None,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Load the tokenizer and the model; refuse weights that don't fit the config.

    Args:
        config: The settings.
        source: The folder or hub id, from `locate`.
        revision: The commit of a hub model, from `locate`.
        dtype: The dtype of the weights.
        options: Options of transformers' `from_pretrained`.
    """
    tokenizer_options = {
        "trust_remote_code": config.trust_remote_code,
        **hub.select_options(options),
    }
    if revision is not None:
        tokenizer_options["revision"] = revision
    model_options = {**options, **tokenizer_options}
    if config.attn_implementation is not None:
        model_options["attn_implementation"] = config.attn_implementation
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            **model_options,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` refuses them and names them
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"model {config.model!r} doesn't fit in the memory of {resolve_device(config.device)}; "
            f"use --dtype bfloat16, --device cpu or a smaller model"
        ) from error
    except _MODEL_ERRORS as error:
        raise _explain(error, config) from error
    _check_weights("missing keys", info["missing_keys"], config.model)
    # A mismatched key is a name or, in some versions of transformers, a name and two shapes.
    mismatched_keys = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    _check_weights("mismatched keys", mismatched_keys, config.model)
    num_unused = len(info["unexpected_keys"])
    if num_unused:
        logger.warning("%s has %d weights that its class doesn't use", config.model, num_unused)
    return tokenizer, model


def _check_weights(problem: str, keys: Sequence[str], model: str) -> None:
    """Refuse a model if it has missing or mismatched weights.

    transformers would only warn, and fill these weights with random numbers.
    """
    if not keys:
        return
    names = ", ".join(sorted(keys)[:MAX_NAMES])
    if len(keys) > MAX_NAMES:
        names += " …"
    raise ModelError(
        f"the weights of {model} don't fit its config: {problem} {names} ({len(keys)} in all)"
    )


def _set_left_padding(tokenizer: Any) -> Any:
    """Make a tokenizer pad on the left, with its end token if it has no padding token."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _explain(error: Exception, config: ModelConfig) -> ModelError | ConfigError:
    """Turn an error of transformers into one line that says what to do."""
    name = config.model
    attention = config.attn_implementation
    text = str(error)
    message = hub.first_line(error)
    if "trust_remote_code" in text and not config.trust_remote_code:
        return ModelError(
            f"model {name!r} needs modelling code of its own, which drllm runs only with "
            f"--trust-remote-code; read that code before you pass the flag"
        )
    if attention and re.search("attn_implementation|attention", text, re.I):
        advice = "give --attn-implementation sdpa or eager"
        if isinstance(error, ImportError):
            advice = f"install what it needs, or {advice}"
        return ConfigError(
            f"--attn-implementation {attention!r} can't be used with {name!r}: {message}; {advice}"
        )
    if isinstance(error, TypeError):
        return ConfigError(f"an option doesn't fit the model {name!r}: {message}")
    if isinstance(error, ImportError):
        return ModelError(f"model {name!r} needs a package that isn't installed: {message}")
    if "Unrecognized configuration class" in text:
        return ModelError(
            f"{name!r} isn't a decoder-only language model that transformers can open"
        )
    if name in ALIASES:
        message += f"; delete {ALIASES[name].find_checkpoint()} to convert it again"
    if isinstance(error, SafetensorError):
        return ModelError(f"the weights of {name!r} are broken or cut off: {message}")
    return ModelError(f"model {name!r} can't be opened: {message}")


@dataclasses.dataclass(frozen=True)
class RemoteBaseModel(BaseModel):
    """A base model whose weights are in other processes; here are its tokenizer and its shape.

    Attributes:
        remote_identity: The identity of the model with its weights.
        remote_runtime: How the model with its weights runs.
    """

    remote_identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remote_runtime: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """The entries by which manifests and router checkpoints recognise the model."""
        return dict(self.remote_identity)

    @property
    def runtime(self) -> dict[str, Any]:
        """How the model runs in the other processes."""
        return dict(self.remote_runtime)


def load_without_weights(
    config: ModelConfig, identity: Mapping[str, Any], runtime: Mapping[str, Any]
) -> RemoteBaseModel:
    """Load the tokenizer and the shape of a model whose weights are in other processes.

    The model's parameters are on torch's device `meta`: prompts can be tokenised and layers
    counted, but nothing can run.

    Args:
        config: Which model.
        identity: The identity that a process with the weights found.
        runtime: How the model runs there.

    Raises:
        ModelError: The model doesn't exist or can't be opened.
    """
    name = config.model
    if name in ALIASES:
        config = _resolve_alias(config)
    with hub.quiet():
        source, revision = locate(config, {})
        options = {"trust_remote_code": config.trust_remote_code, "revision": revision}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            shape = AutoConfig.from_pretrained(source, **options)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    shape,
                    dtype=getattr(torch, runtime["dtype"]),
                    attn_implementation=runtime["attn_implementation"],
                    trust_remote_code=config.trust_remote_code,
                )
        except _MODEL_ERRORS as error:
            raise _explain(error, config) from error
    model.name_or_path = config.model
    model.eval()
    model.requires_grad_(False)
    return RemoteBaseModel(
        model,
        _set_left_padding(tokenizer),
        name=config.model,
        revision=revision,
        remote_identity=identity,
        remote_runtime=runtime,
    )
