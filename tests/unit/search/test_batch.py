"""Searching a batch on a tiny model: what is recorded and retried."""

import dataclasses

import pytest

import drllm
from drllm.config import SearchConfig
from drllm.errors import ConfigError, ModelError
from drllm.model.prompts import encode, render
from drllm.models.routed_model import RoutedModel
from drllm.paths import full_decisions
from drllm.records.search import FailedQuestion
from drllm.search import evaluator, retest
from drllm.search.batch import (
    ATTEMPTS,
    BatchRecords,
    BatchSearcher,
    search_batch,
    search_in_lockstep,
)
from drllm.search.evaluator import Evaluator, JudgedOutcome, gold_text, tokenize_prompt
from drllm.search.questions import Batch, build_question, collect_questions
from drllm.search.rounds import add_late_margins
from drllm.search.steps import BatchProgress, BatchSteps
from drllm.tasks.examples import Example, Prompt
from drllm.tasks.registry import get_task
from drllm.work.run import BlockSteps
from drllm.work.store import ResultStore

CONFIG = SearchConfig(num_simulations=4)


@pytest.fixture
def batch(facts):
    examples = facts.examples("search")[:3]
    return Batch(
        0, tuple(build_question(facts, e, "loglikelihood", n) for n, e in enumerate(examples))
    )


def settings(**values):
    return SearchConfig(num_simulations=8, **values)


def test_a_record_holds_every_simulation_with_the_outcome_of_its_path_alone(routed, facts):
    examples = facts.examples("search")[:3]
    records = drllm.search_paths(routed, examples, settings())
    for record, example in zip(records, examples, strict=True):
        assert full_decisions(6) == record.full.decisions
        assert list(range(9)) == [path.simulation for path in record.paths]
        for path in record.paths:
            alone = Evaluator(routed, [facts.prompt(example, "loglikelihood")], 1.0)
            [outcome] = alone.evaluate([(0, path.decisions)])
            assert outcome.reward == path.reward
            assert outcome.margin == pytest.approx(path.margin, abs=1e-4)


def test_generated_answers_are_recorded_with_the_prompt_that_the_model_read(routed, tiny_tokenizer):
    task = get_task("builtin_arithmetic")
    example = task.examples("search")[0]
    [record] = drllm.search_paths(routed, [example], settings())
    assert record.reward == "boxed"
    assert all(path.answer is not None for path in record.paths)
    assert all(path.margin is not None for path in record.paths if path.reward < 1)
    rendered = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": task.prompt(example, "boxed").text}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == record.prompt


def test_a_model_without_its_tokenizer_is_refused(tiny_llama, facts):
    bare = RoutedModel(tiny_llama())
    with pytest.raises(ConfigError, match="tokenizer"):
        drllm.search_paths(bare, [facts], settings())


def test_the_seed_and_the_leaves_a_round_change_which_paths_are_tried(routed, facts):
    examples = facts.examples("search")[:1]
    changes = [{}, {"seed": 1}, {"leaves_per_round": 1}]
    tried_paths = [
        {
            path.decisions
            for path in drllm.search_paths(routed, examples, settings(**values))[0].paths
        }
        for values in changes
    ]
    assert [len(paths) for paths in tried_paths] == [9, 9, 9]
    assert tried_paths[0] != tried_paths[1]
    assert tried_paths[0] != tried_paths[2]


def test_kl_is_recorded_only_where_it_is_wanted(routed, facts):
    examples = facts.examples("search")[:2]
    for record in drllm.search_paths(routed, examples, settings(kl=True)):
        assert record.full.kl == pytest.approx(0, abs=1e-6)
        assert all(path.kl > 1e-6 for path in record.paths[1:])
    for record in drllm.search_paths(routed, examples, settings(kl=False)):
        assert {None} == {path.kl for path in record.paths}


@pytest.fixture
def retested(facts):
    """Questions of which some are asked again."""
    return collect_questions([facts], SearchConfig(limit=7))


def test_progress_within_a_batch_counts_new_paths_up_to_all_of_them(routed, retested):
    calls = []
    steps = BlockSteps(report=lambda *call: calls.append(call))
    records = search_in_lockstep(routed, retested, CONFIG, steps)
    shares, num_run, steps = zip(*calls, strict=True)
    assert list(shares) == sorted(shares)
    assert shares[0] < shares[steps.index("re-testing") - 1] < shares[-1] == 1.0
    assert list(dict.fromkeys(steps)) == ["trying paths", "re-testing"]
    tried_paths = [path for record in records for path in record.paths]
    again = [path.retest for path in tried_paths if path.retest is not None]
    assert again, "the sample must hold paths that are asked again"
    assert num_run[-1] == len(tried_paths)


def test_an_interrupted_re_test_resumes_at_the_questions_that_it_was_at(
    routed, retested, tmp_path, monkeypatch, assert_same_run
):
    monkeypatch.setattr(retest, "MIN_PATHS_PER_PART", 1)
    store = ResultStore(tmp_path, {}, stage="search").within("batch 0")
    count = BatchProgress.count
    new_steps = []

    def count_and_record(progress, num_runs, *, is_new, is_round):
        new_steps.append(is_new)
        count(progress, num_runs, is_new=is_new, is_round=is_round)

    monkeypatch.setattr(BatchProgress, "count", count_and_record)
    for number in range(3):
        steps = []
        new_steps.clear()

        def stop(_share, _num_paths, step, number=number, steps=steps):
            steps.append(step)
            if steps.count("re-testing") > number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search_in_lockstep(routed, retested, CONFIG, BlockSteps(store, stop))
        assert len(list(tmp_path.glob("*retest*"))) == number + 1
        assert number == 0 or sum(new_steps) == 1, "what was kept was run again"
    resumed = search_in_lockstep(routed, retested, CONFIG, BlockSteps(store))
    assert_same_run(resumed, search_in_lockstep(routed, retested, CONFIG))


def length(prompt, tokenizer):
    """Return what a prompt needs with the longest of what follows; a character is a token."""
    behind = [*map(len, prompt.continuations)] or [
        prompt.max_new_tokens,
        len(gold_text(prompt, tokenizer)),
    ]
    return len(render(tokenizer, prompt.text, chat=prompt.chat)) + max(behind)


@pytest.mark.parametrize("name", ["builtin_facts", "builtin_arithmetic"])
def test_a_question_must_fit_the_context_in_every_way_of_asking_it(
    tiny_llama, tiny_tokenizer, name
):
    task = get_task(name)
    example, reward = task.examples("search")[0], task.rewards[0]
    first = length(task.prompt(example, reward), tiny_tokenizer)
    longest = max(length(prompt, tiny_tokenizer) for prompt in task.prompts(example, reward)[1:])
    assert longest > first, "the sample must hold a longer way"
    for context in (first - 1, longest - 1):
        tight = RoutedModel(tiny_llama(max_position_embeddings=context), tokenizer=tiny_tokenizer)
        with pytest.raises(ModelError, match=rf"tokens, and up to \d+ follow; .* holds {context};"):
            search_in_lockstep(tight, [build_question(task, example, reward)], CONFIG)
    enough = RoutedModel(tiny_llama(max_position_embeddings=longest), tokenizer=tiny_tokenizer)
    [record] = search_in_lockstep(enough, [build_question(task, example, reward)], CONFIG)
    assert len(record.paths) == 5


def test_a_gold_answer_that_is_longer_than_answers_may_be_must_fit_too(tiny_llama, tiny_tokenizer):
    task = get_task("builtin_arithmetic")
    example = dataclasses.replace(task.examples("search")[0], answer="1" * 60)
    prompt = task.prompt(example, "boxed")
    context = length(prompt, tiny_tokenizer) - 1
    tight = RoutedModel(tiny_llama(max_position_embeddings=context), tokenizer=tiny_tokenizer)
    assert prompt.max_new_tokens < len(gold_text(prompt, tiny_tokenizer))
    with pytest.raises(ModelError, match="up to 68 follow"):
        tokenize_prompt(tight, prompt)


def test_a_prompt_of_megabytes_is_refused_by_its_beginning(tiny_llama, tiny_tokenizer, monkeypatch):
    """Tokenising all of it would take minutes; a prompt that fits is never refused so."""
    lengths = []

    def counted(tokenizer, text):
        lengths.append(len(text))
        return encode(tokenizer, text)

    monkeypatch.setattr(evaluator, "encode", counted)
    tight = RoutedModel(tiny_llama(max_position_embeddings=256), tokenizer=tiny_tokenizer)
    prompt = Prompt(text="word " * 800_000, reward="exact", answer="1")
    with pytest.raises(ModelError, match=r"has 4000000 characters.*holds 256; shorten"):
        tokenize_prompt(tight, prompt)
    assert max(lengths) < 10_000
    fitting = dataclasses.replace(prompt, text="x" * 200)
    assert len(tokenize_prompt(tight, fitting).tokens) == 200


class Failing:
    """Fails the first forward passes of a model, as a device that runs full would."""

    def __init__(self, routed, error, times):
        self.error = error
        self.left = times
        self.hook = routed.model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        if self.left:
            self.left -= 1
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def test_a_passing_failure_sets_nothing_aside(routed, batch, assert_same_run):
    with Failing(routed, ModelError("full"), times=1):
        result = search_batch(routed, batch, CONFIG, BlockSteps())
    assert result.failed == ()
    assert_same_run(result.records, search_batch(routed, batch, CONFIG, BlockSteps()).records)


def test_a_question_is_tried_three_times_before_it_is_set_aside(routed, batch):
    with Failing(routed, ModelError("full\n of it"), times=ATTEMPTS) as failing:
        result = search_batch(routed, batch, CONFIG, BlockSteps())
    assert failing.left == 0
    [failed] = result.failed
    assert failed == FailedQuestion(
        id=batch.questions[0].example.id,
        task="builtin_facts",
        question=batch.questions[0].example.question,
        error="ModelError: full of it",
        attempts=ATTEMPTS,
    )
    assert [record.id for record in result.records] == [q.example.id for q in batch.questions[1:]]


def test_a_question_whose_prompt_is_blank_is_set_aside(tiny_llama, tiny_tokenizer, monkeypatch):
    """Its gap is at the beginning; and the tokenizer begins each text with a token of its own."""
    monkeypatch.setattr(evaluator, "encode", lambda tokenizer, text: [1, *encode(tokenizer, text)])
    routed = RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)
    texts = ["_ is taller than Bo in the class.", "Ann thanked _ for the cake."]
    examples = [
        Example(
            id=str(number),
            task="winogrande",
            question=text,
            choices=("Ann", "Bo"),
            gold=0,
            answer="Ann",
        )
        for number, text in enumerate(texts)
    ]
    records = drllm.search_paths(routed, examples, CONFIG)
    assert [record.id for record in records] == ["1"]
    [failed] = records.failed
    assert failed.id == "0"
    assert failed.error.startswith("TaskError: a prompt of the question is ''")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_what_is_no_fault_of_a_question_ends_the_search(routed, batch, error):
    with Failing(routed, error, times=1), pytest.raises(type(error)):
        search_batch(routed, batch, CONFIG, BlockSteps())


def test_a_batch_whose_worker_died_is_searched_question_by_question(routed, batch, assert_same_run):
    function = BatchSearcher(CONFIG)
    parts = function.split(batch)
    assert [part.questions for part in parts] == [(question,) for question in batch.questions]
    results = [function(routed, part, BlockSteps()) for part in parts]
    whole = function(routed, batch, BlockSteps())
    assert_same_run(whole.records, function.join(batch, results).records)


def test_a_question_on_which_too_many_workers_died_is_set_aside_alone(batch):
    function = BatchSearcher(CONFIG)
    _, second, _ = function.split(batch)
    lost = function.give_up(second, 3)
    question = second.questions[0]
    failed = FailedQuestion(
        id=question.example.id,
        task="builtin_facts",
        question=question.example.question,
        error="its worker process died",
        attempts=3,
    )
    assert lost == BatchRecords((), (failed,))
    results = [BatchRecords(("a record",)), lost, BatchRecords(("another",))]
    assert function.join(batch, results) == BatchRecords(("a record", "another"), (failed,))


def test_the_key_of_a_batch_names_its_questions(batch):
    keys = {
        Batch(0, batch.questions).key,
        Batch(1, batch.questions).key,
        Batch(0, batch.questions[:2]).key,
        Batch(0, batch.questions[::-1]).key,
    }
    assert len(keys) == 4
    assert Batch(0, batch.questions).key == batch.key


class MarginOfOne:
    """An evaluator of generated answers that gives every right answer the margin 1."""

    scores_options = False

    def with_margins(self, pairs, outcomes):
        return [
            dataclasses.replace(outcome, margin=1.0) if outcome.is_right else outcome
            for outcome in outcomes
        ]


def test_kept_margins_of_right_answers_never_replace_other_outcomes(facts, tmp_path):
    question = build_question(facts, facts.examples("search")[0], "loglikelihood")
    right, wrong, other = (0, (1, 1)), (0, (1, 0)), (0, (0, 1))

    def add_margins(pairs):
        outcomes = {
            pair: JudgedOutcome(reward=float(pair == right), margin=None, answer=str(pair))
            for pair in pairs
        }
        store = ResultStore(tmp_path / "kept", {}, stage="search")
        progress = BatchProgress(1, [0], has_late_margins=True, on_step=None)
        return add_late_margins(MarginOfOne(), outcomes, BatchSteps([question], store, progress))

    for pairs in ([right, wrong], [right, other], [right, wrong, other]):
        outcomes = add_margins(pairs)
        assert [outcome.answer for outcome in outcomes.values()] == [str(pair) for pair in pairs]
        assert outcomes[right].margin == 1.0
