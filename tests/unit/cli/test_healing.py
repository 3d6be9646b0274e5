"""`drllm heal` from the command line, and what may be done with its folder."""

import json

from drllm.cli.static_paths import _print_num_questions
from drllm.cli.terminal import Terminal
from drllm.config import TuneConfig
from drllm.tuning.data_splits import split_tasks
from paths_json import written_paths

SETTINGS = "--tasks builtin_facts --limit 20 --steps 2 --rank 2 --num-held-out 4 --device cpu"


def test_a_path_is_healed_shown_and_answered_along(drllm, model_folder, tmp_path):
    plan, output, model = tmp_path / "plan.json", tmp_path / "healed", model_folder()
    plan.write_text(json.dumps({"decisions": [1, 0, 1, 1]}))
    words = ("--model", model, "--path", plan, "--output-dir", output, "--repair", "none")
    said = drllm(f"heal {SETTINGS}", *words).out
    assert "skips layer 1" in said
    assert "builtin_facts" in said
    assert drllm("show", output).out.endswith(said)
    assert drllm(f"heal {SETTINGS}", *words).out == said
    answered = drllm("generate Hello --max-new-tokens 2", "--model", model, "--path", output).out
    assert "skips layer 1" in answered


def test_a_refit_alone_is_made_shown_and_evaluated(drllm, model_folder, tmp_path):
    plan, output, model = tmp_path / "plan.json", tmp_path / "healed", model_folder()
    plan.write_text(json.dumps({"decisions": [1, 1, 0, 1]}))
    words = ("--model", model, "--path", plan, "--output-dir", output)
    settings = "--tasks builtin_facts --limit 20 --num-held-out 4 --minutes 0 --device cpu"
    result = drllm(f"heal {settings}", *words)
    sentence = "it was repaired in closed form (1 layer's weights solved on"
    assert sentence in result.out
    assert "solving the refit: 100 %" in result.err
    assert drllm("show", output).out.endswith(result.out)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert sentence in card
    assert card.index("drllm export") < card.index(sentence)
    evaluation = ("--model", model, "--paths", output, "--output-dir", tmp_path / "eval")
    log = drllm("evaluate --tasks builtin_arithmetic --limit 4 --device cpu", *evaluation).err
    assert "path plan was repaired in closed form (1 layer's weights" in log


def test_a_refit_that_is_no_better_ends_with_one_line_and_no_files(drllm, model_folder, tmp_path):
    """The random model's text gets worse as the path comes nearer to the full one."""
    plan, output = tmp_path / "plan.json", tmp_path / "healed"
    plan.write_text(json.dumps({"decisions": [1, 0, 1, 0]}))
    words = ("--model", model_folder(), "--path", plan, "--output-dir", output)
    settings = "--tasks builtin_facts --limit 20 --num-held-out 4 --minutes 0 --device cpu"
    error = drllm(f"heal {settings}", *words, status=2).err.splitlines()[-1]
    assert "doesn't lower the next-token loss" in error
    assert not output.exists()


def test_the_measured_loss_of_a_tuned_path_is_repeated_before_the_work(
    drllm, model_folder, tmp_path
):
    model = model_folder()
    another = {"id": "another", "num_layers": 4, "fingerprint": "0123"}
    file = written_paths(
        tmp_path / "paths.json", another, paths={"full": [0, 1, 2, 3], "a": [0, 3]}
    )
    words = ("--model", model, "--path", f"{file}:a", "--output-dir", tmp_path / "healed")
    lines = drllm(f"heal {SETTINGS}", *words, status=2).err.splitlines()
    first, last = lines[lines.index("measured by tune:") + 1], lines[-1]
    assert first.startswith("  on arc_easy, a keeps its answers")
    assert "fingerprint" in last  # so nothing was healed


def test_a_tuning_counts_the_rows_that_repeat_a_question(tmp_path, capsys):
    file = tmp_path / "sums.jsonl"
    row = {"question": "What is %d + 0?", "choices": ["a", "b"], "answer": 0}
    file.write_text("".join(json.dumps(row) % (number % 98) + "\n" for number in range(100)))
    config = TuneConfig(tasks=str(file))
    [splits] = split_tasks(config)
    _print_num_questions(splits, config, Terminal())
    output = " ".join(capsys.readouterr().out.split())
    assert output.endswith("to test them; 2 of 100 rows repeat a text, left out")
