"""Files are whole or not there, also when the disk is full."""

import multiprocessing
import os
import re
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
from repro import config, files, runs, train
from repro.files import ReproError
folder = Path({folder!r})
vit = config.ViT(patch=16, width=32, depth=1, heads=2)
run = config.Config("lab/x", config.Data("celeba64"), vit, config.Train(images=1, compile=False))
runs.SHARD_BYTES = 120_000 + 2**17  # so that the second shard is the one that does not fit
small = {{"a": torch.full((45_000,), 0.5), "b": torch.full((30_000,), 0.5)}}
large = {{"a": torch.full((45_000,), 0.25), "b": torch.full((55_000,), 0.25)}}
kept = runs.save_weights(folder, small, run)
trainer = train.Trainer(run, train.Place(0, 1, torch.device("cpu")))
trainer.save_state(folder)  # 0.5 MB
trainer.step = 1
files.write_atomic(folder / "a", b"old")
for name in ("a", train.STATE):
    kept[name] = files.sha256(folder / name)
files.append_line(folder / "log.jsonl", {{"a": "x" * 90_000}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel then refuses to write more
saves = [
    lambda: runs.save_weights(folder, large, run),
    lambda: trainer.save_state(folder),
    lambda: files.write_atomic(folder / "a", b"0" * 10**6),
    lambda: files.write_atomic(folder / "b", b"0" * 10**6),
    lambda: files.append_line(folder / "log.jsonl", {{"b": "y" * 90_000}}),
]
for save in saves:
    try:
        save()
    except ReproError as error:
        print("refused:", error)
assert {{name: files.sha256(folder / name) for name in kept}} == kept
files.append_line(folder / "log.jsonl", {{"c": 1}})  # it fits: the line that did not is cut off
assert [[*line] for line in files.read_lines(folder / "log.jsonl")] == [["a"], ["c"]]
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_keeps_all_that_was_there(tmp_path):
    """For real: the process may not write files beyond 100,000 bytes."""
    code = textwrap.dedent(FULL.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *refusals, listing = done.stdout.strip().split("\n")
    names = ["weights-00002-of-00002.safetensors", "state.safetensors", "a", "b", "log.jsonl"]
    for name, line in zip(names, refusals, strict=True):
        assert re.search(rf"^refused: cannot (write|append to) \S*/{name}: .*File too large", line), line
        assert line.endswith("Free some space and run again.")
    assert listing == str(
        ["a", "log.jsonl", "state.safetensors"] + [f"weights-0000{i}-of-00002.safetensors" for i in (1, 2)]
    )


def test_a_cut_last_line_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "b"')  # a process was killed here
    assert files.read_lines(path) == [{"a": 1}]
    files.append_line(path, {"a": 3})
    assert files.read_lines(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("line", [b"oops", b'"\xff"', b""])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ReproError, match="log.jsonl, line 2, is not JSON"):
        files.read_lines(tmp_path / "log.jsonl")


@pytest.mark.parametrize("write", [files.append_line, files.write_json])
def test_nan_is_refused_and_nothing_written(tmp_path, write):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "x", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [files.append_line, files.write_json])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(ReproError, match="cannot .* .*/file/below/x: .*"):
        write(tmp_path / "file" / "below" / "x", {})
    with pytest.raises(ReproError, match="cannot write in .*/file: .*; choose another folder"):
        with files.lock(tmp_path / "file"):
            pass


def test_what_a_killed_process_was_writing_can_be_removed(tmp_path):
    def killed(temporary):
        assert os.listdir(tmp_path) == [os.path.basename(temporary)]
        os.link(temporary, temporary + ".left")  # survives the clean-up of the exception
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_atomic(tmp_path / "x.json", killed)
    (tmp_path / f"{files.PARTIAL}folder").mkdir()
    (tmp_path / ".kept").touch()
    assert len(os.listdir(tmp_path)) == 3
    files.remove_partial(tmp_path)
    assert os.listdir(tmp_path) == [".kept"]


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
