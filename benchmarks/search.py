"""How much faster paths are evaluated together than one by one, and where the rest of time goes.

Ours: `Evaluator` on one block of questions, a few new paths of each in a round: shared prefixes,
a shared beginning of all prompts, choices packed behind one context, answers judged as they come.
Theirs: for every path a plain forward per choice (loglikelihood), or one greedy `generate`
(letter, boxed), of a model whose layer list is the path, batch 1, nothing shared.
Both evaluate paths that a tree search meets, in one run, and verdicts are compared; where there
are many, theirs runs a sample of the same paths and times count by path. The bound is what layers
and head would take that any exact method must run, at the batch at which they cost least.

    python benchmarks/search.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--device DEVICE] [--dtype DTYPE] [--model MODEL] [--questions N] [--paths N]
        [--leaves N]

With `--dtype bfloat16` the verdicts that differ are those that its rounding costs.
"""

from __future__ import annotations

import copy
import cProfile
import pstats
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import bound
from common.search_rounds import LEAVES, Pair, Rounds, make_search_rounds
from torch import nn

from drllm.config import SearchConfig
from drllm.cost import distinct_executions
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import encode, render
from drllm.models.routing.injection import LayerCall, LayerHandle
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.prefix_sharing import PrefixSharingDriver, pack_rows
from drllm.paths import to_path
from drllm.search.evaluator import Evaluator, Outcome, TokenizedPrompt
from drllm.tasks.examples import Prompt
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade, score_choices

REWARDS = {
    "loglikelihood": "builtin_facts",
    "letter": "builtin_facts",
    "boxed": "builtin_arithmetic",
}
REAL_REWARDS = {**REWARDS, "loglikelihood": "arc_easy", "letter": "arc_easy"}
"""With --data-dir."""

QUICK = {"repeats": 1, "questions": 8, "paths": 3, "sample": 6}
WHOLE = {"repeats": 3, "questions": 32, "paths": 50, "sample": 160}

OURS = "Evaluator: all questions in step, prefixes and beginnings shared, choices packed"
THEIRS = "one plain forward per choice, or one generate, for each path, batch 1"


def block_of(task_name: str, reward: str, num: int, data_dir: Path | None) -> list[Prompt]:
    """Return the prompts of questions of like length, as the blocks of a long search hold."""
    task = get_task(task_name)
    prompts = [task.prompt(example, reward) for example in task.examples("search", data_dir)]
    prompts.sort(key=lambda prompt: len(prompt.text) + sum(map(len, prompt.continuations)))
    start = (len(prompts) - num) // 2
    return prompts[start : start + num]


def listed(model: Any, decisions: tuple[int, ...]) -> Any:
    """Return a plain model whose layer list is the path; weights are shared, not copied."""
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    plain.model = copy.copy(model.model)
    plain.model._modules = dict(model.model._modules)
    plain.config = plain.model.config = copy.deepcopy(model.config)
    layers = [copy.copy(model.model.layers[index]) for index in to_path(decisions)]
    for index, layer in enumerate(layers):  # a cache slot per execution
        layer._modules = dict(layer._modules)
        layer.self_attn = copy.copy(layer.self_attn)
        layer.self_attn.layer_idx = index
    plain.model.layers = nn.ModuleList(layers)
    plain.config.num_hidden_layers = len(layers)
    return plain


def one_by_one(model: Any, tokenizer: Any, prompt: Prompt, decisions: tuple[int, ...]) -> float:
    """Return a path's reward the obvious way."""
    plain = listed(model, decisions)
    text = render(tokenizer, prompt.text, chat=prompt.chat)
    context = encode(tokenizer, text)
    if prompt.reward != "loglikelihood":
        output = plain.generate(
            torch.tensor([context], device=model.device),
            attention_mask=torch.ones(1, len(context), dtype=torch.long, device=model.device),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        return grade(prompt, tokenizer.decode(output[0, len(context) :], skip_special_tokens=True))
    sums = []
    for continuation in prompt.continuations:
        row = encode(tokenizer, text + continuation)
        ids = torch.tensor([row], device=model.device)
        logprobs = plain(ids, use_cache=False).logits[0].float().log_softmax(-1)
        sums.append(sum(float(logprobs[i - 1, row[i]]) for i in range(len(context), len(row))))
    return score_choices(sums, prompt)[0]


@contextmanager
def routing(base: BaseModel) -> Iterator[RoutedModel]:
    """Attach routing inside the block."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        yield routed
    finally:
        routed.detach()


def together(
    evaluator: Evaluator, rounds: Rounds, clock: common.Clock, margins: bool = False
) -> tuple[float, float, dict[Pair, Outcome]]:
    """Evaluate all rounds our way; return what came out, after the time a path and of its margin.

    Margins of generated answers are taken as a search does: of wrong ones in their round, of right
    ones in the end. What is run for margins isn't counted.
    """
    found: dict[Pair, Outcome] = {}
    times = {"verdicts": 0.0, "margins": 0.0}

    def timed(what: str, run: Callable[[], list[Outcome]]) -> list[Outcome]:
        run_before, started = evaluator.states.tokens_run, clock()
        outcomes = run()
        times[what] += clock() - started
        if what == "margins":
            evaluator.states.tokens_run = run_before
        return outcomes

    for pairs in rounds:
        outcomes = timed("verdicts", partial(evaluator.evaluate, pairs))
        if margins:
            early = partial(evaluator.with_margins, pairs, outcomes, wrong_only=True)
            outcomes = timed("margins", early)
        found.update(zip(pairs, outcomes, strict=True))
    if margins:
        completed = timed("margins", partial(evaluator.with_margins, [*found], [*found.values()]))
        found = dict(zip(found, completed, strict=True))
    return times["verdicts"] / len(found), times["margins"] / len(found), found


def parts_of_the_time(
    base: BaseModel, prompts: Sequence[Prompt], rounds: Rounds, clock: common.Clock
) -> dict[str, float]:
    """Return which share of our time each part of the work takes, under a profiler.

    The profiler makes what is written in Python look slower than it is.
    """
    head_seconds, started = 0.0, 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = clock()

    def after(*_: Any) -> None:
        nonlocal head_seconds
        head_seconds += clock() - started

    profile = cProfile.Profile(clock)
    head = base.model.get_output_embeddings()
    hooks = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    with routing(base) as routed:
        profile.enable()
        evaluator = Evaluator(routed, prompts, SearchConfig().state_cache_gb)
        together(evaluator, rounds, clock)
        profile.disable()
    for hook in hooks:
        hook.remove()
    stats: Any = pstats.Stats(profile)
    total = stats.total_tt

    def within(function: Any, caller: Any = None) -> float:
        *_, cumulative, callers = stats.stats.get(key_of(function), (0, 0, 0, 0.0, {}))
        return callers.get(key_of(caller), [0.0])[-1] if caller else cumulative

    reading = within(PrefixSharingDriver.layer)
    parts = {
        "layers, prompts": within(LayerCall.run, PrefixSharingDriver._run_layer),
        "head": head_seconds,
        "handling states": reading,
        "cache to generate from": within(PrefixSharingDriver.routed_cache),
        "layers, decoding": within(LayerHandle.forward) - reading,
        "scoring": within(ChoiceBatch._score_logits),
        "rows and masks, once": within(pack_rows),
    }
    parts["handling states"] -= parts["layers, prompts"]
    shares = {name: seconds / total for name, seconds in parts.items()}
    return {**shares, "the rest": 1 - sum(shares.values())}


def key_of(function: Any) -> tuple[str, int, str]:
    """Return the name by which pstats knows a function."""
    code = function.__code__
    return code.co_filename, code.co_firstlineno, code.co_name


def num_tokens(prompt: TokenizedPrompt) -> int:
    """Return how many tokens the model reads of a prompt and the options that it scores."""
    options = prompt.continuations if prompt.prompt.continuations else []
    return len(prompt.tokens) + sum(len(option) - 1 for option in options)


def executions(evaluator: Evaluator, prompts: Sequence[Prompt], rounds: Rounds) -> dict[str, float]:
    """Return executions a path: asked, distinct, and run, in executions of a whole prompt."""
    pairs = [pair for each in rounds for pair in each]
    tried = [[d for place, d in pairs if place == question] for question in range(len(prompts))]
    tokens = statistics.mean(num_tokens(prompt) for prompt in evaluator.prompts)
    return {
        "run": evaluator.states.tokens_run / tokens / len(pairs),
        "perfect_sharer": sum(map(distinct_executions, tried)) / len(pairs),
        "asked": sum(sum(decisions) for _, decisions in pairs) / len(pairs),
    }


def bound_of(
    base: BaseModel, evaluator: Evaluator, found: dict[Pair, Outcome], clock: common.Clock
) -> float:
    """Return the seconds a path that a method needs which shares all that can be (see `bound`)."""
    tokenized = evaluator.prompts
    after = [num_tokens(prompt) - len(prompt.tokens) for prompt in tokenized]
    answers = {pair: outcome.tokens for pair, outcome in found.items()}
    prompts = [prompt.tokens for prompt in tokenized]
    return bound.seconds_to_search(base, prompts, after, answers, clock) / len(found)


def compare(
    base: BaseModel,
    reward: str,
    prompts: Sequence[Prompt],
    sizes: dict[str, int],
    clock: common.Clock,
    leaves: int,
) -> dict[str, Any]:
    """Time both ways on one block of questions, and count the verdicts on which they differ."""
    rounds = make_search_rounds(base.num_layers, len(prompts), sizes["paths"], leaves)
    everything = [pair for pairs in rounds for pair in pairs]
    rng = random.Random(0)
    runs: list[dict[str, float]] = []
    differ, right, sampled = 0, 0.0, 0
    state_cache_gb = SearchConfig().state_cache_gb
    for repeat in range(sizes["repeats"]):
        sample = rng.sample(everything, min(sizes["sample"], len(everything)))

        def slowly() -> tuple[float, list[float]]:
            started = clock()
            rewards = [
                one_by_one(base.model, base.tokenizer, prompts[place], decisions)
                for place, decisions in sample  # noqa: B023 (called before the next repeat)
            ]
            return (clock() - started) / len(rewards), rewards

        if repeat % 2 == 0:  # take turns, so that neither way always finds the machine warm
            theirs, rewards = slowly()
        with routing(base) as routed:
            started = clock()
            evaluator = Evaluator(routed, prompts, state_cache_gb)
            making = (clock() - started) / len(everything)
            ours, margins, found = together(evaluator, rounds, clock, margins=True)
            shares = executions(evaluator, prompts, rounds)
            evaluator.forget()
            if repeat == 0:
                with_kl = Evaluator(routed, prompts, state_cache_gb, kl=True)
                kl, *_ = together(with_kl, rounds, clock)
                first = ours + making
        if repeat % 2 == 1:
            theirs, rewards = slowly()
        run = {"theirs_s": theirs, "ours_s": ours + making, "margins_s": margins}
        runs.append({**run, "bound_s": bound_of(base, evaluator, found, clock)})
        differ += sum(
            found[pair].reward != value for pair, value in zip(sample, rewards, strict=True)
        )
        right, sampled = right + sum(rewards), sampled + len(rewards)
    return {
        "reward": reward,
        "questions": len(prompts),
        "paths": len(everything),
        "max_new_tokens": None if reward == "loglikelihood" else prompts[0].max_new_tokens,
        "speedup": statistics.median(run["theirs_s"] / run["ours_s"] for run in runs),
        "bound": statistics.median(run["theirs_s"] / run["bound_s"] for run in runs),
        "runs": runs,
        "verdicts_compared": sampled,
        "verdicts_that_differ": differ,
        "share_right": right / sampled,
        "executions_a_path": shares,
        "kl_overhead": kl / first,
        "parts": parts_of_the_time(base, prompts, rounds[: max(2, len(rounds) // 4)], clock),
    }


def report(result: dict[str, Any]) -> None:
    """Print what was found about one reward."""
    shares = result["executions_a_path"]
    theirs, ours, margins = (
        statistics.median(run[name] for run in result["runs"])
        for name in ("theirs_s", "ours_s", "margins_s")
    )
    print(
        f"{result['reward']}: speedup {result['speedup']:.2f} ({len(result['runs'])} repeats); "
        f"{theirs * 1e3:.0f} ms a path one by one, {ours * 1e3:.0f} ms ours "
        f"({margins * 1e3:.0f} ms more for the margins of answers); "
        f"{result['questions']} questions, {result['paths']} paths\n"
        f"  {bound.in_words(result)}\n"
        f"  verdicts: {result['verdicts_that_differ']} of {result['verdicts_compared']} differ, "
        f"{result['share_right']:.0%} are right\n"
        f"  executions of a whole prompt, by path: {shares['run']:.1f} run, "
        f"{shares['perfect_sharer']:.1f} if each state of each question were run once, "
        f"{shares['asked']:.1f} asked\n"
        f"  with KL=True {result['kl_overhead']:.2f} times the time\n"
        f"  where ours goes: "
        + ", ".join(f"{name} {share:.0%}" for name, share in result["parts"].items())
    )


def main() -> None:
    """Run the comparison and print it."""
    parser = common.parser_of(__doc__)
    common.add_clock(parser)
    parser.add_argument(
        "--data-dir", type=Path, help="real ARC questions in place of built-in ones"
    )
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--rewards", default=",".join(REWARDS), help="comma list")
    parser.add_argument("--questions", type=int, help="searched in step, as --block-size")
    parser.add_argument("--paths", type=int, help="of each question")
    parser.add_argument("--leaves", type=int, default=LEAVES, help="of a question, a round")
    parser.add_argument("--sample", type=int, help="paths that are also run one by one")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    if unknown := set(options.rewards.split(",")) - set(REWARDS):
        parser.error(f"--rewards takes {', '.join(REWARDS)}; not {', '.join(sorted(unknown))}")
    base = common.base_of(options)
    clock = common.clock_of(options)
    tasks = REAL_REWARDS if options.data_dir else REWARDS
    results = []
    with torch.no_grad():
        for reward in options.rewards.split(","):
            prompts = block_of(tasks[reward], reward, sizes["questions"], options.data_dir)
            results.append(compare(base, reward, prompts, sizes, clock, options.leaves))
            report(results[-1])
            differ = results[-1]["verdicts_that_differ"]
            common.refuse_differences(base, f"verdicts of {reward}", differ)
    by_reward = {result["reward"]: result for result in results}
    figures = {
        "speedup": {reward: result["speedup"] for reward, result in by_reward.items()},
        "bound": {reward: result["bound"] for reward, result in by_reward.items()},
        "kl_overhead": {r: result["kl_overhead"] for r, result in by_reward.items()},
        "verdicts_that_differ": {
            reward: result["verdicts_that_differ"] for reward, result in by_reward.items()
        },
        "repeats": sizes["repeats"],
        "ours": OURS,
        "theirs": THEIRS,
        **common.describe_run(base, options),
        "results": results,
    }
    common.write_figures(options, figures)


if __name__ == "__main__":
    main()
