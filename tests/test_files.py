"""Files are whole or not there, also when the disk is full."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest

from repro import files
from repro.files import ReproError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    files.write_atomic(path, "old")

    def fail(temporary):
        open(temporary, "w").write("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ReproError, match="(?s)cannot write .*No space left.*unchanged. Free some space"):
        files.replace_atomic(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


FULL = """
import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from repro import config, files, runs
from repro.files import ReproError
folder = Path({folder!r})
run = config.Config("lab/x", config.Data("celeba64"), config.UNet(), config.Train(images=1))
runs.SHARD_BYTES = 60_000 + 2**17  # so that the second shard is the one that does not fit
small = {{"a": torch.full((10,), 0.5), "b": torch.full((30_000,), 0.5)}}
large = {{"a": torch.full((10,), 0.25), "b": torch.full((90_000,), 0.25)}}
kept = runs.save_weights(folder, small, run)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel then refuses to write more
text = b"0" * 10**6
for save in (lambda: runs.save_weights(folder, large, run), lambda: files.write_atomic(folder / "b", text)):
    try:
        save()
    except ReproError as error:
        print("refused:", error)
assert {{name: files.sha256(folder / name) for name in kept}} == kept
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_keeps_the_weights_that_were_there(tmp_path):
    """For real: the process may not write files beyond 100,000 bytes."""
    code = textwrap.dedent(FULL.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *refusals, listing = done.stdout.strip().split("\n")
    assert len(refusals) == 2 and all("Free some space and run again" in line for line in refusals), refusals
    assert "weights-00002-of-00002.safetensors" in refusals[0]
    assert listing == "['weights-00001-of-00002.safetensors', 'weights-00002-of-00002.safetensors']"


def test_a_cut_last_line_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "b"')  # a process was killed here
    assert files.read_lines(path) == [{"a": 1}]
    files.append_line(path, {"a": 3})
    assert files.read_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\noops\n')
    with pytest.raises(ReproError, match="log.jsonl, line 2, is not JSON"):
        files.read_lines(tmp_path / "log.jsonl")


@pytest.mark.parametrize("write", [files.append_line, files.write_json])
def test_nan_is_refused_and_nothing_written(tmp_path, write):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "x", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def _hold(folder, ready, end):
    with files.lock(folder):
        ready.set()
        end.wait(30)


def test_a_folder_is_worked_in_by_one_process(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, end = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path, ready, end), daemon=True)
    other.start()
    ready.wait(30)
    with pytest.raises(ReproError, match="another process is working in"):
        with files.lock(tmp_path):
            pass
    end.set()
    other.join(30)
    with files.lock(tmp_path):
        pass
