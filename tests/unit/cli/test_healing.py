"""`drllm heal` from the command line, and what may be done with its folder."""

import json

SETTINGS = "--tasks builtin_facts --limit 20 --steps 2 --rank 2 --num-held-out 4 --device cpu"


def test_a_path_is_healed_shown_and_answered_along(drllm, model_folder, tmp_path):
    plan, output, model = tmp_path / "plan.json", tmp_path / "healed", model_folder()
    plan.write_text(json.dumps({"decisions": [1, 0, 1, 1]}))
    words = ("--model", model, "--path", plan, "--output-dir", output)
    said = drllm(f"heal {SETTINGS}", *words).out
    assert "skips layer 1" in said
    assert "builtin_facts" in said
    assert drllm("show", output).out.endswith(said)
    assert drllm(f"heal {SETTINGS}", *words).out == said
    answered = drllm("generate Hello --max-new-tokens 2", "--model", model, "--path", output).out
    assert "skips layer 1" in answered
