"""Settings of `drllm supervise`, which chooses the target path of each searched question."""

from dataclasses import dataclass

from drllm.config.fields import NamesIn, Settings, basic


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Settings):
    """How the target path of each searched question is chosen."""

    target: str = basic(
        "least_kl",
        choices=NamesIn("drllm.supervision.rules:TARGETS"),
        help="rule that chooses the target among the tried paths; 'drllm ls targets' explains it",
    )
    min_saving: float | None = basic(
        None,
        above=0.0,
        maximum=1.0,
        help="with --target least_kl: minimum share of executions that a target saves; default: "
        "0.05",
    )
    quotas: str | None = basic(
        None,
        placeholder="TASK=N,...",
        help="maximum targets per task, e.g. arc_easy=400,dart-1=200; the first targets are kept; "
        "default: no limit",
    )
    quota_improving: float | None = basic(
        None,
        above=0.0,
        maximum=1.0,
        help="minimum share of improving targets; targets that aren't improving are dropped to "
        "reach it (published: 0.30)",
    )
