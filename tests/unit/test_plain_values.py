"""The stages called from Python with plain values: names, lists of dicts, settings by name."""

import json

import pytest
import torch

import drllm
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.records.results import Results
from drllm.search import retest

ROWS = [
    {"question": f"What is {n} + {n}?", "choices": [str(2 * n), str(n)], "answer": 0}
    for n in range(2, 6)
]
IDS = torch.tensor([[5, 6, 7, 8]])
QUICK = {"num_simulations": 3}
SHORT = {"num_epochs": 1, "warmup_steps": 1, "num_windows": 2, "validation_fraction": 0.0}


@pytest.fixture(scope="module", autouse=True)
def lenient_retest():
    """Let right paths of a random model survive the re-test, so that there are targets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retest, "MARGIN_TOLERANCE", 50.0)
        yield


@pytest.fixture(scope="module")
def place(model_folder):
    return str(model_folder(num_layers=4))


@pytest.fixture(scope="module")
def records(place):
    return drllm.search_paths(place, ROWS, **QUICK)


@pytest.fixture(scope="module")
def targets(records):
    return drllm.supervise(records, target="least_kl")


def test_every_row_of_a_list_is_searched_as_the_same_rows_of_a_file(
    place, records, tmp_path, assert_same_run
):
    assert [record.question for record in records] == [row["question"] for row in ROWS]
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = drllm.search_paths(drllm.load(place), file, **QUICK)
    assert [record.id for record in found] == [
        example.id for example in drllm.get_task(str(file)).examples("search")
    ]
    by_id = {record.id: record for record in records}
    assert_same_run([by_id[record.id] for record in found], found)


def test_a_row_that_cant_be_used_is_named_by_its_place(place):
    with pytest.raises(TaskError, match="examples, line 2: 'answer' is 7"):
        drllm.search_paths(place, [ROWS[0], {**ROWS[1], "answer": 7}])


def test_a_setting_that_a_stage_lacks_is_refused_with_the_nearest(place, records):
    for call in (
        lambda: drllm.search_paths(place, ROWS, num_simulation=3),
        lambda: drllm.supervise(records, targte="least_kl"),
        lambda: drllm.train(place, [], num_epoch=1),
        lambda: drllm.evaluate(place, limt=1),
    ):
        with pytest.raises(ConfigError, match=r"settings: unknown setting .*; did you mean"):
            call()


def test_a_setting_by_name_takes_the_place_of_the_configs(place):
    config = drllm.SearchConfig(num_simulations=9)
    [record] = drllm.search_paths(place, ROWS[:1], config, num_simulations=2)
    assert len(record.paths) == 3


def test_stages_leave_a_model_routed_as_it_was(tiny_llama, tiny_tokenizer, records, targets):
    model = tiny_llama(num_layers=4)
    plan = drllm.FixedPolicy([1, 0, 1, 2], 4)
    routed = drllm.attach(model, policy=plan)
    expected = routed(IDS).logits
    for given in (routed, model):
        drllm.search_paths(given, ROWS[:1], tokenizer=tiny_tokenizer, num_simulations=2)
        drllm.train(given, targets, tokenizer=tiny_tokenizer, **SHORT)
    assert torch.equal(model(IDS).logits, expected)
    assert routed.last_route.tolist() == [[1, 0, 1, 2]]


def test_targets_in_a_file_train_the_same_routers_and_fit_one_model_only(
    place, records, targets, tmp_path, tiny_llama, tiny_tokenizer
):
    file = tmp_path / "supervision.jsonl"
    drllm.supervise(records, target="least_kl", output_dir=tmp_path)
    expected = drllm.train(place, targets, **SHORT)
    found = drllm.train(place, file, output_dir=tmp_path / "routers", **SHORT)
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))
    for routers in (expected, found):
        assert routers.config.training["rewards"] == ["loglikelihood"]
    other = tiny_llama(num_layers=4, seed=1)
    for given in (str(file), [file]):
        with pytest.raises(RecordError, match=r"holds targets of .* fingerprint"):
            drllm.train(other, given, tokenizer=tiny_tokenizer, **SHORT)


def test_results_that_were_not_written_have_no_report():
    with pytest.raises(ConfigError, match="weren't written to a folder; call evaluate"):
        drllm.report(Results())
