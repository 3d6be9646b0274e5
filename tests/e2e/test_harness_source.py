"""Tasks of lm-evaluation-harness through the loop: searched, trained on, tuned and evaluated."""

import pytest

import drllm
from drllm.tasks.registry import get_task
from harness_files import GENERATED, OPTIONS, written_task

ROWS = [
    {"q": f"Is {one} larger than {other}?", "yes": int(one > other)}
    for one in range(20)
    for other in range(8)
]
FEW = {"num_fit": 12, "num_judged": 12, "max_skipped": 1, "beam": 1, "max_loss": 10.0}


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base(max_position_embeddings=1024)


@pytest.mark.parametrize("settings", [OPTIONS, GENERATED], ids=["options", "generated"])
def test_a_task_of_the_harness_is_searched_trained_on_and_evaluated_on_other_questions(
    settings, base, tmp_path
):
    name = written_task(tmp_path, settings, {"test": ROWS})
    task = get_task(name, trust_code=True)
    records = drllm.search_paths(base, name, limit=12, num_simulations=4, trust_task_code=True)
    asked = {record.question for record in records}
    assert len(asked) == 12
    assert asked <= {example.question for example in task.examples("search")}
    targets = drllm.supervise(records, target="least_kl")
    routers = drllm.train(base, targets, num_epochs=1, num_windows=2, router_width=4)
    assert routers.config.training["tasks"] == {task.name: len(targets)}
    few = {"num_texts": 2, "baselines": "none", "trust_task_code": True}
    [result] = drllm.evaluate(base, name, routers=routers, output_dir=tmp_path / "eval", **few)
    assert result.num_questions == len(task.examples("test")) < len(ROWS)
    few |= {"baselines": "block-influence", "curve": "0.2", "num_calibration": 8}
    [result] = drllm.evaluate(base, name, routers=routers, **few)  # fitted on select of the same
    assert result.num_questions == len(task.examples("test"))
