"""How fast the features that routers are trained on are collected, against one prompt at a time.

Ours: `collect_features`, one pass of the base model in batches, each prompt along its own target
path; the features are written to disk.
Theirs: each prompt alone, layer by layer along its path. It knows models that are laid out like
Llama's.

Both read the same windows, and every mean is compared. The bound is what the layers of all paths
have to run, at the least that a token costs in a layer.

    python benchmarks/features.py [--quick] [--json FILE] [--clock cpu] [--questions N]
        [--model MODEL] [--device DEVICE] [--dtype DTYPE]
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import bound, operations
from common.comparison import Comparison
from common.literal_training import read_along
from training import CONFIG, collect, draw_targets

from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.records.supervision import SupervisionRecord

QUICK = {"questions": 32, "repeats": 1}
WHOLE = {"questions": 160, "repeats": 3}
TOLERANCE = 1e-3
"""How far, as a share of the largest mean, the two ways' means may be apart in float32."""

OURS = "one pass in batches, written to disk (collect_features)"
THEIRS = "one prompt at a time, layer by layer"


class TimedFeatures(NamedTuple):
    """What one way collected: the windows' means `[N, L, W, D]`, and its seconds."""

    means: torch.Tensor
    seconds: float


def count_seconds(base: BaseModel, records: Sequence[SupervisionRecord], clock: Any) -> float:
    """Return the least seconds that the layers of all paths take."""
    lengths = [len(encode(base.tokenizer, record.prompt)) for record in records]
    num_tokens = 0  # each execution of a layer counted
    for length, record in zip(lengths, records, strict=True):
        num_tokens += length * sum(record.optimal_layer_config)
    return num_tokens * bound.cheapest(base, round(statistics.fmean(lengths)), clock).layers


def collect_in_batches(
    base: BaseModel, records: Sequence[SupervisionRecord], clock: Any
) -> TimedFeatures:
    """Collect the features as training does."""
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        features = collect(base, records, Path(folder))
        seconds = clock() - started
        return TimedFeatures(features.rows(range(len(records))), seconds)


def collect_one_by_one(
    base: BaseModel, records: Sequence[SupervisionRecord], clock: Any
) -> TimedFeatures:
    """Collect the features of each prompt alone."""
    started = clock()
    features = read_along(base.model, base.tokenizer, records, CONFIG.num_windows)
    seconds = clock() - started
    return TimedFeatures(features.rows(range(len(records))), seconds)


def compare(
    base: BaseModel, records: Sequence[SupervisionRecord], repeats: int, clock: Any
) -> dict[str, Any]:
    """Collect both ways, in turns, and return the times and how far the means are apart."""
    ways = {
        "ours": partial(collect_in_batches, base, records, clock),
        "theirs": partial(collect_one_by_one, base, records, clock),
    }
    runs = common.run_in_turns(ways, repeats)
    speedups = [run["theirs"].seconds / run["ours"].seconds for run in runs]
    theirs_s = statistics.median(run["theirs"].seconds for run in runs)
    expected = runs[-1]["theirs"].means
    difference = (runs[-1]["ours"].means - expected).abs().max() / expected.abs().max()
    bound_s = count_seconds(base, records, clock)
    ours_s = statistics.median(run["ours"].seconds for run in runs)
    num_tokens = len(encode(base.tokenizer, records[0].prompt))
    return {
        "questions": len(records),
        "speedup": statistics.median(speedups),
        "theirs_s": theirs_s,
        "ours_s": ours_s,
        "bound": theirs_s / bound_s,
        "rest": operations.explain_rest(ways["ours"], base, num_tokens, bound_s / ours_s),
        "difference": float(difference),
    }


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__ or "")
    common.add_clock(parser)
    parser.add_argument("--questions", type=int, help="whose features are collected")
    common.add_model(parser, devices=True, dtypes=True)
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    records = draw_targets(base, sizes["questions"], None)
    result = compare(base, records, sizes["repeats"], common.clock_of(options))
    print(
        f"speedup {result['speedup']:.2f} (median of {sizes['repeats']}): {result['theirs_s']:.2f} "
        f"s one by one, {result['ours_s']:.2f} s in batches; {result['questions']} questions\n"
        f"  {bound.in_words(result)}\n"
        f"  the means differ by at most {result['difference']:.1e} of the largest"
    )
    if base.model.dtype == torch.float32 and result["difference"] > TOLERANCE:
        raise SystemExit(f"the means differ by more than {TOLERANCE}; no figures are written")
    figures = {
        "speedup": result["speedup"],
        "repeats": sizes["repeats"],
        "ours": OURS,
        "theirs": THEIRS,
        **common.describe_run(base, options),
        "result": result,
    }
    comparison = Comparison("collect features", result["speedup"], result["bound"], result["rest"])
    common.write_figures(options, figures, [comparison])


if __name__ == "__main__":
    main()
