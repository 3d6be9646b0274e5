"""Settings of the stages that divide their work: who runs the blocks."""

from dataclasses import dataclass

from drllm.config.fields import Settings, incidental


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig(Settings):
    """Who runs the work of a stage: this process, or workers of Ray.

    Results don't depend on it.
    """

    executor: str = incidental(
        "local",
        basic=True,
        choices=("local", "ray"),
        help="where to run the work: in this process, or on Ray, with --num-workers and "
        "--ray-address",
    )
    num_workers: int | None = incidental(
        None,
        minimum=1,
        no_effect_if=("executor", "local"),
        help="with --executor ray: number of workers, one per device; default: one for each device",
    )
    ray_address: str | None = incidental(
        None,
        placeholder="HOST:PORT",
        no_effect_if=("executor", "local"),
        help="with --executor ray: address of a cluster, or auto; default: Ray is started here",
    )
