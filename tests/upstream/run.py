"""Run transformers' own tests on routed models, and compare every output with the plain model's.

DIR is a checkout of transformers at the installed version, or the nearest that there is: its
`tests/` and `utils/`. Every test of the models named runs in four ways, from the same seeds:

    plain   as it is
    full    each model that it makes is routed, every layer executed: outputs and caches must be
            those of `plain`
    listed  each model's layer list becomes the path of a plan, as `slow_way.ListedModel` does it
    plan    each model is routed under that plan: outputs must be those of `listed`

all to the last bit. The plan is 0, 2, 0, 2, ...: it skips and repeats, and runs as many executions
as the model has layers, so that the configurations and caches which tests make fit the listed
layers too. What a model gives layer by layer (`APART`) is rightly another thing in these two, and
left out there. An output is what the outermost call of a model or of its `generate` returns.

A test that fails or is skipped in the first of two ways says nothing about the second; where
routing refuses something, the outputs before that are compared. A test whose outputs differ from
run to run by themselves is counted as unstable. What starts processes or compiles isn't run
(`LEFT_OUT`).
"""

import argparse
import hashlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial, wraps
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from _pytest.runner import runtestprotocol
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drllm.errors import ArchitectureError
from drllm.model.layers import find_layers
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import Injection
from drllm.models.routing.policies import FixedPolicy
from slow_way import ListedModel

MODELS = ("llama", "qwen3", "mistral", "gpt2", "gemma3")
PAIRS = {"full": "plain", "plan": "listed"}  # a way, and the way that it is compared with
LEFT_OUT = ("fsdp", "tensor_parallel", "_tp_", "multi_gpu", "flash", "compil", "export")
LEFT_OUT += ("overfit", "Vision2")  # 300 steps of training; images
APART = {"hidden_states", "attentions", "past_key_values", "cache"}


def plan_of(num_layers: int) -> list[int]:
    """Return a plan that skips and repeats, with as many executions as layers."""
    return [0, 2] * (num_layers // 2) + [1] * (num_layers % 2)


def digest(output: Any, apart: bool) -> str:
    """Return a hash of all tensors, numbers and texts in an output.

    Args:
        output: Of a model or of `generate`.
        apart: Leave out what belongs to single layers.
    """
    state = hashlib.sha256()

    def walk(part: Any, in_tuple: bool = False) -> None:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(part, Cache):
            for layer in () if apart else part.layers:
                walk((layer.keys, layer.values))
        elif isinstance(part, Mapping):
            for key in part:
                if not (apart and key in APART):
                    state.update(key.encode())
                    walk(part[key])
        elif isinstance(part, (tuple, list)):
            for inner in part:  # a tuple in a tuple: hidden states without their name
                if not (apart and isinstance(inner, tuple)):
                    walk(inner)
        elif part is None or isinstance(part, (bool, int, float, str)):
            state.update(repr(part).encode())

    walk(output)
    return state.hexdigest()[:16]


def put_in_order(model: Any, layers: nn.ModuleList, plan: list[int]) -> None:
    """Let a model's own list hold the layers in the order in which a plan executes them."""
    listed = ListedModel(model, plan, cached=True).model
    path = next(name for name, module in model.named_modules() if module is layers)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, listed.get_submodule(path))
    listed.get_submodule(path).in_order = True
    vars(model.config).update(vars(listed.config))


class Watch:
    """Brings each model into the way that is being run, at its first call, and hashes outputs.

    Attributes:
        way: One of plain, full, listed, plan.
        outputs: Hashes, in the order of the calls; "raised" for one that raised.
        unroutable: Models left as they are, with the reason; their outputs aren't kept.
    """

    def __init__(self) -> None:
        self.way, self.outputs = "plain", list[str]()
        self.unroutable: Counter[str] = Counter()
        self._thread = threading.local()
        call, generate = nn.Module.__call__, GenerationMixin.generate

        def watched_call(model: Any, *args: Any, **kwargs: Any) -> Any:
            return self.outermost(model, partial(call, model, *args, **kwargs))

        @wraps(generate)
        def watched_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            own = "generate" in vars(model)  # routed already, and this is what that calls

            def run() -> Any:
                routed = None if own else vars(model).get("generate")
                return (routed or partial(generate, model))(*args, **kwargs)

            return self.outermost(model, run)

        PreTrainedModel.__call__ = watched_call
        GenerationMixin.generate = watched_generate

    def outermost(self, model: Any, run: Callable[[], Any]) -> Any:
        """Run a call, watched unless it is part of one that is."""
        if getattr(self._thread, "inside", False):
            return run()
        self._thread.inside = True
        try:
            ready = self._prepare(model)
            output, kept = None, "raised"
            try:
                output = run()
                kept = digest(output, self.way in ("listed", "plan")) if ready else ""
            finally:
                if ready:
                    self.outputs.append(kept)
            return output
        finally:
            self._thread.inside = False

    def _prepare(self, model: Any) -> bool:
        """Bring a model into the way, and tell whether it can be routed at all."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            _, layers = find_layers(model)
            plan = plan_of(len(layers))
            if any(parameter.is_meta for parameter in model.parameters()):
                raise ArchitectureError("its weights are elsewhere")
            if Injection.find(model) is not None:
                return True
            if self.way == "full":
                RoutedModel(model)
            elif self.way == "plan":
                RoutedModel(model, policy=FixedPolicy(plan, len(layers)))
            elif self.way == "listed" and not hasattr(layers, "in_order"):
                put_in_order(model, layers, plan)
        except ArchitectureError as error:
            self.unroutable[f"{type(model).__name__}: {error}"] += 1
            return False
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return True


def seed() -> None:
    """Seed all that the tests draw from, the generator of transformers' `ids_tensor` too."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for name in [name for name in sys.modules if name.startswith("tests.")]:
        generator = getattr(sys.modules[name], "global_rng", None)
        if isinstance(generator, random.Random):
            generator.seed(0)


class Plugin:
    """Runs each test in every way, and counts by model."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.counts: dict[str, dict[str, Counter[str]]] = {}
        self.notes: list[str] = []
        self._failed: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        seed()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # a subtest's too, which comes here alone
            self._failed.append(report)

    def pytest_runtest_protocol(self, item: Any, nextitem: pytest.Item | None) -> bool:
        model = item.path.parent.name
        counts = self.counts.setdefault(model, {way: Counter() for way in PAIRS})

        def run(way: str) -> tuple[str, list[str]]:
            self.watch.way, self.watch.outputs = way, []
            item._initrequest()
            self._failed.clear()
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            bad = next((each for each in self._failed + reports if not each.passed), None)
            if way == "plain":
                for report in reports:
                    item.ihook.pytest_runtest_logreport(report=report)
            if bad is None:
                return "", self.watch.outputs
            crash = getattr(bad.longrepr, "reprcrash", None)
            before = takewhile("raised".__ne__, self.watch.outputs)  # what went well until then
            return (crash.message if crash else str(bad.longrepr)).split("\n")[0], list(before)

        for way, reference in PAIRS.items():
            problem, expected = run(reference)
            if reference == "plain" and (problem or not expected):
                break  # nothing to learn from it
            if problem:
                counts[way]["no_reference"] += 1
                continue
            problem, found = run(way)
            if problem:
                expected = expected[: len(found)]
            counts[way]["tests"] += 1
            counts[way]["outputs"] += len(found)
            kind = "passed"
            if expected != found:
                again = run(reference)[1][: len(expected)]
                kind = "unstable" if again != expected else "differing"
            elif problem:
                kind = "refused" if "RoutingError" in problem else "failed"
            counts[way][kind] += 1
            if kind != "passed":
                self.notes.append(f"{way}: {kind}: {item.nodeid}: {problem}".rstrip(": "))
        return True


def main() -> int:
    """Run, print what was counted, and return 1 where an output differs or a test fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", default=",".join(MODELS), help="folders of DIR/tests/models")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="pytest's -k")
    options = parser.parse_args()
    files = []
    for model in options.models.split(","):
        file = options.folder.resolve() / "tests" / "models" / model / f"test_modeling_{model}.py"
        if not file.is_file():
            parser.error(f"{file} doesn't exist; DIR is a checkout of transformers")
        files.append(str(file))
    torch.set_num_threads(1)
    watch = Watch()
    plugin = Plugin(watch)
    wanted = " and ".join(f"not {name}" for name in LEFT_OUT)
    wanted += f" and ({options.select})" if options.select else ""
    settings = (
        "--noconftest -o addopts= -o log_cli=false -p no:cacheprovider -W ignore -q --tb=line"
    )
    folder = ["--rootdir", str(options.folder.resolve())]
    status = pytest.main([*settings.split(), *folder, "-k", wanted, *files], [plugin])
    if not plugin.counts:
        return int(status) or 1
    columns = ["tests", "passed", "outputs", "differing", "failed", "refused", "unstable"]
    columns += ["no_reference"]
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'model':10} {'way':6}" + "".join(f"{name:>13}" for name in columns))
    for model, ways in plugin.counts.items():
        for way, counts in ways.items():
            print(f"{model:10} {way:6}" + "".join(f"{counts[name]:13}" for name in columns))
    print(*plugin.notes, sep="\n")
    print("not routed:", *(f"  {n} × {what}" for what, n in watch.unroutable.items()), sep="\n")
    ways = [counts for model in plugin.counts.values() for counts in model.values()]
    return int(any(counts["differing"] or counts["failed"] for counts in ways))


if __name__ == "__main__":
    sys.exit(main())
