"""Measure how much faster questions are scored and answered than by the harness' own class.

Ours is `RoutedLM` in lm-evaluation-harness, with every layer executed once. All options of a
question stand behind one copy of its context, and a beginning that prompts share is read once in
each repeat. Theirs is the harness' class `hf`, with one row for each option or answer.

Both answer the same requests in one run with the same batch size, and take turns. Every
log-probability and verdict is compared, or every text if answers are generated. Generated answers
stand behind five worked examples. A third way is ours with routers that read the prompts but always
decide to execute, which shows what routers cost.

    python benchmarks/evaluation.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--device DEVICE] [--dtype DTYPE] [--model MODEL] [--questions N] [--batch-size N]
        [--tasks NAMES] [--answers N] [--answer-tokens N] [--repeats N]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import bound, operations
from common.comparison import compare_each
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.model.identity import fingerprint
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import Policy, RouterPolicy
from drllm.paths import Decisions, full_decisions
from drllm.tasks.base import Task
from drllm.tasks.examples import OPTIONS_REWARD, Prompt, choose
from drllm.tasks.registry import get_task
from drllm.tasks.worked import WorkedTask

TASKS = ("builtin_facts", "builtin_arithmetic")
REAL_TASKS = ("arc_easy", "hellaswag", "commonsense_qa", "gsm8k")
"""With --data-dir."""
SHOTS = 5
TOLERANCE = 1e-3
"""How far, in nats, the two log-probabilities of an option may be apart."""

QUICK = {"repeats": 1, "questions": 32, "answers": 8, "answer_tokens": 16}
WHOLE = {"repeats": 5, "questions": 200, "answers": 32, "answer_tokens": 128}

OURS = "RoutedLM: the choices of a question behind one copy of its context"
THEIRS = "lm-evaluation-harness' hf class: a row for each choice"


def make_requests(task_name: str, sizes: dict[str, int], data_dir: Path | None) -> list[Instance]:
    """Return the requests for some questions of a task, as the harness makes them."""
    task = get_task(task_name)
    if OPTIONS_REWARD not in task.rewards:
        return make_answer_requests(task, sizes, data_dir)
    examples = choose(task.examples("test", data_dir), sizes["questions"], seed=0)
    prompts = [task.prompt(example, OPTIONS_REWARD) for example in examples]
    return make_option_requests(task_name, prompts)


def make_answer_requests(
    task: Task, sizes: dict[str, int], data_dir: Path | None
) -> list[Instance]:
    """Return the requests for generated answers to some questions of a task."""
    shots = choose(task.examples("search", data_dir), SHOTS, seed=0)
    worked = WorkedTask(task, shots, sizes["answer_tokens"])
    settings = {"until": [], "max_gen_toks": sizes["answer_tokens"], "do_sample": False}
    requests = []
    for example in choose(task.examples("select", data_dir), sizes["answers"], seed=0):
        text = worked.prompt(example, "boxed").text
        requests.append(Instance("generate_until", {}, (text, settings), 0))
    return requests


def make_option_requests(task_name: str, prompts: Sequence[Prompt]) -> list[Instance]:
    """Return the requests that score the options of prompts, as the harness makes them."""
    requests = []
    for doc_id, prompt in enumerate(prompts):
        for number, option in enumerate(prompt.continuations):
            metadata = (task_name, doc_id, 1)
            arguments = (prompt.text, option)
            requests.append(Instance("loglikelihood", {}, arguments, number, metadata))
    return requests


def find_bound(
    base: BaseModel, lm: HFLM, requests: list[Instance], answers: list[Any], clock: common.Clock
) -> float:
    """Return the seconds of a method that shares all that can be shared, see `common.bound`.

    The language model only encodes the requests.
    """
    full = full_decisions(base.num_layers)
    prompts: list[list[int]] = []
    num_after: list[int] = []  # tokens of options that are read behind each prompt
    answer_tokens: dict[tuple[int, Decisions], list[int]] = {}
    for request, answer in zip(requests, answers, strict=True):
        if request.request_type == "generate_until":
            tokens = lm.tok_encode(answer, add_special_tokens=False)
            answer_tokens[len(prompts), full] = tokens
            prompts.append(lm.tok_encode(request.args[0]))
            num_after.append(0)
            continue
        context, option = lm._encode_pair(*request.args)
        if request.idx == 0:  # the first option of a question
            answer_tokens[len(prompts), full] = []
            prompts.append(context)
            num_after.append(0)
        num_after[-1] += len(option) - 1  # the last token of an option isn't read
    return bound.seconds_to_search(base, prompts, num_after, answer_tokens, clock)


def make_routers(base: BaseModel) -> RouterStack:
    """Return routers that read every prompt and always decide to execute."""
    config = RouterConfig(
        num_layers=base.num_layers,
        hidden_size=base.model.config.hidden_size,
        base_model=base.name,
        base_fingerprint=fingerprint(base.model),
    )
    routers = RouterStack(config, torch.Generator().manual_seed(0))
    return common.make_executing(routers).to(base.model.device)


class TimedAnswers(NamedTuple):
    """What a language model of the harness answered to all requests, and the seconds it took."""

    seconds: float
    answers: list[Any]  # (log-probability, is it the likeliest text?) per option, or texts


def time_answers(lm: HFLM, requests: list[Instance], clock: common.Clock) -> TimedAnswers:
    """Let a language model of the harness answer all requests."""
    answer = getattr(lm, requests[0].request_type)
    started = clock()
    answers = answer(requests, disable_tqdm=True)
    return TimedAnswers(clock() - started, answers)


def time_ours(
    routed: RoutedModel,
    batch_size: int,
    policy: Policy | None,
    requests: list[Instance],
    clock: common.Clock,
) -> TimedAnswers:
    """Let a new `RoutedLM` answer all requests under a policy; None executes every layer once.

    One that has answered before keeps the beginning that the prompts share, and would read less
    than theirs does. Making a new one isn't timed.
    """
    lm = RoutedLM(routed, batch_size=batch_size)
    if policy is not None:
        lm.policy = policy
    return time_answers(lm, requests, clock)


def answer_once(
    base: BaseModel, batch_size: int, requests: list[Instance], clock: common.Clock
) -> None:
    """Answer all requests our way, along the full path, and detach."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        time_ours(routed, batch_size, None, requests, clock)
    finally:
        routed.detach()


def compare(
    base: BaseModel, task: str, sizes: dict[str, int], data_dir: Path | None, clock: common.Clock
) -> dict[str, Any]:
    """Time all ways on one task's questions, and compare their answers."""
    requests = make_requests(task, sizes, data_dir)
    theirs = HFLM(
        pretrained=copy.deepcopy(base.model),
        tokenizer=base.tokenizer,
        batch_size=sizes["batch_size"],
    )
    routers = RouterPolicy(make_routers(base))
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    ours = partial(time_ours, routed, sizes["batch_size"])
    ways = {
        "theirs_s": partial(time_answers, theirs, requests, clock),
        "ours_s": partial(ours, None, requests, clock),
        "routers_s": partial(ours, routers, requests, clock),
    }
    try:
        turns = common.run_in_turns(ways, sizes["repeats"])
    finally:
        routed.detach()
    runs = [{name: timed.seconds for name, timed in turn.items()} for turn in turns]
    answers = {name: timed.answers for name, timed in turns[-1].items()}
    bound_s = find_bound(base, theirs, requests, answers["ours_s"], clock)
    run_ours = partial(answer_once, base, sizes["batch_size"], requests, clock)
    num_tokens = len(theirs.tok_encode(requests[0].args[0]))
    share = statistics.median(bound_s / run["ours_s"] for run in runs)
    result: dict[str, Any] = {
        "task": task,
        "bound": statistics.median(run["theirs_s"] / bound_s for run in runs),
        "rest": operations.explain_rest(run_ours, base, num_tokens, share),
        "questions": sizes["questions"],
        "requests": len(requests),
        "speedup": statistics.median(run["theirs_s"] / run["ours_s"] for run in runs),
        "router_overhead": statistics.median(run["routers_s"] / run["ours_s"] for run in runs),
        "runs": runs,
    }
    if requests[0].request_type == "generate_until":
        result["questions"] = len(requests)
        pairs = zip(answers["theirs_s"], answers["ours_s"], strict=True)
        result["verdicts_that_differ"] = sum(text != our_text for text, our_text in pairs)
        return result
    return result | compare_options(requests, answers)


def compare_options(requests: list[Instance], answers: dict[str, list[Any]]) -> dict[str, Any]:
    """Compare the ways' log-probabilities of options, and what follows from them.

    Two verdicts are compared: whether an option is the likeliest text, and which option of a
    question is likeliest.
    """
    theirs = answers["theirs_s"]
    ours = answers["ours_s"]
    differences = find_differences(theirs, ours)
    num_greedy = 0  # options that are the likeliest text by one way only
    for their_answer, our_answer in zip(theirs, ours, strict=True):
        num_greedy += their_answer[1] != our_answer[1]
    # NaN isn't within the tolerance, and `difference > TOLERANCE` would miss it.
    far_apart = [difference for difference in differences if not difference <= TOLERANCE]
    return {
        "largest_difference": max(differences),
        "far_apart": len(far_apart),
        "verdicts_that_differ": num_greedy + count_other_choices(requests, theirs, ours),
        "routers_largest_difference": max(find_differences(ours, answers["routers_s"])),
    }


def find_differences(left: list[Any], right: list[Any]) -> list[float]:
    """Return how far apart two ways' log-probabilities of each option are."""
    return [abs(first[0] - second[0]) for first, second in zip(left, right, strict=True)]


def count_other_choices(requests: list[Instance], theirs: list[Any], ours: list[Any]) -> int:
    """Return for how many questions the two ways find different options likeliest."""
    their_logprobs: dict[int, list[float]] = {}
    our_logprobs: dict[int, list[float]] = {}
    for request, their_answer, our_answer in zip(requests, theirs, ours, strict=True):
        their_logprobs.setdefault(request.doc_id, []).append(their_answer[0])
        our_logprobs.setdefault(request.doc_id, []).append(our_answer[0])
    num_different = 0
    for doc_id in their_logprobs:
        their_choice = find_likeliest(their_logprobs[doc_id])
        our_choice = find_likeliest(our_logprobs[doc_id])
        num_different += their_choice != our_choice
    return num_different


def find_likeliest(logprobs: list[float]) -> int:
    """Return the number of the first option with the highest log-probability."""
    return logprobs.index(max(logprobs))


def report(result: dict[str, Any]) -> None:
    """Print the result of one task."""
    runs = result["runs"]
    theirs_s = statistics.median(run["theirs_s"] for run in runs)
    ours_s = statistics.median(run["ours_s"] for run in runs)
    if "largest_difference" in result:
        requests = f"{result['requests']} choices"
        difference = f"largest difference of a log-probability {result['largest_difference']:.1e}, "
        verdicts = "verdicts"
        routers = "with routers that execute everything"
    else:
        requests = f"each behind {SHOTS} worked ones"
        difference = ""
        verdicts = "texts"
        routers = "with routers that execute everything, which read it all"
    print(
        f"{result['task']}: speedup {result['speedup']:.2f} ({len(runs)} repeats); "
        f"{theirs_s:.1f} s by the harness' class, {ours_s:.1f} s ours; {result['questions']} "
        f"questions, {requests}"
    )
    print(f"  {bound.in_words(result)}")
    print(f"  {difference}{result['verdicts_that_differ']} {verdicts} differ")
    print(f"  {routers}, {result['router_overhead']:.3f} times the time")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = common.parser_of(__doc__)
    common.add_clock(parser)
    parser.add_argument(
        "--data-dir", type=Path, help="use real questions from here, not the built-in ones"
    )
    parser.add_argument("--tasks", help="names, separated by commas")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--questions", type=int, help="questions per task with options")
    parser.add_argument("--answers", type=int, help="questions per task with generated answers")
    parser.add_argument("--answer-tokens", type=int, help="maximum tokens of a generated answer")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="rows of a forward pass, for all ways"
    )
    parser.add_argument("--repeats", type=int)
    return parser.parse_args()


def choose_tasks(options: argparse.Namespace) -> Sequence[str]:
    """Return the names of the tasks to measure."""
    if options.tasks:
        names: list[str] = options.tasks.split(",")
        return names
    if options.data_dir:
        return REAL_TASKS
    return TASKS


def measure(
    base: BaseModel, options: argparse.Namespace, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """Compare the ways on each task, and print each result as soon as it is there."""
    clock = common.clock_of(options)
    results = []
    for name in choose_tasks(options):
        result = compare(base, name, sizes, options.data_dir, clock)
        report(result)
        common.refuse_differences(base, f"answers of {name}", result["verdicts_that_differ"])
        far_apart = result.get("far_apart", 0)
        common.refuse_differences(base, f"log-probabilities of {name}", far_apart)
        results.append(result)
    return results


def main() -> None:
    """Run the comparison and print it."""
    options = parse_options()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    sizes["batch_size"] = options.batch_size
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    base = common.base_of(options)
    results = measure(base, options, sizes)
    with_options = [result for result in results if "largest_difference" in result]
    figures: dict[str, Any] = {}
    for key in ("speedup", "bound"):
        figures[key] = {result["task"]: result[key] for result in results}
    figures["overhead"] = {result["task"]: result["router_overhead"] for result in with_options}
    figures["verdicts_that_differ"] = {
        result["task"]: result["verdicts_that_differ"] for result in results
    }
    figures |= {"repeats": sizes["repeats"], "ours": OURS, "theirs": THEIRS}
    figures |= common.describe_run(base, options)
    figures["results"] = results
    rests = {result["task"]: result["rest"] for result in results}
    comparisons = compare_each("evaluate", figures["speedup"], figures["bound"], rests)
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
