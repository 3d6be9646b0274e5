"""One search at a time in a folder, however the one before it ended."""

import signal
import subprocess
import sys
import threading

import pytest

from drllm.errors import ConfigError, RecordError
from drllm.records.places import only_writer

SEARCH = ("search", "--output-dir")
HOLD = """
import sys, time
from pathlib import Path
from drllm.records.places import only_writer
with only_writer(Path(sys.argv[1]), "search", "--output-dir"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to the folder."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path, holder):
    for _ in range(2):
        with (
            pytest.raises(RecordError, match=r"another search is writing to .*choose another"),
            only_writer(tmp_path, *SEARCH),
        ):
            pass
    assert holder.poll() is None


def test_a_killed_writer_blocks_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with only_writer(tmp_path, *SEARCH):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_even_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "new", *SEARCH):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RecordError, match="can't write"),
        only_writer(tmp_path / "file" / "new", *SEARCH),
    ):
        pass


def test_a_new_folder_to_which_a_refused_stage_wrote_nothing_is_deleted(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for folder in (new, old):
        with pytest.raises(ConfigError), only_writer(folder, "learning", "--output-dir"):
            raise ConfigError("refused")
    assert (new.exists(), old.exists()) == (False, True)
    with only_writer(new, "learning", "--output-dir"):
        (new / "kept").write_text("x")
    assert [path.name for path in new.iterdir()] == ["kept"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no file that is open")
def test_a_lock_file_that_was_deleted_in_the_meantime_lets_no_third_writer_in(
    tmp_path, monkeypatch
):
    """The second run opens the file, the first ends, and only then the second locks it."""
    import fcntl

    is_opened, has_ended = threading.Event(), threading.Event()
    lock = fcntl.flock

    def wait_and_lock(*arguments):
        if threading.current_thread() is second and not has_ended.is_set():
            is_opened.set()
            has_ended.wait()
        return lock(*arguments)

    def write():
        try:
            with only_writer(tmp_path, *SEARCH):
                results.append((tmp_path / ".search.lock").exists())
        except RecordError as error:
            results.append(str(error))

    results = []
    second = threading.Thread(target=write)
    monkeypatch.setattr(fcntl, "flock", wait_and_lock)
    with only_writer(tmp_path, *SEARCH):
        second.start()
        is_opened.wait()
    has_ended.set()
    second.join()
    [result] = results
    assert result is True or "another search is writing" in result
