"""Settings of generation, and of the routers' depth."""

from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

from drllm.config.fields import Settings, basic, flag_of, setting
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """How text is generated."""

    max_new_tokens: int = basic(64, minimum=1, help="maximum number of new tokens")
    chat: bool | None = basic(
        None,
        help="use the chat template, or don't; default: as the routers were trained",
    )
    batch_size: int | None = setting(
        None,
        minimum=1,
        help="with --file: maximum prompts per batch; default: 16",
    )
    temperature: float = basic(0.0, minimum=0.0, help="sampling temperature; 0 is greedy")
    top_p: float | None = setting(
        None,
        above=0.0,
        maximum=1.0,
        idle=("temperature", 0.0),
        help="sample from the likeliest tokens up to this total probability; default: 1",
    )
    seed: int | None = setting(
        None,
        minimum=0,
        idle=("temperature", 0.0),
        help="seed of the sampling; default: 0",
    )

    def sampling(self) -> dict[str, Any]:
        """Return the options of transformers' `generate` that choose tokens.

        The model's own settings for sampling are overridden. A sampling setting at temperature 0
        is refused.
        """
        self.check_effects()
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1}
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": 0,
        }


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Settings):
    """The routers' depth: at most one of these settings; default: as they were trained."""

    depth_bias: float = setting(
        0.0,
        minimum=-1e6,
        maximum=1e6,
        help="cost of an execution in logits; below 0 runs more layers",
    )
    target_executions: float | None = basic(
        None,
        minimum=1.0,
        help="mean executions per forward pass; the depth bias for it is searched",
    )
    calibration: str | None = basic(
        None,
        value="FILE",
        idle=("target_executions", None),
        help="with --target-executions: prompts (.jsonl) to search the depth bias on",
    )
    router_penalty: float | None = setting(
        None,
        minimum=-1.0,
        maximum=1.0,
        help="published setting: -1 skips all layers, 0.5 executes all",
    )
    static_routing: bool = setting(
        False,
        alias="is_static_routing",
        help="execute every layer once and ignore the routers",
    )

    def knob(self) -> str | None:
        """Return the name of the setting that changes the depth; None if none does.

        Several of them, and a target without calibration prompts or the reverse, are refused here
        and not when the settings are made: a file and the command line may each give a part.
        """
        changed = [
            field.name for field in fields_of(self) if getattr(self, field.name) != field.default
        ]
        names = [name for name in changed if name != "calibration"]
        if len(names) > 1:
            flags = " and ".join(flag_of(name) for name in names)
            raise ConfigError(f"{flags} would each set the depth; leave all but one out")
        if self.target_executions is not None and self.calibration is None:
            raise ConfigError(
                f"--target-executions {self.target_executions:g} needs prompts; give a file of "
                f"them as --calibration, for example supervision.jsonl"
            )
        self.check_effects()
        return names[0] if names else None
