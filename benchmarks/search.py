"""Measure how much faster paths are evaluated together than one by one, and where our time goes.

Ours is the `Evaluator` on one block of questions. In each round it gets a few new paths of every
question. Paths share their prefixes, and prompts share their beginning. The options of a question
stand behind one copy of its prompt, and an answer is graded while it is generated.

Theirs is a plain model whose layer list is the path. It evaluates one path at a time and shares
nothing: a forward pass for each option, or one greedy `generate` if the reward is letter or boxed.

Both evaluate the same paths in one run, and their verdicts are compared. The paths are those that a
tree search meets. If there are many paths, theirs evaluates a random sample of them. So all times
are seconds per path. The bound is the time that any exact method needs, see `common.bound`.

    python benchmarks/search.py [--quick] [--json FILE] [--clock cpu] [--data-dir DIR]
        [--device DEVICE] [--dtype DTYPE] [--model MODEL] [--rewards NAMES] [--questions N]
        [--paths N] [--leaves N] [--sample N] [--repeats N]

With `--dtype bfloat16` some verdicts differ, and their number shows what its rounding changes.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import itertools
import pstats
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import bound, operations
from common.comparison import compare_each
from common.search_rounds import LEAVES, Pair, Rounds, make_search_rounds
from torch import nn

from drllm.config import SearchConfig
from drllm.cost import distinct_executions
from drllm.model.load import BaseModel
from drllm.model.prompts import encode, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import LayerCall, LayerHandle
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.prefix_sharing import PrefixSharingDriver, pack_rows
from drllm.paths import Decisions, to_path
from drllm.search.evaluator import Evaluator, JudgedOutcome, TokenizedPrompt
from drllm.tasks.examples import Prompt
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade, score_choices

REWARDS = {
    "loglikelihood": "builtin_facts",
    "letter": "builtin_facts",
    "boxed": "builtin_arithmetic",
}
"""The rewards that are measured, and the task that has the questions for each."""
REAL_REWARDS = {**REWARDS, "loglikelihood": "arc_easy", "letter": "arc_easy"}
"""The same with --data-dir."""

QUICK = {"repeats": 1, "questions": 8, "paths": 3, "sample": 6}
WHOLE = {"repeats": 3, "questions": 32, "paths": 50, "sample": 160}
STATE_CACHE_GB = SearchConfig().state_cache_gb

OURS = "Evaluator: all questions in step, prefixes and beginnings shared, choices packed"
THEIRS = "one plain forward per choice, or one generate, for each path, batch 1"


def choose_block(task_name: str, reward: str, num: int, data_dir: Path | None) -> list[Prompt]:
    """Return the prompts of questions of similar length, as in one block of a long search."""
    task = get_task(task_name)
    prompts = [task.prompt(example, reward) for example in task.examples("search", data_dir)]
    prompts.sort(key=count_characters)
    start = (len(prompts) - num) // 2
    return prompts[start : start + num]


def count_characters(prompt: Prompt) -> int:
    """Return the number of characters of a prompt and its options."""
    return len(prompt.text) + sum(map(len, prompt.continuations))


def build_plain_model(model: Any, decisions: Decisions) -> Any:
    """Return a plain model whose layer list is the path. It shares the weights of the model."""
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    plain.model = copy.copy(model.model)
    plain.model._modules = dict(model.model._modules)
    config = copy.deepcopy(model.config)
    plain.config = config
    plain.model.config = config
    layers = [copy.copy(model.model.layers[index]) for index in to_path(decisions)]
    for index, layer in enumerate(layers):
        layer._modules = dict(layer._modules)
        layer.self_attn = copy.copy(layer.self_attn)
        layer.self_attn.layer_idx = index  # each execution has an entry of its own in the cache
    plain.model.layers = nn.ModuleList(layers)
    config.num_hidden_layers = len(layers)
    return plain


def evaluate_alone(base: BaseModel, prompt: Prompt, decisions: Decisions) -> float:
    """Return a path's reward the obvious way."""
    model = build_plain_model(base.model, decisions)
    text = render(base.tokenizer, prompt.text, chat=prompt.chat)
    if prompt.reward == "loglikelihood":
        return score_options_alone(model, base.tokenizer, prompt, text)
    return generate_alone(model, base.tokenizer, prompt, text)


def generate_alone(model: Any, tokenizer: Any, prompt: Prompt, text: str) -> float:
    """Generate an answer to a rendered prompt, and return its grade."""
    tokens = encode(tokenizer, text)
    output = model.generate(
        torch.tensor([tokens], device=model.device),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=model.device),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answer = tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)
    return grade(prompt, answer)


def score_options_alone(model: Any, tokenizer: Any, prompt: Prompt, text: str) -> float:
    """Score each option of a rendered prompt in a forward pass of its own; return the reward."""
    num_context = len(encode(tokenizer, text))
    sums = []
    for option in prompt.continuations:
        row = encode(tokenizer, text + option)
        ids = torch.tensor([row], device=model.device)
        logprobs = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        places = range(num_context, len(row))
        sums.append(sum(float(logprobs[place - 1, row[place]]) for place in places))
    reward, _ = score_choices(sums, prompt)
    return reward


def run_alone(
    base: BaseModel, prompts: Sequence[Prompt], pairs: Sequence[Pair], clock: common.Clock
) -> tuple[float, list[float]]:
    """Evaluate paths the obvious way; return the seconds per path, and the rewards."""
    started = clock()
    rewards = [evaluate_alone(base, prompts[place], decisions) for place, decisions in pairs]
    return (clock() - started) / len(rewards), rewards


@contextmanager
def routing(base: BaseModel) -> Iterator[RoutedModel]:
    """Attach routing inside the block."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        yield routed
    finally:
        routed.detach()


@dataclass
class RoundsResult:
    """The outcomes of all rounds evaluated our way, and the seconds for all of them."""

    outcomes: dict[Pair, JudgedOutcome] = field(default_factory=dict)
    verdict_seconds: float = 0.0
    margin_seconds: float = 0.0


def evaluate_rounds(
    evaluator: Evaluator, rounds: Rounds, clock: common.Clock, with_margins: bool = False
) -> RoundsResult:
    """Evaluate all rounds our way.

    With margins, the margins of generated answers are added as in a search: those of wrong answers
    after each round, and those of right answers after the last round.
    """
    result = RoundsResult()
    for pairs in rounds:
        started = clock()
        outcomes = evaluator.evaluate(pairs)
        result.verdict_seconds += clock() - started
        result.outcomes.update(zip(pairs, outcomes, strict=True))
        if with_margins:
            add_margins(evaluator, result, pairs, clock, wrong_only=True)
    if with_margins:
        add_margins(evaluator, result, list(result.outcomes), clock, wrong_only=False)
    return result


def add_margins(
    evaluator: Evaluator,
    result: RoundsResult,
    pairs: Sequence[Pair],
    clock: common.Clock,
    wrong_only: bool,
) -> None:
    """Add the margins of some pairs to a result. What this runs isn't counted as executions."""
    outcomes = [result.outcomes[pair] for pair in pairs]
    tokens_run = evaluator.states.tokens_run
    started = clock()
    outcomes = evaluator.with_margins(pairs, outcomes, wrong_only=wrong_only)
    result.margin_seconds += clock() - started
    evaluator.states.tokens_run = tokens_run
    result.outcomes.update(zip(pairs, outcomes, strict=True))


@dataclass(frozen=True, slots=True)
class TogetherRun:
    """One evaluation of all rounds our way. Times are in seconds per path."""

    seconds: float  # for the verdicts, including the making of the evaluator
    margin_seconds: float
    outcomes: dict[Pair, JudgedOutcome]
    prompts: list[TokenizedPrompt]
    executions: dict[str, float]  # see `count_executions`


def run_together(
    base: BaseModel, prompts: Sequence[Prompt], rounds: Rounds, clock: common.Clock
) -> TogetherRun:
    """Evaluate all rounds our way, with margins."""
    with routing(base) as routed:
        started = clock()
        evaluator = Evaluator(routed, prompts, STATE_CACHE_GB)
        making_seconds = clock() - started
        result = evaluate_rounds(evaluator, rounds, clock, with_margins=True)
        executions = count_executions(evaluator, rounds)
        evaluator.forget()
    num_paths = len(result.outcomes)
    return TogetherRun(
        seconds=(result.verdict_seconds + making_seconds) / num_paths,
        margin_seconds=result.margin_seconds / num_paths,
        outcomes=result.outcomes,
        prompts=evaluator.prompts,
        executions=executions,
    )


def time_with_kl(
    base: BaseModel, prompts: Sequence[Prompt], rounds: Rounds, clock: common.Clock
) -> float:
    """Return the seconds per path if each path's KL from the full path is measured too."""
    with routing(base) as routed:
        evaluator = Evaluator(routed, prompts, STATE_CACHE_GB, kl=True)
        result = evaluate_rounds(evaluator, rounds, clock)
    return result.verdict_seconds / len(result.outcomes)


def run_without_margins(
    base: BaseModel, prompts: Sequence[Prompt], rounds: Rounds, clock: common.Clock
) -> None:
    """Evaluate all rounds our way, without margins: what the bound is compared with."""
    with routing(base) as routed:
        evaluator = Evaluator(routed, prompts, STATE_CACHE_GB)
        evaluate_rounds(evaluator, rounds, clock)
        evaluator.forget()


def count_executions(evaluator: Evaluator, rounds: Rounds) -> dict[str, float]:
    """Return executions of a whole prompt per path.

    `run` were run, `asked` would be run if nothing were shared, and `perfect_sharer` would be run
    if every state of every question were computed once.
    """
    pairs = list(itertools.chain.from_iterable(rounds))
    paths: list[list[Decisions]] = [[] for _ in evaluator.prompts]
    for place, decisions in pairs:
        paths[place].append(decisions)
    num_tokens = statistics.mean(count_tokens(prompt) for prompt in evaluator.prompts)
    return {
        "run": evaluator.states.tokens_run / num_tokens / len(pairs),
        "perfect_sharer": sum(map(distinct_executions, paths)) / len(pairs),
        "asked": sum(sum(decisions) for _, decisions in pairs) / len(pairs),
    }


def count_tokens(prompt: TokenizedPrompt) -> int:
    """Return how many tokens the model reads for a prompt and the options that are scored."""
    return len(prompt.tokens) + count_option_tokens(prompt)


def count_option_tokens(prompt: TokenizedPrompt) -> int:
    """Return how many tokens of options are read. The last token of an option isn't read."""
    if not prompt.prompt.continuations:  # an answer is generated
        return 0
    return sum(len(option) - 1 for option in prompt.continuations)


def find_bound(base: BaseModel, run: TogetherRun, clock: common.Clock) -> float:
    """Return the seconds per path of a method that shares everything that can be shared."""
    prompts = [prompt.tokens for prompt in run.prompts]
    num_after = [count_option_tokens(prompt) for prompt in run.prompts]
    answers = {pair: outcome.tokens for pair, outcome in run.outcomes.items()}
    seconds = bound.seconds_to_search(base, prompts, num_after, answers, clock)
    return seconds / len(run.outcomes)


class ModuleTimer:
    """Adds up the seconds of a module's forward passes, by hooks."""

    def __init__(self, module: nn.Module, clock: common.Clock) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._started = 0.0
        self._hooks = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
        ]

    def _before(self, *_: Any) -> None:
        self._started = self._clock()

    def _after(self, *_: Any) -> None:
        self.seconds += self._clock() - self._started

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


class Profile:
    """The times that a profiler has recorded."""

    def __init__(self, profile: cProfile.Profile) -> None:
        self._stats: Any = pstats.Stats(profile)

    @property
    def total_seconds(self) -> float:
        """The seconds of everything that was recorded."""
        return float(self._stats.total_tt)

    def seconds_in(self, function: Any) -> float:
        """Return the seconds in a function and in everything that it calls."""
        _, _, _, seconds, _ = self._read(function)
        return float(seconds)

    def seconds_from(self, caller: Any, function: Any) -> float:
        """Return the seconds in a function where it was called by one caller."""
        *_, callers = self._read(function)
        if self._key(caller) not in callers:
            return 0.0
        return float(callers[self._key(caller)][-1])

    def _read(self, function: Any) -> Any:
        """Return what pstats knows of a function; its cumulative time and its callers are last."""
        return self._stats.stats.get(self._key(function), (0, 0, 0, 0.0, {}))

    @staticmethod
    def _key(function: Any) -> tuple[str, int, str]:
        """Return the name by which pstats knows a function."""
        code = function.__code__
        return code.co_filename, code.co_firstlineno, code.co_name


def measure_parts(
    base: BaseModel, prompts: Sequence[Prompt], rounds: Rounds, clock: common.Clock
) -> dict[str, float]:
    """Return which share of our time each part of the work takes, under a profiler.

    The profiler slows Python down more than it slows tensor operations down. So the shares of parts
    that run much Python are too large.
    """
    profiler = cProfile.Profile(clock)
    head = ModuleTimer(base.model.get_output_embeddings(), clock)
    with routing(base) as routed:
        profiler.enable()
        evaluator = Evaluator(routed, prompts, STATE_CACHE_GB)
        evaluate_rounds(evaluator, rounds, clock)
        profiler.disable()
    head.remove()
    profile = Profile(profiler)
    reading = profile.seconds_in(PrefixSharingDriver.layer)
    layers = profile.seconds_from(PrefixSharingDriver._run_layer, LayerCall.run)
    seconds = {
        "layers, prompts": layers,
        "head": head.seconds,
        "handling states": reading - layers,
        "cache to generate from": profile.seconds_in(PrefixSharingDriver.routed_cache),
        "layers, decoding": profile.seconds_in(LayerHandle.forward) - reading,
        "scoring": profile.seconds_in(ChoiceBatch._score_logits),
        "rows and masks, once": profile.seconds_in(pack_rows),
    }
    shares = {name: part / profile.total_seconds for name, part in seconds.items()}
    shares["the rest"] = 1 - sum(shares.values())
    return shares


@dataclass
class Verdicts:
    """Counts of verdicts that both ways reached."""

    num_compared: int = 0
    num_different: int = 0
    num_right: float = 0.0  # a sum of rewards, since an answer may be right in part

    def add(self, ours: Sequence[float], theirs: Sequence[float]) -> None:
        """Count the rewards of the same paths."""
        self.num_compared += len(theirs)
        self.num_right += sum(theirs)
        for our_reward, their_reward in zip(ours, theirs, strict=True):
            self.num_different += our_reward != their_reward


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
    pairs = list(itertools.chain.from_iterable(rounds))
    rng = random.Random(0)
    runs: list[dict[str, float]] = []
    verdicts = Verdicts()
    kl_overhead = 0.0
    for repeat in range(sizes["repeats"]):
        sample = rng.sample(pairs, min(sizes["sample"], len(pairs)))
        # The ways take turns to be first, so that neither always finds the machine warm.
        theirs_first = repeat % 2 == 0
        if theirs_first:
            theirs_seconds, rewards = run_alone(base, prompts, sample, clock)
        ours = run_together(base, prompts, rounds, clock)
        if repeat == 0:
            kl_overhead = time_with_kl(base, prompts, rounds, clock) / ours.seconds
        if not theirs_first:
            theirs_seconds, rewards = run_alone(base, prompts, sample, clock)
        run = {
            "theirs_s": theirs_seconds,
            "ours_s": ours.seconds,
            "margins_s": ours.margin_seconds,
            "bound_s": find_bound(base, ours, clock),
        }
        runs.append(run)
        verdicts.add([ours.outcomes[pair].reward for pair in sample], rewards)
    max_new_tokens = None if reward == "loglikelihood" else prompts[0].max_new_tokens
    share = statistics.median(run["bound_s"] / run["ours_s"] for run in runs)
    run_again = partial(run_without_margins, base, prompts, rounds, clock)
    num_tokens = len(ours.prompts[0].tokens)
    profiled_rounds = rounds[: max(2, len(rounds) // 4)]
    return {
        "reward": reward,
        "questions": len(prompts),
        "paths": len(pairs),
        "max_new_tokens": max_new_tokens,
        "speedup": statistics.median(run["theirs_s"] / run["ours_s"] for run in runs),
        "bound": statistics.median(run["theirs_s"] / run["bound_s"] for run in runs),
        "rest": operations.explain_rest(run_again, base, num_tokens, share),
        "runs": runs,
        "verdicts_compared": verdicts.num_compared,
        "verdicts_that_differ": verdicts.num_different,
        "share_right": verdicts.num_right / verdicts.num_compared,
        "executions_a_path": ours.executions,
        "kl_overhead": kl_overhead,
        "parts": measure_parts(base, prompts, profiled_rounds, clock),
    }


def report(result: dict[str, Any]) -> None:
    """Print the result of one reward."""
    runs = result["runs"]
    theirs_ms = 1e3 * statistics.median(run["theirs_s"] for run in runs)
    ours_ms = 1e3 * statistics.median(run["ours_s"] for run in runs)
    margins_ms = 1e3 * statistics.median(run["margins_s"] for run in runs)
    executions = result["executions_a_path"]
    parts = [f"{name} {share:.0%}" for name, share in result["parts"].items()]
    print(
        f"{result['reward']}: speedup {result['speedup']:.2f} ({len(runs)} repeats); "
        f"{theirs_ms:.0f} ms a path one by one, {ours_ms:.0f} ms ours "
        f"({margins_ms:.0f} ms more for the margins of answers); "
        f"{result['questions']} questions, {result['paths']} paths"
    )
    print(f"  {bound.in_words(result)}")
    print(
        f"  verdicts: {result['verdicts_that_differ']} of {result['verdicts_compared']} differ, "
        f"{result['share_right']:.0%} are right"
    )
    print(
        f"  executions of a whole prompt per path: {executions['run']:.1f} run, "
        f"{executions['perfect_sharer']:.1f} if every state of every question were run once, "
        f"{executions['asked']:.1f} if nothing were shared"
    )
    print(f"  with KL {result['kl_overhead']:.2f} times the time")
    print(f"  our time: {', '.join(parts)}")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = common.parser_of(__doc__)
    common.add_clock(parser)
    parser.add_argument(
        "--data-dir", type=Path, help="use real ARC questions from here, not the built-in ones"
    )
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--rewards", default=",".join(REWARDS), help="separated by commas")
    parser.add_argument("--questions", type=int, help="searched in step, as with --block-size")
    parser.add_argument("--paths", type=int, help="paths per question")
    parser.add_argument(
        "--leaves", type=int, default=LEAVES, help="new paths per question and round"
    )
    parser.add_argument("--sample", type=int, help="paths that are also evaluated one by one")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    unknown = set(options.rewards.split(",")) - set(REWARDS)
    if unknown:
        parser.error(f"--rewards takes {', '.join(REWARDS)}; not {', '.join(sorted(unknown))}")
    return options


def measure(
    base: BaseModel, options: argparse.Namespace, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """Compare both ways under each reward, and print each result as soon as it is there."""
    clock = common.clock_of(options)
    tasks = REAL_REWARDS if options.data_dir else REWARDS
    results = []
    for reward in options.rewards.split(","):
        prompts = choose_block(tasks[reward], reward, sizes["questions"], options.data_dir)
        result = compare(base, reward, prompts, sizes, clock, options.leaves)
        report(result)
        common.refuse_differences(base, f"verdicts of {reward}", result["verdicts_that_differ"])
        results.append(result)
    return results


def main() -> None:
    """Run the comparison and print it."""
    options = parse_options()
    sizes = common.sizes_of(options, QUICK, WHOLE)
    base = common.base_of(options)
    with torch.no_grad():
        results = measure(base, options, sizes)
    figures: dict[str, Any] = {}
    for key in ("speedup", "bound", "kl_overhead", "verdicts_that_differ"):
        figures[key] = {result["reward"]: result[key] for result in results}
    figures |= {"repeats": sizes["repeats"], "ours": OURS, "theirs": THEIRS}
    figures |= common.describe_run(base, options)
    figures["results"] = results
    rests = {result["reward"]: result["rest"] for result in results}
    comparisons = compare_each(
        "search paths, answers graded by", figures["speedup"], figures["bound"], rests
    )
    common.write_figures(options, figures, comparisons)


if __name__ == "__main__":
    main()
