"""Settings of generation, and of the routers' depth."""

from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

from drllm.config.fields import Settings, basic, flag_of, setting
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """How text is generated."""

    max_new_tokens: int = basic(64, minimum=1, help="maximum tokens generated")
    chat: bool | None = basic(
        None,
        help="put prompts through the chat template, or not; default: as the routers were trained",
    )
    batch_size: int | None = setting(
        None,
        minimum=1,
        help="with --file: maximum prompts decoded together; default: 16",
    )
    temperature: float = basic(0.0, minimum=0.0, help="sampling temperature; 0 is greedy")
    top_p: float | None = setting(
        None,
        above=0.0,
        maximum=1.0,
        idle=("temperature", 0.0),
        help="sample from the likeliest tokens of this total probability; default: 1",
    )
    seed: int | None = setting(
        None,
        minimum=0,
        idle=("temperature", 0.0),
        help="sampling seed; default: 0",
    )

    def sampling(self) -> dict[str, Any]:
        """Return the options of transformers' `generate` that say how tokens are chosen.

        The flags say all of it: a model's own settings for sampling are not mixed in. A sampling
        setting at temperature 0 is refused.
        """
        self.check_effects()
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1}
        drawn = {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}
        return {"do_sample": True, "num_beams": 1, **drawn}


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Settings):
    """How deep the routers go: one knob, or none for the routers as they were trained."""

    depth_bias: float = setting(
        0.0,
        minimum=-1e6,
        maximum=1e6,
        help="price of an execution in logits; below 0 runs more layers",
    )
    target_executions: float | None = basic(
        None,
        minimum=1.0,
        help="mean executions a forward pass; finds the depth bias that gives them",
    )
    calibration: str | None = basic(
        None,
        value="FILE",
        idle=("target_executions", None),
        help="with --target-executions: prompts (.jsonl) that the bias is found on",
    )
    router_penalty: float | None = setting(
        None,
        minimum=-1.0,
        maximum=1.0,
        help="published knob: -1 skips all layers, 0.5 executes all",
    )
    static_routing: bool = setting(
        False,
        alias="is_static_routing",
        help="execute every layer, whatever the routers decide",
    )

    def knob(self) -> str | None:
        """Return the name of the setting that is turned, None where the routers decide alone.

        More than one knob, and a calibration set or a target without the other, are refused only
        here, since a file and the command line may each give a part of the settings.
        """
        given = [each.name for each in fields_of(self) if getattr(self, each.name) != each.default]
        names = [name for name in given if name != "calibration"]
        if len(names) > 1:
            flags = " and ".join(flag_of(name) for name in names)
            raise ConfigError(f"{flags} would each set the depth; leave all but one out")
        if self.target_executions is not None and self.calibration is None:
            raise ConfigError(
                f"--target-executions {self.target_executions:g} needs prompts to look on; give "
                f"a file of them as --calibration, for example supervision.jsonl"
            )
        self.check_effects()
        return names[0] if names else None
