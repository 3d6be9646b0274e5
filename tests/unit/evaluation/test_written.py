"""Answers in words, to be read beside each other."""

import json
from argparse import Namespace

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError
from drllm.evaluation.request import complete_settings
from drllm.evaluation.stage import evaluate
from drllm.evaluation.written import MAX_NEW_TOKENS, write_answers
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.reporting.stage import report


def answer_alone(routed, path, question):
    """The answer of one question along one path as a user gets it, with a mark if it is cut."""
    with routed.fixed(path):
        [answer] = routed.generate_many([question], max_new_tokens=MAX_NEW_TOKENS)
        [longer] = routed.generate_many([question], max_new_tokens=MAX_NEW_TOKENS + 1)
    is_cut = longer.tokens != answer.tokens
    return answer.text.strip() + (" …" if is_cut else "")


def test_base_and_each_path_answer_the_first_questions_as_they_would_alone(tiny_base, tmp_path):
    base = tiny_base(max_position_embeddings=1024)
    layers = (0, 1, 3, 5)
    (tmp_path / "less.json").write_text(json.dumps({"path": layers}))
    config = EvaluateConfig(limit=4, num_texts=2, num_written=2, baselines="none")
    folder = tmp_path / "eval"
    [result] = evaluate(base, "builtin_facts", config, folder, paths=str(tmp_path / "less.json"))
    assert len(result.written) == 2
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    paths = {
        "base": StaticPath(range(6)),
        "less": StaticPath(layers),
    }
    for written in result.written:
        assert list(written.answers) == list(paths)
        for name, path in paths.items():
            assert written.answers[name] == answer_alone(routed, path, written.question)
    page, _ = report(folder)
    assert "Answers to read" in page.read_text()


def test_an_answer_that_ends_by_itself_has_no_mark_of_a_cut(tiny_base):
    base = tiny_base(max_position_embeddings=1024)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    sample = Namespace(question="Which gas do plants take in?")
    base.model.generation_config.eos_token_id = None
    [cut] = write_answers(routed, None, {}, [sample], 1)
    assert cut.answers["base"].endswith(" …")
    [answer] = routed.generate_many([sample.question], max_new_tokens=4)
    base.model.generation_config.eos_token_id = answer.tokens[-1]
    [ended] = write_answers(routed, None, {}, [sample], 1)
    assert not ended.answers["base"].endswith(" …")


def test_ray_workers_cannot_write_answers():
    config = EvaluateConfig(num_written=1, executor="ray", paths="paths.json")
    with pytest.raises(ConfigError, match="num_written"):
        complete_settings(config, None, has_routers=True)
