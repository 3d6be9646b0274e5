"""Settings of `drllm generate`: how text is generated, and how many layers the routers run.

`drllm lm-eval` takes the settings of `DepthConfig` too.
"""

from dataclasses import dataclass, fields
from typing import Any

from drllm.config.fields import Settings, basic, setting, to_flag
from drllm.errors import ConfigError

MIN_TEMPERATURE = 1e-6  # logits divided by far less aren't finite, and can't be sampled from


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """How text is generated."""

    max_new_tokens: int = basic(
        64, minimum=1, placeholder="TOKENS", help="maximum number of new tokens"
    )
    chat: bool | None = basic(
        None,
        help="use the chat template; default: as the routers were trained",
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
        no_effect_if=("temperature", 0.0),
        help="sample only from the likeliest tokens, up to this total probability; default: 1",
    )
    seed: int | None = setting(
        None,
        minimum=0,
        no_effect_if=("temperature", 0.0),
        help="seed of the sampling; default: 0",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"--temperature is {self.temperature:g}; give at least {MIN_TEMPERATURE:g}, or 0 "
                f"for greedy decoding"
            )

    def sampling_options(self) -> dict[str, Any]:
        """Return the options of transformers' `generate` that say how tokens are chosen.

        The options override the model's own generation config. Temperature 0 is greedy decoding.
        Raises ConfigError if sampling settings are given with temperature 0.
        """
        self.check_effects()
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1}
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": 0,  # no limit
        }


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Settings):
    """How many layers the routers run; the default leaves them as they were trained.

    At most one of these settings may be given, apart from `calibration`.
    """

    depth_bias: float = basic(
        0.0,
        minimum=-1e6,
        maximum=1e6,
        placeholder="LOGITS",
        help="cost of one execution, in logits; a negative cost makes the routers run more layers",
    )
    target_executions: float | None = basic(
        None,
        minimum=1.0,
        help="mean executions per forward pass; drllm searches for the depth bias that gives it",
    )
    calibration: str | None = basic(
        None,
        placeholder="FILE",
        no_effect_if=("target_executions", None),
        help="with --target-executions: file of prompts (.jsonl) to search the depth bias on",
    )
    router_penalty: float | None = basic(
        None,
        minimum=-1.0,
        maximum=1.0,
        help="setting of the published code: -1 skips all layers, 0.5 executes all",
    )
    static_routing: bool = basic(
        False,
        alias="is_static_routing",
        help="execute every layer once and ignore the routers",
    )

    def find_setting(self) -> str | None:
        """Return the name of the setting that changes the depth; None if no setting does.

        Raises ConfigError for settings that `check_combination` refuses.
        """
        self.check_combination()
        names = self._list_depth_settings()
        return names[0] if names else None

    def check_combination(self) -> None:
        """Refuse more than one setting of the depth, and a target without calibration prompts.

        Making the settings doesn't check this, because a file and the command line may each give a
        part of the settings.
        """
        names = self._list_depth_settings()
        if len(names) > 1:
            flags = " and ".join(to_flag(name) for name in names)
            raise ConfigError(f"{flags} would each set the depth; leave all but one out")
        if self.target_executions is not None and self.calibration is None:
            raise ConfigError(
                f"--target-executions {self.target_executions:g} needs prompts; give a file of "
                f"them as --calibration, for example supervision.jsonl"
            )
        self.check_effects()

    def _list_depth_settings(self) -> list[str]:
        """List the settings that differ from their default, except `calibration`.

        The calibration prompts are only used to reach `target_executions`.
        """
        settings = [field for field in fields(self) if field.name != "calibration"]
        return [field.name for field in settings if getattr(self, field.name) != field.default]
