"""Files that are whole or not there: atomic writes, hashes, JSON lines, and the error a user can mend."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".partial."
"""How the names of files begin that are still being written."""


class ReproError(ValueError):
    """Something the user can mend; the message says what to do. Shown without a traceback."""


class Busy(ReproError):
    """Another process works in a folder."""


def replace_atomic(path: str | Path, write: Callable[[str], object]) -> None:
    """Let `write(temporary_path)` make a file and put it in the place of `path`, whole or not at all.

    The temporary file lies in the same folder, is flushed to the disk and renamed over `path`. When
    anything fails (a full disk, say) it is removed and the old file survives. Raises `ReproError` for
    an `OSError`, naming the path and the reason.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(f".{path.name}", PARTIAL, path.parent)
        os.close(handle)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        # safetensors reports a full disk as its own SafetensorError, not as an OSError
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            kept = "the file that was there is unchanged" if os.path.exists(path) else "no file was written"
            raise ReproError(
                f"cannot write {path}: {error}; {kept}. Free some space and run again."
            ) from error
        raise


def remove_partial(folder: str | Path) -> None:
    """Remove what killed processes were writing in `folder`; for the one process that works there."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path`, whole or not at all (see `replace_atomic`)."""
    payload = data.encode() if isinstance(data, str) else data

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(payload)

    replace_atomic(path, write)


def write_json(path: str | Path, values: object) -> None:
    """Write `values` as indented JSON with a final newline, atomically; NaN is an error."""
    write_atomic(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> dict:
    """The JSON object in a file; raises `ReproError` where it is missing or no such thing."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ReproError(f"{path} cannot be read: {error}. Restore it, or remove it.") from error
    if not isinstance(values, dict):
        raise ReproError(f"{path} holds no JSON object. Restore it, or remove it.")
    return values


def append_line(path: str | Path, values: dict) -> None:
    """Append `values` as one line of JSON, whatever other processes append meanwhile; NaN is an error."""
    path = Path(path)
    line = json.dumps(values, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rpartition(b"\n")
            if whole[2]:  # a killed process cut its last line
                file.truncate(len(whole[0]) + len(whole[1]))
            file.write(line.encode())
    except OSError as error:
        raise ReproError(f"cannot append to {path}: {error}. Free some space and run again.") from error


def read_lines(path: str | Path) -> list[dict]:
    """The JSON objects of a file, one a line, or none where it is missing.

    A last line without its newline was cut by a killed process and is left out; any other line that
    is not JSON, or no object, raises `ReproError` with its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ReproError(
                f"{path}, line {number}, is not JSON ({error}); restore the file from git."
            ) from error
        if not isinstance(lines[-1], dict):
            raise ReproError(
                f"{path}, line {number}, is no record ({line[:40]!r}); restore the file from git."
            )
    return lines


@contextmanager
def lock(folder: str | Path, wait: bool = False) -> Iterator[IO]:
    """Make `folder` where it is missing, and keep other processes from working in it meanwhile.

    Gives the file that is locked, for child processes that are to keep it so. wait: until no other process
    works in it. Raises `Busy`, a `ReproError`, where one does otherwise, and `ReproError` where it cannot be
    written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "w")
    except OSError as error:
        raise ReproError(f"cannot write in {folder}: {error}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise Busy(
                f"another process is working in {folder}; wait for it, or choose another folder"
            ) from error
        yield file
