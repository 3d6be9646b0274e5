"""How much faster questions are scored and answered than by the harness' own class.

Ours: `RoutedLM` in lm-evaluation-harness, every layer executed once: all continuations of a
question behind one copy of its context, beginnings that prompts share read once. Answers that are
generated stand behind five worked examples.
Theirs: the harness' `hf` class, one row for each continuation or answer.
Both answer the same requests with the same batch size, taking turns in one run, and every
log-probability and verdict, or text, is compared. Then the same with routers that read the prompts
and are biased to execute every layer, which is what routers cost.

    python benchmarks/evaluation.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--device DEVICE] [--dtype DTYPE] [--model MODEL] [--questions N] [--batch-size N]
        [--tasks NAMES] [--answers N] [--answer-tokens N]
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import bound
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.models.base.identity import fingerprint
from drllm.models.base.load import BaseModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import RouterPolicy
from drllm.tasks.examples import OPTIONS_REWARD, Prompt, choose
from drllm.tasks.registry import get_task
from drllm.tasks.worked import WorkedTask

TASKS = ("builtin_facts", "builtin_arithmetic")
REAL_TASKS = ("arc_easy", "hellaswag", "commonsense_qa", "gsm8k")
"""With --data-dir."""
SHOTS = 5
TOLERANCE = 1e-3
"""Nats that the log-probability of a choice may differ by."""

QUICK = {"repeats": 1, "questions": 32, "answers": 8, "answer_tokens": 16}
WHOLE = {"repeats": 5, "questions": 200, "answers": 32, "answer_tokens": 128}

OURS = "RoutedLM: the choices of a question behind one copy of its context"
THEIRS = "lm-evaluation-harness' hf class: a row for each choice"


def requests_of(task_name: str, sizes: dict[str, int], data_dir: Path | None) -> list[Instance]:
    """Return the requests of some questions, as the harness makes them."""
    task = get_task(task_name)
    if OPTIONS_REWARD not in task.rewards:
        shown = choose(task.examples("search", data_dir), SHOTS, seed=0)
        worked = WorkedTask(task, shown, sizes["answer_tokens"])
        examples = choose(task.examples("select", data_dir), sizes["answers"], seed=0)
        how = {"until": [], "max_gen_toks": sizes["answer_tokens"], "do_sample": False}
        return [
            Instance("generate_until", {}, (worked.prompt(each, "boxed").text, how), 0)
            for each in examples
        ]
    examples = choose(task.examples("test", data_dir), sizes["questions"], seed=0)
    return choices_of(task_name, [task.prompt(example, OPTIONS_REWARD) for example in examples])


def choices_of(task_name: str, prompts: Sequence[Prompt]) -> list[Instance]:
    """Return the requests that score the options of prompts, as the harness makes them."""
    return [
        Instance("loglikelihood", {}, (prompt.text, choice), idx, (task_name, doc, 1))
        for doc, prompt in enumerate(prompts)
        for idx, choice in enumerate(prompt.continuations)
    ]


def bound_of(
    base: BaseModel, lm: RoutedLM, requests: list[Instance], answers: list[Any], clock: common.Clock
) -> float:
    """Return the seconds of a method which shares all that can be (see `common.bound`)."""
    full = (1,) * base.num_layers
    prompts: list[list[int]] = []
    after: list[int] = []
    said: dict[Any, list[int]] = {}
    for request, answer in zip(requests, answers, strict=True):
        if request.request_type == "generate_until":
            said[len(prompts), full] = lm.tok_encode(answer, add_special_tokens=False)
            prompts.append(lm.tok_encode(request.args[0]))
            after.append(0)
            continue
        context, option = lm._encode_pair(*request.args)
        if request.idx == 0:
            said[len(prompts), full] = []
            prompts.append(context)
            after.append(0)
        after[-1] += len(option) - 1
    return bound.seconds_to_search(base, prompts, after, said, clock)


def executing_routers(base: BaseModel) -> RouterStack:
    """Return routers that read every prompt and always execute."""
    config = RouterConfig(
        num_layers=base.num_layers,
        hidden_size=base.model.config.hidden_size,
        base_model=base.name,
        base_fingerprint=fingerprint(base.model),
    )
    return common.make_executing(RouterStack(config, torch.Generator().manual_seed(0)))


def compare(
    base: BaseModel, task: str, sizes: dict[str, int], data_dir: Path | None, clock: common.Clock
) -> dict[str, Any]:
    """Time both ways on one task's questions, and compare their answers."""
    requests = requests_of(task, sizes, data_dir)
    kind = requests[0].request_type
    stock = HFLM(
        pretrained=copy.deepcopy(base.model),
        tokenizer=base.tokenizer,
        batch_size=sizes["batch_size"],
    )
    ours = RoutedLM(base, batch_size=sizes["batch_size"])
    full, routers = ours.policy, RouterPolicy(executing_routers(base).to(base.model.device))

    def timed(lm: HFLM) -> tuple[float, list[Any]]:
        started = clock()
        answers = getattr(lm, kind)(requests, disable_tqdm=True)
        return clock() - started, answers

    runs = []
    try:
        for repeat in range(sizes["repeats"] + 1):  # the first one warms up
            ways: dict[str, tuple[HFLM, Any]] = {
                "theirs_s": (stock, None),
                "ours_s": (ours, full),
                "routers_s": (ours, routers),
            }
            run, answers = {}, {}
            for name, (lm, policy) in sorted(ways.items(), reverse=repeat % 2 == 1):
                if policy is not None:
                    ours.policy = policy
                run[name], answers[name] = timed(lm)
            runs.append(run)
    finally:
        ours.routed.detach()
    pairs = list(zip(answers["theirs_s"], answers["ours_s"], strict=True))
    timed_runs = runs[1:]
    speedups = [run["theirs_s"] / run["ours_s"] for run in timed_runs]
    overheads = [run["routers_s"] / run["ours_s"] for run in timed_runs]
    bound_s = bound_of(base, ours, requests, answers["ours_s"], clock)
    found = {
        "task": task,
        "bound": statistics.median(run["theirs_s"] / bound_s for run in timed_runs),
        "questions": sizes["questions"],
        "requests": len(requests),
        "speedup": statistics.median(speedups),
        "router_overhead": statistics.median(overheads),
        "runs": timed_runs,
    }
    if kind == "generate_until":
        differ = sum(theirs != own for theirs, own in pairs)
        return {**found, "questions": len(requests), "verdicts_that_differ": differ}
    routed = list(zip(answers["ours_s"], answers["routers_s"], strict=True))
    away = [abs(slow[0] - fast[0]) for slow, fast in pairs]
    return {
        **found,
        "largest_difference": max(away),
        "far_apart": sum(not each <= TOLERANCE for each in away),
        "verdicts_that_differ": sum(slow[1] != fast[1] for slow, fast in pairs)
        + best_differ(requests, answers["theirs_s"], answers["ours_s"]),
        "routers_largest_difference": max(abs(a[0] - b[0]) for a, b in routed),
    }


def best_differ(requests: list[Instance], theirs: list[Any], ours: list[Any]) -> int:
    """Return on how many questions the likeliest choice is another one."""
    best: dict[int, tuple[list[float], list[float]]] = {}
    for request, slow, fast in zip(requests, theirs, ours, strict=True):
        of_doc = best.setdefault(request.doc_id, ([], []))
        of_doc[0].append(slow[0])
        of_doc[1].append(fast[0])
    return sum(a.index(max(a)) != b.index(max(b)) for a, b in best.values())


def report(result: dict[str, Any]) -> None:
    """Print what was found about one task."""
    theirs, ours = (
        statistics.median(run[name] for run in result["runs"]) for name in ("theirs_s", "ours_s")
    )
    is_scored = "largest_difference" in result
    requests = f"{result['requests']} choices" if is_scored else f"each behind {SHOTS} worked ones"
    apart = ""
    if is_scored:
        apart = f"largest difference of a log-probability {result['largest_difference']:.1e}, "
    print(
        f"{result['task']}: speedup {result['speedup']:.2f} ({len(result['runs'])} repeats); "
        f"{theirs:.1f} s by the harness' class, {ours:.1f} s ours; {result['questions']} "
        f"questions, {requests}\n"
        f"  {bound.in_words(result)}\n"
        f"  {apart}{result['verdicts_that_differ']} {'verdicts' if is_scored else 'texts'} differ\n"
        f"  with routers that execute everything{'' if is_scored else ', which read it all'}, "
        f"{result['router_overhead']:.3f} times the time"
    )


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__)
    common.add_clock(parser)
    parser.add_argument("--data-dir", type=Path, help="real questions in place of built-in ones")
    parser.add_argument("--tasks", help="comma list")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--questions", type=int, help="of each task with options")
    parser.add_argument("--answers", type=int, help="of each task whose answers are generated")
    parser.add_argument("--answer-tokens", type=int, help="of each of them")
    parser.add_argument("--batch-size", type=int, default=32, help="rows a pass, both ways")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE) | {"batch_size": options.batch_size}
    clock = common.clock_of(options)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    base = common.base_of(options)
    names = options.tasks.split(",") if options.tasks else REAL_TASKS if options.data_dir else TASKS
    results = []
    for name in names:
        results.append(compare(base, name, sizes, options.data_dir, clock))
        report(results[-1])
        common.refuse_differences(base, f"answers of {name}", results[-1]["verdicts_that_differ"])
        common.refuse_differences(
            base, f"log-probabilities of {name}", results[-1].get("far_apart", 0)
        )
    figures = {
        "speedup": {result["task"]: result["speedup"] for result in results},
        "bound": {result["task"]: result["bound"] for result in results},
        "overhead": {r["task"]: r["router_overhead"] for r in results if "largest_difference" in r},
        "verdicts_that_differ": {r["task"]: r["verdicts_that_differ"] for r in results},
        "repeats": sizes["repeats"],
        "ours": OURS,
        "theirs": THEIRS,
        **common.describe_run(base, options),
        "results": results,
    }
    common.write_figures(options, figures)


if __name__ == "__main__":
    main()
