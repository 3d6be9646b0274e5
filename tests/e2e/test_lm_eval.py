"""`drllm lm-eval run`: the harness' command line with our model and our tasks, as users run it."""

import json
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main
from drllm.cli.terminal import Terminal
from drllm.tasks.examples import choose
from drllm.tasks.registry import get_task
from slow_way import LOGPROB_TOLERANCE

ROUNDING = 1e-12
"""Of a standard error, whose questions are added up in another order by several processes."""

CHAT = "--apply_chat_template"
ROLLING = """\
task: some_text
dataset_path: json
dataset_kwargs: {data_files: {asked: ROWS}, cache_dir: CACHE}
test_split: asked
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


pytestmark = pytest.mark.usefixtures("small_harness")


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs a command and returns the harness' results file."""

    def run(folder: str, words: str, **model_args: Any) -> dict[str, Any]:
        joined = ",".join(f"{name}={value}" for name, value in model_args.items())
        command = ["lm-eval", "run", "--model_args", joined, "--output_path", folder]
        assert main([*command, "--device", "cpu", "--log_samples", *words.split()]) == 0
        return results_of(tmp_path / folder)

    return run


def results_of(folder: Path) -> dict[str, Any]:
    """Return the newest results below a folder."""
    results: dict[str, Any] = json.loads(max(folder.glob("*/results_*.json")).read_text())
    return results


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the newest samples of a task, in order."""
    text = max(folder.glob(f"*/samples_{task}_*.jsonl")).read_text()
    return sorted(map(json.loads, text.splitlines()), key=lambda sample: sample["doc_id"])


def assert_same_samples(first: Path, second: Path, task: str) -> None:
    slow, fast = samples_of(first, task), samples_of(second, task)
    assert [sample["arguments"] for sample in slow] == [sample["arguments"] for sample in fast]
    for ours, theirs in zip(fast, slow, strict=True):
        for one, other in zip(ours["resps"], theirs["resps"], strict=True):
            if "gold" not in ours["doc"]:  # a generated answer
                assert one[0] == other[0]
                continue
            (score, greedy), (score_there, greedy_there) = one[0], other[0]
            assert float(score) == pytest.approx(float(score_there), abs=LOGPROB_TOLERANCE)
            assert greedy == greedy_there


def own_file(folder: Path, number: int, name: str = "mine.jsonl") -> Path:
    """Write questions of one's own, invented."""
    rows = [
        {"question": f"Which is {place} of {name}?", "choices": ["a", "bb", "ccc"], "answer": 1}
        for place in range(number)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.mark.parametrize(
    "more",
    ["", *(pytest.param(m, marks=pytest.mark.thorough) for m in ("--num_fewshot 2", CHAT))],
)
def test_without_routers_every_metric_is_that_of_the_stock_class_by_the_same_command(
    more, evaluate, model_folder, tmp_path
):
    own_file(tmp_path, 40)
    words = (
        "--tasks builtin_facts,builtin_arithmetic,mine.jsonl --split test --limit 7 "
        f"--gen_kwargs max_gen_toks=6 --batch_size 3 {more}"
    )
    model = {"pretrained": model_folder(), "dtype": "float32"}
    stock = evaluate("stock", f"--model hf {words}", **model)
    ours = evaluate("ours", f"--model drllm {words}", **model)
    assert set(ours["results"]) == {"builtin_facts", "builtin_arithmetic", "mine"}
    assert ours["results"] == stock["results"]
    assert ours["n-shot"] == stock["n-shot"]
    for task in ours["results"]:
        assert_same_samples(tmp_path / "stock", tmp_path / "ours", task)
    assert 0 < ours["results"]["builtin_facts"]["acc,none"] < 1, "the sample must be a test"
    info = ours["config"]["drllm"]
    assert (info["prompts"], info["executions_a_forward"]) == (21, 4.0)


def test_the_stock_command_repeats_a_number_from_the_folder_beside_the_results(
    evaluate, model_folder, tmp_path, monkeypatch
):
    from lm_eval.__main__ import cli_evaluate

    model = {"pretrained": model_folder(), "dtype": "float32"}
    ours = evaluate("ours", "--model drllm --tasks builtin_facts --split select --limit 5", **model)
    [folder] = (tmp_path / "ours" / "tasks").iterdir()
    words = f"--tasks builtin_facts --include_path {folder} --output_path stock --device cpu"
    joined = f"pretrained={model_folder()},dtype=float32"
    monkeypatch.setattr(
        sys, "argv", ["lm-eval", "run", "--model", "hf", "--model_args", joined, *words.split()]
    )
    cli_evaluate()
    assert results_of(tmp_path / "stock")["results"] == ours["results"]


def test_the_stock_command_runs_our_model_after_its_module_is_imported(
    evaluate, model_folder, tmp_path, monkeypatch
):
    from lm_eval.__main__ import cli_evaluate

    import drllm.evaluation.lm_eval.model  # noqa: F401

    (tmp_path / "plan.json").write_text('{"path": [0, 2, 2, 3]}')
    model = {"pretrained": model_folder(), "path": "plan.json", "dtype": "float32"}
    ours = evaluate("ours", "--model drllm --tasks builtin_facts --split select --limit 5", **model)
    [folder] = (tmp_path / "ours" / "tasks").iterdir()
    words = f"--tasks builtin_facts --include_path {folder} --output_path stock --device cpu"
    joined = ",".join(f"{name}={value}" for name, value in model.items())
    monkeypatch.setattr(
        sys, "argv", ["lm-eval", "run", "--model", "drllm", "--model_args", joined, *words.split()]
    )
    cli_evaluate()
    stock = results_of(tmp_path / "stock")
    assert stock["results"] == ours["results"]
    assert stock["config"]["drllm"]["path"] == "plan.json"


def test_rolling_texts_score_as_in_the_stock_class_under_a_fixed_plan(
    evaluate, model_folder, tmp_path
):
    rolling_task(tmp_path)
    model = {"pretrained": model_folder(), "dtype": "float32"}
    words = "--tasks some_text --include_path theirs"
    stock = evaluate("stock", f"--model hf {words}", **model)["results"]["some_text"]
    ours = evaluate("ours", f"--model drllm {words}", **model)["results"]["some_text"]
    assert ours["bits_per_byte,none"] == pytest.approx(stock["bits_per_byte,none"], rel=1e-5)


def rolling_task(folder: Path) -> None:
    """Write a task that scores texts without a prompt, as a folder of one's own."""
    (folder / "theirs").mkdir()
    rows = folder / "theirs" / "text.jsonl"
    rows.write_text('{"text": "some words, and a few more"}\n{"text": "others"}\n')
    text = ROLLING.replace("ROWS", str(rows)).replace("CACHE", str(folder / "theirs" / "cache"))
    (folder / "theirs" / "some_text.yaml").write_text(text)


@pytest.mark.parametrize("flag", ["--data_dir", "--data-dir"])
def test_questions_come_from_a_data_folder_and_a_limit_draws_them_with_seed_0(
    flag, evaluate, model_folder, tmp_path
):
    rows = [
        {
            "id": f"q{place}",
            "question": f"Which is {place}?",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "AB"[place % 2],
        }
        for place in range(30)
    ]
    (tmp_path / "data" / "arc_easy").mkdir(parents=True)
    file = tmp_path / "data" / "arc_easy" / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(
        "out",
        f"--model drllm --tasks arc_easy {flag} data --limit 4",
        pretrained=model_folder(),
    )
    found = [sample["doc"]["id"] for sample in samples_of(tmp_path / "out", "arc_easy")]
    asked = get_task("arc_easy").examples("test", tmp_path / "data")
    assert found == [example.id for example in choose(asked, 4, seed=0)]
    assert found != [row["id"] for row in rows[:4]]


def test_without_a_place_for_results_nothing_is_left_behind(model_folder, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    words = f"--model drllm --model_args pretrained={model_folder()} --device cpu"
    command = ["lm-eval", "run", *words.split(), "--tasks", "builtin_facts", "--limit", "2"]
    assert main([*command, "--split", "test"]) == 0
    assert {place.name for place in tmp_path.iterdir()} == {"temporary"}
    assert list((tmp_path / "temporary").iterdir()) == []


def test_max_new_tokens_bounds_answers_whatever_the_task_asks_for_and_the_cache_holds(
    evaluate, model_folder, tmp_path
):
    words = "--model drllm --tasks builtin_arithmetic --split test --limit 3 --cache_requests true"
    longest = []
    for most in (9, 2):
        evaluate("out", f"{words} --gen_kwargs max_new_tokens={most}", pretrained=model_folder())
        samples = samples_of(tmp_path / "out", "builtin_arithmetic")
        for each in samples:
            assert each["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == most
        longest.append(max(len(each["resps"][0][0]) for each in samples))  # characters are tokens
    assert longest[1] <= 2 < longest[0] <= 9


def test_cached_requests_are_those_of_the_same_rows_and_words(evaluate, model_folder, tmp_path):
    words = "--model drllm --tasks mine.jsonl --split test --cache_requests true"

    def questions() -> list[str]:
        evaluate("out", words, pretrained=model_folder())
        return [each["doc"]["prompt"] for each in samples_of(tmp_path / "out", "mine")]

    own_file(tmp_path, 30)
    first = questions()
    cached = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.pickle")}
    assert len(cached) == 1
    assert questions() == first
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.pickle")} == cached
    text = (tmp_path / "mine.jsonl").read_text().replace("Which", "What")
    (tmp_path / "mine.jsonl").write_text(text)
    assert all("What" in prompt for prompt in questions())


def test_text_without_a_prompt_is_refused_under_routers(finished_run, tmp_path, drllm):
    rolling_task(tmp_path)
    words = "lm-eval run --model drllm --device cpu --tasks some_text --include_path theirs"
    routers = f"pretrained={finished_run / 'routers'}"
    said = drllm(words, "--model_args", routers, status=2).err.splitlines()[-1]
    assert "rolling log-likelihoods have no prompt" in said
    assert "path=FILE, or static_routing=true" in said


def test_answers_longer_than_the_model_holds_are_shorter_and_it_is_said(
    evaluate, model_folder, tmp_path, capsys
):
    words = "--model drllm --tasks builtin_arithmetic --split test --limit 3 --gen_kwargs"
    evaluate("out", f"{words} max_gen_toks=32768", pretrained=model_folder())
    [said] = (line for line in capsys.readouterr().err.splitlines() if "32768 tokens" in line)
    assert "builtin_arithmetic asks for answers of up to 32768 tokens" in said
    assert "must fit into the model's 512 tokens" in said
    most = int(said.split()[-1])
    assert 256 <= most < 512
    for each in samples_of(tmp_path / "out", "builtin_arithmetic"):
        [[answer]] = each["resps"]
        assert len(answer) <= most  # a token is a character
        assert each["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 32768


ONE_OF_TWO = """
import functools, os, sys, tempfile
import lm_eval.tasks
from lm_eval.caching import cache
from drllm.cli import main
from drllm.cli.terminal import Terminal
os.environ.update(environment)
os.chdir(folder)
tempfile.tempdir, cache.PATH = folder, f"{folder}/cache"
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
sys.exit(main(words))
"""


@pytest.mark.thorough  # two processes that import torch
def test_two_processes_give_the_numbers_of_one(evaluate, finished_run, tmp_path, processes):
    words = (
        "--model drllm --tasks builtin_facts,builtin_arithmetic --split test --limit 7 "
        "--gen_kwargs max_new_tokens=4 --cache_requests true"
    )
    model = {"pretrained": finished_run / "routers", "num_windows": 8}
    one = evaluate("one", words, **model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    joined = ",".join(f"{name}={value}" for name, value in model.items())
    where = "--output_path two --device cpu --log_samples --model_args"
    given = {"words": ["lm-eval", "run", *words.split(), *where.split(), joined]}
    pair = []
    for rank in ("0", "1"):  # as torchrun starts them
        environment = {**place, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        given |= {"folder": str(tmp_path), "environment": environment}
        pair.append(processes.Process(target=exec, args=(ONE_OF_TWO, given)))
        pair[-1].start()
    for process in pair:
        process.join(240)
        assert process.exitcode == 0
    two = results_of(tmp_path / "two")
    for task, metrics in one["results"].items():
        assert metrics == {
            name: pytest.approx(value, rel=ROUNDING) if "stderr" in name else value
            for name, value in two["results"][task].items()
        }
        assert_same_samples(tmp_path / "one", tmp_path / "two", task)
    assert two["config"]["drllm"] == one["config"]["drllm"]
    assert two["config"]["drllm"]["prompts"] == 14  # a seventh question is asked of one process
    assert not list(tmp_path.glob("drllm-tasks-*"))


def test_whatever_takes_the_harness_seconds_is_said(monkeypatch, capsys):
    lines = []

    def busy(terminal: Terminal, what: str) -> AbstractContextManager[None]:
        lines.append(what)
        return nullcontext()

    monkeypatch.setattr(Terminal, "busy", busy)
    assert main(["lm-eval", "run", "--model_args", "pretrained=x", "--tasks", "nosuch"]) == 2
    assert "unknown task 'nosuch'" in capsys.readouterr().err
    loading = "loading lm-evaluation-harness"
    reading = "reading the tasks of lm-evaluation-harness"
    assert lines == [loading, loading, loading, reading, reading]
