"""What static paths, healed or not, change about a model on questions that nothing was fitted on.

Of each task it asks the questions that `drllm tune` and `drllm heal` leave to be tested on, or with
`--all` every question, for sets that nothing was fitted on. Where there are options: accuracy, and
the right option's log-probability among them. Of all tasks: the next-token loss of questions with
their right answers, and of the right answers alone where they are read. Everything is a difference
from the full path, with its 95 % interval.

    python benchmarks/healed.py --paths FILE[:NAME],... [--tasks TASKS] [--all] [--questions N]
        [--texts N] [--quick] [--json FILE] [--data-dir DIR] [--model MODEL] [--device DEVICE]
        [--dtype DTYPE]
"""

from __future__ import annotations

from typing import Any

import common
from common.quantities import QUICK, WHOLE, compare_with_full, measure_quantities
from common.questions import read_all_examples

from drllm.config import TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import install_path
from drllm.paths import StaticPath
from drllm.records.static_paths import TEST, read_path_list
from drllm.tuning.data_splits import split_tasks


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--paths", required=True, help="static paths, as drllm evaluate takes them")
    parser.add_argument("--tasks", default=TuneConfig().tasks, help="comma list")
    parser.add_argument("--all", action="store_true", help="ask every question of the tasks")
    parser.add_argument("--questions", type=int, help="with options, of a task at most")
    parser.add_argument("--texts", type=int, help="whose next-token loss is read, of a task")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    config = TuneConfig(data_dir=options.data_dir, num_fit=LARGEST_INT)
    divided = split_tasks(config, options.tasks)
    files = read_path_list(options.paths)
    base = common.base_of(options)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    paths = {"full": StaticPath(range(base.num_layers))}
    paths |= {name: install_path(routed.injection, file) for name, file in files.items()}
    options.clock = "none"
    figures: dict[str, Any] = {
        "of": common.describe_run(base, options),
        "part": "all" if options.all else TEST,
        "tasks": {},
    }
    for parts in divided:
        if options.all:
            parts.examples[TEST] = read_all_examples(parts.task, options.data_dir)
        found = measure_quantities(routed, parts, TEST, [*paths.values()], sizes)
        name = parts.task.name
        figures["tasks"][name] = compare_with_full(name, TEST, found, [*paths])
    common.write_figures(options, figures)


if __name__ == "__main__":
    main()
