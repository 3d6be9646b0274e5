"""Our model in lm-evaluation-harness against the harness' own, and against each path alone."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import drllm
from drllm.errors import ConfigError, RoutingError
from drllm.evaluation.lm_eval.generation import STEPS
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import RouteCounts
from drllm.model.layers import can_split
from drllm.models.routers.checkpoint import save_routers
from drllm.models.routing.policies import FullPolicy, RouterPolicy
from drllm.paths import StaticPath
from slow_way import LOGPROB_TOLERANCE, ListedModel, routers_for

QUESTIONS = {
    "what is it?": [" a cat", " a dog and a cat", " 7"],
    "two words, and more": [" A", " B", " C", " D"],
    "x": [" y y y y y y", " z"],
    "the same beginning of several prompts: one": [" 1", " 22"],
    "the same beginning of several prompts: another": [" 333", " 4"],
}


@pytest.fixture
def base(tiny_base):
    return tiny_base(max_position_embeddings=96)


@pytest.fixture
def routers(base, tmp_path):
    save_routers(routers_for(base, seed=2, base_model="tiny"), tmp_path / "routers")
    return tmp_path / "routers"


def instances(questions, kind="loglikelihood", task="task"):
    return [
        Instance(kind, {}, (context, continuation), idx, (task, doc, 1))
        for doc, (context, continuations) in enumerate(questions.items())
        for idx, continuation in enumerate(continuations)
    ]


def to_answer(texts=tuple(QUESTIONS), **settings):
    return [Instance("generate_until", {}, (text, dict(settings)), 0) for text in texts]


def rolling(*texts):
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]


def options_in_the_context(*names):
    return [
        Instance("loglikelihood", {}, (f"so {name} went", " home again"), idx, ("gap", 0, 1))
        for idx, name in enumerate(names)
    ]


def stock(base, **options):
    return HFLM(pretrained=copy.deepcopy(base.model), tokenizer=base.tokenizer, **options)


def assert_same(expected, scores):
    for (slow, slow_greedy), (fast, fast_greedy) in zip(expected, scores, strict=True):
        assert slow == pytest.approx(fast, abs=LOGPROB_TOLERANCE)
        assert slow_greedy == fast_greedy


def score(lm, requests):
    return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64, "auto"])
def test_without_routers_every_answer_is_the_harness_own(base, batch_size):
    lm = RoutedLM(base, batch_size=batch_size)
    assert_same(score(stock(base), instances(QUESTIONS)), score(lm, instances(QUESTIONS)))


def test_a_continuation_that_the_model_would_say_itself_is_greedy_in_both(base):
    plain = stock(base)
    [answer] = plain.generate_until(to_answer(["what is"], max_gen_toks=5, until=[]))
    questions = {"what is": [answer, answer[:2], answer[:-1] + "#"]}
    expected = score(plain, instances(questions))
    assert [greedy for _, greedy in expected] == [True, True, False], "the sample must be a test"
    assert_same(expected, score(RoutedLM(base), instances(questions)))


REQUESTS = {
    "options in the context": (options_in_the_context("Anna", "Bo"), {}),
    "too long": (instances({"long " * 40: [" a", " bb cc"], "short": [" a"]}), {"max_length": 50}),
    "no prompt": (instances({"": ["some text", "other", "<s>begun by the prefix token"]}), {}),
}


@pytest.mark.parametrize(("requests", "options"), REQUESTS.values(), ids=REQUESTS.keys())
def test_requests_of_every_kind_score_as_in_the_harness(base, requests, options):
    expected = score(stock(base, **options), requests)
    assert_same(expected, score(RoutedLM(base, **options), requests))


def test_rolling_texts_score_as_in_the_harness_under_a_fixed_plan(base):
    requests = rolling("a text " * 30, "short", "<s>begun by the prefix token")
    expected = stock(base).loglikelihood_rolling(requests, disable_tqdm=True)
    scores = RoutedLM(base).loglikelihood_rolling(requests, disable_tqdm=True)
    assert expected == pytest.approx(scores, abs=LOGPROB_TOLERANCE * 3)  # windows


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.thorough), 3])
def test_answers_that_there_is_no_room_for_are_the_harness_own_of_the_length_that_there_is(
    base, batch_size
):
    def limit_each(limits):
        pairs = zip(QUESTIONS, limits, strict=True)
        return [to_answer([text], max_gen_toks=limit, until=["a"])[0] for text, limit in pairs]

    step = 96 // STEPS
    room = [96 - math.ceil(len(base.tokenizer(text).input_ids) / step) * step for text in QUESTIONS]
    assert len(set(room)) > 2, "the sample must be a test"
    expected = stock(base).generate_until(
        limit_each(max(48, most) for most in room), disable_tqdm=True
    )
    lm = RoutedLM(base, batch_size=batch_size)
    assert lm.generate_until(limit_each([32768] * len(room)), disable_tqdm=True) == expected


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_without_routers_generated_answers_are_the_harness_own(base, batch_size):
    requests = to_answer(until=["\n"], max_gen_toks=8, do_sample=False)
    expected = stock(base).generate_until(requests, disable_tqdm=True)
    answers = RoutedLM(base, batch_size=batch_size).generate_until(requests, disable_tqdm=True)
    assert expected == answers


TELLING_ONLY = (
    "test_what_prompts_begin_with_is_read_once_and_every_answer_is_that_of_its_whole_prompt",
)
SHOTS = "one + one = two\ntwo + one = three\n"
ASKED = ["one + two =", "six - one and then two =", "two + two and one ="]
PLANS = {
    "all layers": (1,) * 6,
    "decisions": (1, 0, 2, 1, 1, 1),
    "a path that no decisions say": StaticPath([0, 1, 2, 4, 3, 5]),
}


def tokens_read(lm):
    """Return a list that gets, for each pass that reads a prompt, its rows and tokens."""
    passes = []

    def note(_model, args, options):
        rows, tokens = options["input_ids"].shape
        passes.extend([(rows, tokens)] * (tokens > 1))

    lm.model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


@pytest.mark.parametrize("runs", PLANS)
def test_what_prompts_begin_with_is_read_once_and_every_answer_is_that_of_its_whole_prompt(
    tiny_model, tiny_base, tiny_tokenizer, family, runs
):
    plan = PLANS[runs]
    model = tiny_model(family)
    lm = RoutedLM(tiny_base(model), batch_size=2)
    lm.policy = lm.routed.build_policy(plan)
    passes = tokens_read(lm)
    texts = [SHOTS + text for text in ASKED]
    requests = to_answer(texts, until=["\n"], max_gen_toks=8, do_sample=False)
    answers = lm.generate_until(requests, disable_tqdm=True)

    if can_split(model):
        own = [len(text) for text in ASKED]
        assert passes == [(1, len(SHOTS)), (2, own[1]), (1, own[0])]
    else:  # windows count columns, say, so that padding has to stay in front
        assert passes == [(2, len(SHOTS) + len(ASKED[1])), (1, len(texts[0]))]
    assert lm.generated_routes.keys() == set(texts)
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([lm.tok_encode(text)])
        with lm.routed.using(lm.policy):
            tokens = lm.routed.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert answer == tiny_tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]


@pytest.mark.parametrize("where", ["the model's own settings", "the task's"])
def test_what_changes_the_likeliest_token_is_heeded(base, where):
    given = {"repetition_penalty": 5.0} if where == "the task's" else {}
    plain = to_answer(until=[], max_gen_toks=8, do_sample=False)
    without = RoutedLM(base).generate_until(plain, disable_tqdm=True)
    if not given:
        base.model.generation_config.repetition_penalty = 5.0
    requests = to_answer(until=[], max_gen_toks=8, do_sample=False, **given)
    expected = stock(base).generate_until(requests, disable_tqdm=True)
    assert expected != without, "the sample must be a test"
    drllm.detach(base.model)
    assert RoutedLM(base, batch_size=2).generate_until(requests, disable_tqdm=True) == expected


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_models_without_rotations_answer_behind_worked_examples_too(tiny_model, tiny_base, kind):
    base = tiny_base(tiny_model(kind))
    requests = to_answer([SHOTS + text for text in ASKED], until=["\n"], max_gen_toks=8)
    expected = stock(base).generate_until(requests, disable_tqdm=True)
    assert RoutedLM(base, batch_size=3).generate_until(requests, disable_tqdm=True) == expected


ENDINGS = {
    "a stop within a special token's name": ({"until": ["a"]}, {}),
    "a stop that begins with a special token": ({"until": ["<t><t>", ")<"]}, {}),
    "an end token of the request": ({"until": [], "eos_token_id": 20}, {}),
    "thinking": ({"until": ["v"]}, {"think_end_token": "4"}),
    "samples": ({"until": [], "do_sample": True, "temperature": 1.5}, {}),
    "a bound of all tokens": ({"until": [], "max_length": 60}, {}),
}


@pytest.mark.parametrize(("settings", "options"), ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_behind_worked_examples_end_where_the_harness_own_do(
    base, settings, options, batch_size
):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_tokens(["<t>"])
    base.model.resize_token_embeddings(len(tokenizer))
    base = replace(base, tokenizer=tokenizer)
    texts = [SHOTS + text for text in ASKED]
    requests = to_answer(texts, max_gen_toks=12, **settings)
    plain = stock(base, batch_size=batch_size, **options)
    lm = RoutedLM(base, batch_size=batch_size, **options)
    torch.manual_seed(0)
    expected = plain.generate_until(requests, disable_tqdm=True)
    torch.manual_seed(0)
    assert lm.generate_until(requests, disable_tqdm=True) == expected


def test_a_policy_that_is_told_from_a_full_one_by_what_it_decides_is_asked(base):
    class Fewer(FullPolicy):
        def decide(self, layer, prompts):
            return [int(layer != 2)] * prompts.num_rows

    lm = RoutedLM(base, batch_size=3)
    lm.policy = Fewer()
    texts = [SHOTS + text for text in ASKED]
    lm.generate_until(to_answer(texts, until=[], max_gen_toks=2), disable_tqdm=True)
    assert {*lm.generated_routes.values()} == {(1, 1, 0, 1, 1, 1)}


def test_answers_whose_plans_or_beams_differ_read_their_whole_prompts(base, routers):
    texts = [SHOTS + text for text in ASKED]
    whole = [(2, len(SHOTS + ASKED[1])), (1, len(texts[0]))]
    for given, settings in (({"routers": str(routers)}, {}), ({}, {"num_beams": 2})):
        lm = RoutedLM(base, batch_size=2, **given)
        passes = tokens_read(lm)
        requests = to_answer(texts, until=["\n"], max_gen_toks=2, do_sample=False, **settings)
        lm.generate_until(requests, disable_tqdm=True)
        beams = settings.get("num_beams", 1)
        assert passes == [(rows * beams, tokens) for rows, tokens in whole]
        lm.routed.detach()


def test_under_routers_every_choice_scores_as_the_questions_route_alone(base, routers):
    plain = copy.deepcopy(base.model)
    lm = RoutedLM(base, routers=str(routers), batch_size=4)
    requests = instances(QUESTIONS)
    answers = score(lm, requests)
    routes = {}
    for number, context in enumerate(QUESTIONS):  # the prompt alone, without any choice
        tokens = torch.tensor([lm.tok_encode(context)])
        with torch.no_grad(), lm.routed.using(RouterPolicy(lm.routed.routers)):
            lm.model(tokens, use_cache=False)
        routes[number] = tuple(lm.routed.last_route[0].tolist())
    assert len(set(routes.values())) > 1, "the sample must be a test"
    for request, (logprob, _) in zip(requests, answers, strict=True):
        context, continuation = lm._encode_pair(*request.args)
        [alone] = ListedModel(plain, routes[request.doc_id]).sums(context, [continuation])
        assert alone == pytest.approx(logprob, abs=LOGPROB_TOLERANCE)
    assert lm.scorer.counts == RouteCounts(len(QUESTIONS), sum(map(sum, routes.values())))


def test_under_routers_the_words_of_an_option_in_the_context_do_not_move_the_route(base, routers):
    lm = RoutedLM(base, routers=str(routers))

    def route(*names):
        requests = [lm.encode_request(option) for option in options_in_the_context(*names)]
        return lm.scorer.score(requests, lm.policy)[1]["gap", 0]

    assert route("Anna", "Bo") == route("Zeno of Elea", "Cleo")


def test_under_routers_generated_answers_follow_the_route_of_their_prompt(base, routers):
    plain = copy.deepcopy(base.model)
    lm = RoutedLM(base, routers=str(routers), batch_size=2)
    requests = to_answer(until=["\n"], max_gen_toks=6, do_sample=False)
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert set(QUESTIONS) == set(lm.generated_routes)
    for context, text in zip(QUESTIONS, texts, strict=True):
        alone = ListedModel(plain, lm.generated_routes[context])
        tokens = alone.greedy(lm.tok_encode(context), 6)
        end = lm.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        expected = lm.tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0]
        assert expected == text


def test_text_without_a_prompt_is_refused_under_routers(base, routers):
    lm = RoutedLM(base, routers=str(routers))
    with pytest.raises(RoutingError, match="without a prompt"):
        score(lm, instances({"": ["some text"]}))
    with pytest.raises(RoutingError, match=r"rolling .* no prompt"):
        lm.loglikelihood_rolling(rolling("text"), disable_tqdm=True)


def test_a_plan_from_a_file_is_followed_and_rolling_texts_are_scored_under_it(base, tmp_path):
    plan = (1, 0, 2, 1, 1, 1)
    plain = copy.deepcopy(base.model)
    file = tmp_path / "plan.json"
    layers = [layer for layer, times in enumerate(plan) for _ in range(times)]
    file.write_text(json.dumps({"path": layers}))
    lm = RoutedLM(base, path=str(file))
    requests = instances(QUESTIONS)
    for request, (logprob, _) in zip(requests, score(lm, requests), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        [alone] = ListedModel(plain, plan).sums(context, [continuation])
        assert alone == pytest.approx(logprob, abs=LOGPROB_TOLERANCE)
    texts = rolling("some text")
    slow = HFLM(pretrained=ListedModel(plain, plan, cached=True).model, tokenizer=base.tokenizer)
    assert slow.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        lm.loglikelihood_rolling(texts, disable_tqdm=True), abs=LOGPROB_TOLERANCE
    )


def test_a_path_in_another_order_scores_and_answers_as_the_plain_model_of_its_layers(
    base, tmp_path
):
    path = [0, 2, 3, 2, 4, 4, 5]
    plain = copy.deepcopy(base.model)
    file = tmp_path / "less.json"
    file.write_text(json.dumps({"path": path}))
    lm = RoutedLM(base, path=str(file), batch_size=2)
    slow = ListedModel(plain, path=path)
    requests = instances(QUESTIONS)
    for request, (logprob, _) in zip(requests, score(lm, requests), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        assert slow.sums(context, [continuation])[0] == pytest.approx(
            logprob, abs=LOGPROB_TOLERANCE
        )
    cached = HFLM(
        pretrained=ListedModel(plain, path=path, cached=True).model, tokenizer=base.tokenizer
    )
    texts = rolling("some text")
    assert cached.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        lm.loglikelihood_rolling(texts, disable_tqdm=True), abs=LOGPROB_TOLERANCE
    )
    prompts = to_answer(until=["\n"], max_gen_toks=6, do_sample=False)
    assert lm.generate_until(prompts, disable_tqdm=True) == cached.generate_until(
        prompts, disable_tqdm=True
    )
    info = lm.get_model_info()["drllm"]
    assert info["path"] == str(file)
    assert info["executions_a_forward"] == 7.0


def test_a_knob_without_routers_is_refused(base):
    with pytest.raises(ConfigError, match="no effect without routers"):
        RoutedLM(base, depth_bias=1.0)
