"""Settings of the choice of targets."""

from dataclasses import dataclass

from drllm.config.fields import NamesIn, Settings, basic, setting


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Settings):
    """How one target path is chosen for each searched question."""

    target: str = basic(
        "least_kl",
        choices=NamesIn("drllm.supervision.rules:TARGETS"),
        help="rule that picks the target among the tried paths",
    )
    min_saving: float | None = basic(
        None,
        above=0.0,
        maximum=1.0,
        help="with --target least_kl: least share of the executions that a target saves; "
        "default: 0.05",
    )
    quotas: str | None = setting(
        None,
        value="TASK=N,...",
        help="maximum targets of a task, the first ones count: arc_easy=400,dart-1=200; "
        "default: no limit",
    )
    quota_improving: float | None = setting(
        None,
        above=0.0,
        maximum=1.0,
        help="keep this share of improving targets by dropping others (published: 0.30)",
    )
