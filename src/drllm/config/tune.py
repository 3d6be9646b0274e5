"""Settings of the search for static paths."""

from dataclasses import dataclass

from drllm.config.fields import Settings, basic, incidental, setting


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Settings):
    """The search for one path that serves a whole task."""

    tasks: str | None = basic(
        None,
        value="TASKS",
        alias="dataset",
        help="tasks (comma list): ours, the harness', FILE.jsonl, or OWNER/NAME of the hub",
    )
    data_dir: str | None = incidental(None, help="folder with SPLIT.jsonl[.gz] files by task")
    max_skipped: float | None = basic(
        None,
        above=0.0,
        help="maximum layers left out; default: a sixth of the layers",
    )
    objective: str | None = basic(
        None,
        choices=("gold_logprob", "next_token_loss", "kl"),
        help="what a path should keep; default: gold_logprob with options, next_token_loss "
        "with other answers, kl for prompts without any",
    )
    beam: int = setting(3, minimum=1, help="paths of a level that are extended")
    num_fit: int = setting(
        300,
        minimum=1,
        help="maximum questions of a task that paths are fitted on",
    )
    num_judged: int | None = setting(
        None,
        minimum=2,
        help="maximum questions of a task that choose a path, and as many that test it; "
        "default: all",
    )
    max_loss: float = setting(
        0.1,
        minimum=0.0,
        help="stop extending paths that lose more than this many nats of the objective",
    )
    minutes: float | None = basic(
        None,
        above=0.0,
        decisive=False,
        help="begin no further level after this time; a later run with more time continues",
    )
    state_cache_gb: float | None = incidental(
        None,
        above=0.0,
        help="GB for shared path prefixes; default: a quarter of free memory, at most 16",
    )
    seed: int = setting(0, minimum=0, help="seed of --num-fit and --num-judged")
