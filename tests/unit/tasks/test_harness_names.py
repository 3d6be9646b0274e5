"""Names of the harness' tasks, looked up in its files without importing it."""

import subprocess
import sys
from pathlib import Path

import pytest

from drllm.errors import TaskError
from drllm.tasks import harness_names
from drllm.tasks.harness_names import refuse_unknown_name

FILES = {
    "one/plain.yaml": "task: weather\ndataset_path: x\n",
    "one/group.yaml": 'group: "sky-all"\ntask:\n  - weather\n  - sky_1.5\n',
    "two/deep/tagged.yaml": "include: _template\ntask: sky_1.5\ntag:\n  - blue_things\n",
    "two/deep/_template": "tag: 'sky tasks'\r\n",
    "two/code.py": "task = 'not_a_task'\n",
}


@pytest.fixture(autouse=True)
def task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, newline="")
    monkeypatch.setattr(harness_names, "_find_task_folders", lambda: (tmp_path,))


@pytest.mark.parametrize("name", ["weather", "sky-all", "sky_1.5", "blue_things", "sky tasks"])
def test_a_name_that_is_in_a_file_is_left_to_the_harness(name: str):
    refuse_unknown_name(name, ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weathr", "unknown task 'weathr'; did you mean 'weather'? 'drllm ls tasks' and"),
        ("sky-al", "did you mean 'sky-all'?"),
        ("not_a_task", "unknown task 'not_a_task'; did you mean 'own_task'?"),  # code has no names
        ("zzz", "unknown task 'zzz'. 'drllm ls tasks' and"),
        ("own_tas", "did you mean 'own_task'?"),
        ("\udcff", r"unknown task '\udcff'"),  # a byte of the command line that isn't UTF-8
    ],
)
def test_a_name_that_is_in_no_file_is_refused_with_the_nearest(name: str, message: str):
    with pytest.raises(TaskError) as caught:
        refuse_unknown_name(name, ["own_task"])
    assert message in str(caught.value)


def test_an_unknown_name_is_refused_without_importing_the_harness():
    pytest.importorskip("lm_eval")
    script = (
        "import sys\nfrom drllm.errors import TaskError\n"
        "from drllm.tasks.registry import get_task\n"
        "try:\n    get_task('arc_eazy')\nexcept TaskError as error:\n    print(error)\n"
        "print({'torch', 'datasets', 'lm_eval.tasks'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    message, modules = done.stdout.splitlines()
    assert message.startswith("unknown task 'arc_eazy'; did you mean 'arc_easy'")
    assert modules == "set()"
