"""Verdicts and margins of searched paths on real weights against plain transformers, path by path.

SmolLM2-135M-Instruct, float32. Every reward is asked in a way that gives it enough right and wrong
answers: the model can't box what it has to work out, so it is shown the answer and told to box it.
"""

import copy
import gzip
import json
import os
import random
from collections import Counter
from statistics import mean

import pytest
import torch

from drllm.model.prompts import encode, encode_continuation, render
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request
from drllm.search.evaluator import MAX_RIVALS, Evaluator, gold_text
from drllm.tasks.examples import Prompt, choose
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade, score_choices, verdict
from slow_way import ListedModel

REWARDS = ("loglikelihood", "letter", "boxed", "exact")
MARGIN_TOLERANCE = 1e-4
"""Nats a margin may differ from that of the path alone."""
LEAST_WITHIN = 0.99
"""Share of margins within it.

Without one of the first layers a path is badly conditioned, and plain float32 is itself up to
2.4e-4 nats off: where margins are further apart, both ways have to give the same in float64.
"""
IN_DOUBLE = 1e-9
"""Nats by which both may differ there."""
TIE = 3e-4
"""Nats by which one token may lie behind another and still be said in its place."""
LEAST_SHARE = 0.1
"""Of right verdicts, and of wrong ones, in each sample."""
HOUR = "DRLLM_HOUR" in os.environ
QUESTIONS, PATHS, COMPARED = (20, 50, 1000) if HOUR else (12, 12, 40)
"""Of each reward, and how many of the paths are compared one by one, drawn with a seed.

With DRLLM_HOUR in the environment all are, which takes 80 minutes of one thread. Among so many some
are far apart by rounding alone, so that these have to be equal in float64 only.
"""
MARGINS_CHECKED = 5
"""Of every so many of them one has its margin checked, which takes several plain forwards."""

BOXED_SHOTS = (
    "Problem: Tom has 2 apples and buys 3 more. How many has he?\nAnswer: 5\nBoxed: \\boxed{5}\n\n"
    "Problem: Of 12 eggs 4 are broken. How many are whole?\nAnswer: 8\nBoxed: \\boxed{8}\n\n"
)
EXACT_SHOTS = (
    "Question: What do bees make?\nAnswer: honey\nSame answer: honey\n\n"
    "Question: Which planet do we live on?\nAnswer: the Earth\nSame answer: the Earth\n\n"
)


ASKED = {
    "boxed": (BOXED_SHOTS, "Problem", "Boxed", 16),
    "exact": (EXACT_SHOTS, "Question", "Same answer", 12),
}


def shown(reward, question, answer):
    """Ask for an answer that is shown."""
    shots, name, wanted, most = ASKED[reward]
    text = f"{shots}{name}: {question}\nAnswer: {answer}\n{wanted}:"
    return Prompt(text=text, reward=reward, answer=answer, max_new_tokens=most)


def built_in(reward, num):
    if reward == "boxed":
        examples = get_task("builtin_arithmetic").examples("search")[:num]
        return [shown(reward, e.question, e.answer) for e in examples]
    task = get_task("builtin_facts")
    examples = choose(task.examples("search"), num, seed=3)
    if reward == "exact":
        return [shown(reward, e.question, e.answer) for e in examples]
    return [task.prompt(example, reward) for example in examples]


def real(reward, num, data_dir):
    if reward == "boxed":
        with gzip.open(data_dir / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows = [row for row in rows if len(row["question"]) < 140][:num]
        answers = [row["answer"].split("#### ")[1].replace(",", "") for row in rows]
        return [shown(reward, row["question"], a) for row, a in zip(rows, answers, strict=True)]
    task = get_task("arc_easy")
    examples = task.examples("search", data_dir)
    if reward == "exact":
        short = [e for e in examples if len(e.answer.split()) < 3 and len(e.question) < 150]
        return [shown(reward, e.question, e.answer) for e in short[:num]]
    return [task.prompt(example, reward) for example in choose(examples, num, seed=0)]


class Alone:
    """One prompt under one path, asked in plain transformers."""

    def __init__(self, base, model, decisions, prompt):
        self.slow = ListedModel(model, decisions, cached=True)
        self.tokenizer, self.prompt = base.tokenizer, prompt
        self.text = render(base.tokenizer, prompt.text, chat=prompt.chat)
        self.context = encode(base.tokenizer, self.text)

    def each(self, tokens):
        """Return the log-probability of each token behind the prompt."""
        return self.slow.each(self.context, tokens)

    def options(self):
        """Return the tokens of each option."""
        return [
            encode_continuation(self.tokenizer, self.text, c) for c in self.prompt.continuations
        ]

    def score(self):
        return score_choices(self.slow.sums(self.context, self.options()), self.prompt)

    def generate(self):
        output = self.slow.model.generate(
            torch.tensor([self.context]),
            attention_mask=torch.ones(1, len(self.context), dtype=torch.long),
            max_new_tokens=self.prompt.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return output[0, len(self.context) :].tolist()


def in_double(base, decisions, prompt, behind):
    """Return log-probabilities in float64, where both ways must give the same."""
    exact_model = copy.deepcopy(base.model).double()
    alone = Alone(base, exact_model, decisions, prompt)
    slow = [sum(alone.each(tokens)) for tokens in behind]
    routed = RoutedModel(exact_model, tokenizer=base.tokenizer)
    batch = ChoiceBatch(routed, [Request(alone.context, behind)], 1.0)
    [ours] = batch.logprobs([(0, decisions)])
    routed.detach()
    assert ours == pytest.approx(slow, abs=IN_DOUBLE), decisions
    return slow


def check_choices(base, prompts, found, sample):
    """Compare choice scores; return how far margins are apart."""
    apart = []
    for place, decisions in sample:
        outcome = found[place, decisions]
        alone = Alone(base, base.model, decisions, prompts[place])
        reward, margin = alone.score()
        apart.append(abs(margin - outcome.margin))
        assert reward == outcome.reward or abs(margin) < MARGIN_TOLERANCE, (place, decisions)
        if apart[-1] >= MARGIN_TOLERANCE:
            sums = in_double(base, decisions, prompts[place], alone.options())
            _, exact = score_choices(sums, prompts[place])
            allowed = max(MARGIN_TOLERANCE, 2 * abs(margin - exact))
            assert HOUR or abs(outcome.margin - exact) < allowed, (place, decisions)
    return apart


def check_answers(base, prompts, found, sample):
    """Compare answers and verdicts; return how far the margins of some paths are apart."""
    wrong = {}
    for (place, _), outcome in found.items():
        if outcome.reward < 1 and outcome.tokens:
            wrong.setdefault(place, Counter())[outcome.tokens] += 1
    apart = []
    for number, (place, decisions) in enumerate(sample):
        prompt, outcome = prompts[place], found[place, decisions]
        alone = Alone(base, base.model, decisions, prompt)
        said, ours = alone.generate(), list(outcome.tokens)
        same = next((k for k, pair in enumerate(zip(said, ours)) if pair[0] != pair[1]), None)  # noqa: B905
        if same is None:
            assert said[: len(ours)] == ours
            text = base.tokenizer.decode(said, skip_special_tokens=True)
            assert grade(prompt, text) == outcome.reward, (place, decisions)
        else:  # the two tokens must have been as good as equal
            last = alone.slow.logits([*alone.context, *ours[:same]])[-1]
            assert abs(float(last[said[same]] - last[ours[same]])) < TIE, (place, decisions)
        if number % MARGINS_CHECKED == 0 and outcome.margin is not None:
            gold = encode_continuation(
                base.tokenizer, alone.text, gold_text(prompt, base.tokenizer)
            )
            if outcome.reward < 1:
                other = outcome.logprob
                # An answer that no verdict cut short went on to its end, which counts as a token.
                is_cut = verdict(prompt, outcome.answer, finished=False) is not None
                steps = len(ours) if is_cut else len(said)
                rivals = [said[:steps]]
                assert mean(alone.each(*rivals)) == pytest.approx(other, abs=MARGIN_TOLERANCE)
            else:
                rivals = [tokens for tokens, _ in wrong[place].most_common(MAX_RIVALS)]
                other = max(mean(alone.each(tokens)) for tokens in rivals)
            apart.append(abs(mean(alone.each(gold)) - other - outcome.margin))
            if apart[-1] >= MARGIN_TOLERANCE:
                in_double(base, decisions, prompt, [gold, *rivals])
    return apart


@pytest.mark.parametrize(
    ("num_questions", "num_paths", "reward"),
    [
        (3, 3, "loglikelihood"),
        *(pytest.param(3, 3, each, marks=pytest.mark.thorough) for each in REWARDS[1:]),
        *(pytest.param(QUESTIONS, PATHS, each, marks=pytest.mark.thorough) for each in REWARDS),
    ],
)
def test_searched_paths_get_the_verdict_and_margin_of_each_path_alone(
    smollm2, benchmark, request, record_property, reward, num_questions, num_paths
):
    search = benchmark("search")  # times the way that is compared with here
    if num_questions > 10:
        prompts = real(reward, num_questions, request.getfixturevalue("data_dir"))
    else:
        prompts = built_in(reward, num_questions)
    assert num_questions == len(prompts)
    found = {}
    routed = RoutedModel(smollm2.model, tokenizer=smollm2.tokenizer)
    try:
        evaluator = Evaluator(routed, prompts, 4.0)
        for pairs in search.make_search_rounds(30, num_questions, num_paths):
            outcomes = evaluator.with_margins(pairs, evaluator.evaluate(pairs), wrong_only=True)
            found.update(zip(pairs, outcomes, strict=True))
        pairs = list(found)
        completed = evaluator.with_margins(pairs, list(found.values()))
        found = dict(zip(pairs, completed, strict=True))
    finally:
        routed.detach()
    right = mean(outcome.reward for outcome in found.values())
    assert LEAST_SHARE <= right <= 1 - LEAST_SHARE, "the sample must hold both verdicts"
    sample = random.Random(0).sample(pairs, min(len(pairs), COMPARED))
    with torch.no_grad():
        check = check_choices if reward == "loglikelihood" else check_answers
        apart = check(smollm2, prompts, found, sample)
    record_property("margins_apart", f"{max(apart):.1e} at most, {mean(apart):.1e} on average")
    record_property("share_right", right)
    assert mean(each < MARGIN_TOLERANCE for each in apart) >= LEAST_WITHIN
    if reward != "loglikelihood" and not HOUR:
        assert max(apart) < MARGIN_TOLERANCE
