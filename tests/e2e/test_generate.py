"""`drllm generate` with a file of prompts, and with depth control, on a tiny model."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drllm.cli.reply import Reply

TALK = [
    {"role": "user", "content": "I am Ann."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Who am I?"},
]
ROWS = [
    {"id": "ice", "prompt": "What is ice?"},
    {"question": "Name a metal that is liquid in a warm room."},
    {"id": 7, "messages": TALK},
    *({"prompt": f"Is {number} odd?"} for number in range(5)),
]


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """Routers that send the prompts of these tests along several plans."""
    import torch

    from drllm.config import ModelConfig
    from drllm.model.load import load
    from drllm.models.routed_model import RoutedModel
    from drllm.models.routers.config import RouterConfig
    from drllm.models.routers.stack import RouterStack

    config = RouterConfig(num_layers=4, hidden_size=32, num_windows=4, router_width=16)
    stack = RouterStack(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        stack.decision_weight.mul_(3)
    folder = tmp_path_factory.mktemp("routers") / "r"
    base = load(ModelConfig(model=str(model_folder()), device="cpu"))
    RoutedModel(base.model, stack).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", ROWS)


@pytest.fixture
def generate(model_folder, routers, drllm) -> Callable[..., Any]:
    """A function that generates with the routers, and returns what was printed."""
    shared = f"--routers {routers} --model {model_folder()} --device cpu --max-new-tokens 6"
    return lambda *words, status=0: drllm(f"generate {shared}", *words, status=status)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_prompt_of_a_file_is_answered_as_by_itself(generate, prompts, tmp_path):
    output = tmp_path / "new" / "answers.jsonl"
    said = generate("--file", prompts, "--output", output).out

    answers = lines(output.read_text())
    own = [f"line-{n}" for n in range(4, 9)]
    assert [row["id"] for row in answers] == ["ice", "line-2", 7, *own]
    assert answers[2]["messages"] == TALK
    plans = {tuple(row["route"]) for row in answers}
    assert len(plans) > 2
    assert f"prompts     8 under {len(plans)} plans" in said
    mean = sum(row["executions"] for row in answers) / 8
    assert f"executions  {mean:.2f} of 4 a forward pass" in said
    assert f"{sum(row['tokens'] for row in answers)} generated" in said
    for row, given in zip(answers, ROWS, strict=True):
        if "messages" in row:
            continue
        assert row["prompt"] == given.get("prompt", given.get("question"))
        assert row["executions"] == sum(row["route"])
        out = generate(row["prompt"]).out
        assert out.startswith(row["answer"] + "\n\nlayer")
        sketch = "".join("·█2"[value] for value in row["route"])
        assert f"\n       {sketch}\n" in out
        assert f"executions  {sum(row['route'])} of 4 a forward pass" in out
        assert re.search(r"time        prefill \d", out)
        assert f", {row['tokens']} generated" in out

    # Without an output the answers, and nothing else, go to standard output.
    for flags in (["--batch-size", "2"], ["--batch-size", "3"]):
        printed = generate("--file", prompts, *flags)
        assert printed.out == output.read_text()
        assert re.search(r"^prompts +8 under \d plans$", printed.err, re.MULTILINE)
        assert re.search(r"^time .* tokens generated a second\)$", printed.err, re.MULTILINE)


TRAINED = "Question: {prompt}\nAnswer:"


@pytest.fixture
def trained(routers: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that returns the routers as if they were trained on prompts of a form."""

    def recorded(**training: Any) -> Path:
        folder = Path(shutil.copytree(routers, tmp_path / "trained", dirs_exist_ok=True))
        config = json.loads((folder / "router_config.json").read_text())
        (folder / "router_config.json").write_text(json.dumps(config | {"training": training}))
        return folder

    return recorded


def test_a_prompt_is_put_as_the_routers_were_trained_unless_told_otherwise(
    generate, trained, tmp_path
):
    plain = trained(prompt_form={"chat": False, "template": TRAINED})
    asked = generate("What is ice?", "--routers", plain)
    assert f"form        {TRAINED!r}, without the chat template, as the routers were" in asked.err
    put = TRAINED.replace("{prompt}", "What is ice?")
    assert f"tokens      {len(put)} read" in asked.out, "a character is a token"
    in_words = generate(put, "--routers", plain)
    assert in_words.out.split("time")[0] == asked.out.split("time")[0]
    chatting = generate("What is ice?", "--routers", plain, "--chat")
    assert "the routers were trained on" in chatting.err
    assert chatting.out.split("time")[0] == generate("What is ice?").out.split("time")[0]

    file = write(tmp_path / "p.jsonl", [{"prompt": "What is ice?"}])
    [row] = lines(generate("--file", file, "--routers", plain).out)
    assert row["prompt"] == "What is ice?"
    assert asked.out.startswith(row["answer"] + "\n\nlayer")
    talk = write(tmp_path / "t.jsonl", [{"messages": TALK}])
    said = generate("--file", talk, "--routers", plain, status=2).err
    assert "t.jsonl, line 1: 'messages' need the chat template" in said


def test_a_form_that_cannot_be_read_is_refused(generate, trained):
    broken = trained(prompt_form={"chat": "yes"})
    assert "'training.prompt_form'" in generate("a", "--routers", broken, status=2).err


def test_the_prompt_may_come_by_standard_input(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is ice?\n"))
    piped = generate().out
    assert piped.split("time")[0] == generate("What is ice?").out.split("time")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "generate needs PROMPT" in generate(status=2).err


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A function that types lines at a terminal; it returns what the model was asked."""

    def script(*typed: Any) -> list[Any]:
        left, asked = list(typed), []

        def read(_prompt: str) -> str:
            line = left.pop(0)
            if not isinstance(line, str):
                raise line
            return line

        put = Reply.generate

        def generate(self: Reply, prompt: Any, config: Any) -> None:
            asked.append([*prompt] if isinstance(prompt, list) else prompt)
            put(self, prompt, config)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setattr(Reply, "generate", generate)
        return asked

    return script


def test_without_a_prompt_a_terminal_gets_a_chat_with_a_route_for_each_turn(generate, typing):
    asked = typing("What is ice?", " ", "Why?", EOFError())
    out = generate().out
    first, second = asked
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0]
    assert second[1]["content"] in out
    assert len(re.findall(r"^[·█2]{4}  \d of 4 executions, \d tokens", out, re.MULTILINE)) == 2


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(generate, typing, monkeypatch):
    whole = generate("What is ice?").out.split("\n\nlayer")[0]
    asked = typing("What is ice?", KeyboardInterrupt(), "Why?", "/exit")
    put = Reply.put

    def interrupted(self: Reply, value: Any) -> None:
        put(self, value)
        if len(asked) == 1 and len(self.tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reply, "put", interrupted)
    generate()
    assert asked[1][1]["content"] == whole[:3].strip(), "a character is a token"
    assert len(asked) == 2


def test_turns_stand_alone_where_the_routers_were_trained_without_the_chat_template(
    generate, trained, typing
):
    asked = typing("What is ice?", "Why?", "/exit")
    form = {"chat": False, "template": TRAINED}
    said = generate("--routers", trained(prompt_form=form)).err
    assert asked == [TRAINED.replace("{prompt}", text) for text in ("What is ice?", "Why?")]
    assert "Each turn is answered without the earlier turns" in said


def test_emoji_codes_and_markup_of_a_prompt_come_back_as_they_are(generate, tmp_path):
    text = ":fire: [bold]what?[/bold] \t\x0b\n" + "long " * 40
    [row] = lines(generate("--file", write(tmp_path / "p.jsonl", [{"prompt": text}])).out)
    assert row["prompt"] == text


def test_draws_follow_the_seed(generate: Callable[..., Any], prompts: Path):
    def draw(*flags: str) -> str:
        return generate("--file", prompts, "--temperature", "2", *flags).out

    assert draw("--seed", "1") == draw("--seed", "1")
    assert draw("--seed", "1") != draw("--seed", "2")
    assert draw() == draw("--seed", "0", "--top-p", "1")
    assert draw("--top-p", "0.0001") == draw("--top-p", "0.0001", "--seed", "3")

    def draw_one(seed: str) -> str:
        words = ["What is ice?", "--temperature", "2", "--seed", seed]
        return generate(*words).out.split("\n\n")[0]

    assert draw_one("1") == draw_one("1")
    assert draw_one("1") != draw_one("2")


def test_static_routing_executes_every_layer(generate: Callable[..., Any], prompts: Path):
    printed = generate("--file", prompts, "--static-routing")
    assert [row["route"] for row in lines(printed.out)] == [[1] * 4] * 8
    assert "8 under 1 plan\n" in printed.err


def test_the_bias_that_was_found_is_said_and_does_the_same_when_given(generate, prompts, tmp_path):
    texts = write(tmp_path / "c.jsonl", [row for row in ROWS if "messages" not in row])
    found = generate("--file", prompts, "--target-executions", "2.5", "--calibration", texts)
    pattern = r"^depth bias  (\S+): (\S+) of 4 executions a forward pass on 7 calibration prompts"
    match = re.search(pattern, found.err, re.MULTILINE)
    assert match is not None, found.err
    assert f"give --depth-bias {match[1]}\n" in found.err
    assert float(match[1]) > 0
    routes = [row["route"] for row in lines(found.out) if "messages" not in row]
    assert sum(map(sum, routes)) / len(routes) == pytest.approx(float(match[2]), abs=0.005)
    assert generate("--file", prompts, "--depth-bias", match[1]).out == found.out


@pytest.mark.parametrize(("penalty", "executions"), [("-1", 1), ("0.5", 4), ("1", 8)])
def test_the_published_penalty_goes_from_one_execution_to_two_a_layer(
    generate, penalty, executions
):
    out = generate("What is ice?", "--router-penalty", penalty).out
    assert f"executions  {executions} of 4 a forward pass" in out


def test_a_prompt_too_long_for_the_model_is_named_by_its_line_and_nothing_is_written(
    generate, tmp_path
):
    prompts = write(tmp_path / "prompts.jsonl", [*ROWS, {"prompt": "a" * 600}])
    output = tmp_path / "answers.jsonl"
    [line] = generate("--file", prompts, "--output", output, status=2).err.splitlines()
    assert f"{prompts}, line 9: the prompt has 618 tokens" in line
    assert "context holds 512" in line
    assert not output.exists()


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(
    model_folder, tmp_path, drllm
):
    model = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    refusing = "{% if messages|length == 1 %}{{ raise_exception('too short') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusing)
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"messages": TALK[:1]}])
    said = drllm("generate --device cpu --model", model, "--file", path, status=2).err
    [line] = said.splitlines()
    assert "p.jsonl, line 1: the model's chat template refuses the prompt: too short" in line
