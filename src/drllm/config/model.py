"""Settings of the base model and how it is loaded."""

import re
from dataclasses import dataclass

from drllm.config.fields import Settings, basic, setting
from drllm.errors import ConfigError, unknown_name

DEVICES = ("auto", "cpu", "cuda", "mps")
"""The accepted devices; `cuda:1` names one of several devices."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The base model and how it is loaded."""

    model: str = basic(
        "smollm2-135m",
        alias="model_id",
        help="base model: an alias, a hub id or a local folder",
    )
    revision: str | None = setting(None, help="branch, tag or commit of a hub model")
    dtype: str = basic(
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the weights; auto: bfloat16 on a GPU that supports it, else float32",
    )
    device: str = basic("auto", help="device to run on; auto: cuda, else mps, else cpu")
    attn_implementation: str | None = setting(
        None,
        help="attention implementation of transformers, e.g. sdpa",
    )
    trust_remote_code: bool = setting(False, help="run modelling code that comes with a hub model")
    bypass: str | None = setting(
        None,
        placeholder="PLACE",
        help="folder or file of 'drllm bypass', whose linear maps run in place of skipped layers; "
        "for search, train, generate and evaluate",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", self.device):
            raise ConfigError(
                "--device: " + unknown_name("device", self.device, DEVICES) + ", or e.g. cuda:1"
            )
