"""Prepared data sets: one memory-mapped file of images each, made by `repro.prepare`.

<root>/<name>/images.u8       uint8 [n, 3, side, side], RGB, C order, no header
              labels.npy      int64 [n], where the data set has classes
              classes.json    class names (WordNet ids), position = label
              manifest.json   what it is, how it was made, its fingerprint
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from repro.files import ReproError

SIZE = 64
"""Side of the prepared images, pixels, but for data sets of another (`repro.prepare.SIDES`)."""

HOLDOUT_SEED = 20230317
"""Seed of `holdout_split`."""


@dataclass(frozen=True)
class Dataset:
    """A prepared data set."""

    name: str
    images: np.ndarray
    """uint8 [n, 3, side, side], RGB, 0 to 255; memory-mapped, read-only."""
    labels: np.ndarray | None
    """int64 [n], positions in `classes`; none for a data set without classes."""
    classes: list[str]
    manifest: dict


def data_root(root: str | Path | None = None) -> Path:
    """Folder of the prepared data sets: `root`, else $REPRO_DATA, else `data/prepared` in the checkout."""
    default = Path(__file__).resolve().parent.parent / "data" / "prepared"
    return Path(root or os.environ.get("REPRO_DATA") or default)


def fingerprint(folder: Path) -> str:
    """SHA-256 of the pixels, followed by the labels (little-endian int64) where there are some."""
    digest = hashlib.sha256()
    with open(folder / "images.u8", "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    if (folder / "labels.npy").exists():
        digest.update(np.load(folder / "labels.npy").astype("<i8").tobytes())
    return digest.hexdigest()


def load(name: str, root: str | Path | None = None) -> Dataset:
    """The prepared data set `name`; its images are mapped, not read.

    Raises `ReproError` where it is not prepared (with the command that prepares it), and where its files
    do not have the sizes that its manifest says.
    """
    root = data_root(root)
    folder = root / name
    if not (folder / "manifest.json").exists():
        there = sorted(path.parent.name for path in root.glob("[!.]*/manifest.json"))
        raise ReproError(
            f"the data set {name!r} is not prepared in {root} (there: {', '.join(there) or 'none'}). "
            f"Run: {_command(name)}\nor set REPRO_DATA to the folder that holds it."
        )
    again = f"Prepare it again: {_command(name)} --overwrite"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        shape, labelled = tuple(manifest["shape"]), manifest["classes"] > 0
        expected = int(np.prod(shape))
        if (size := (folder / "images.u8").stat().st_size) != expected:
            raise ReproError(
                f"{folder / 'images.u8'} has {size:,} bytes, its manifest says {expected:,}. {again}"
            )
        images = np.memmap(folder / "images.u8", np.uint8, "r", shape=shape)
        labels = np.load(folder / "labels.npy") if labelled else None
        classes = json.loads((folder / "classes.json").read_text()) if labelled else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReproError(f"the data set in {folder} is damaged: {error!r}. {again}") from error
    if labelled and (labels.shape != shape[:1] or len(classes) != manifest["classes"]):
        found = f"{len(labels):,} labels and {len(classes)} classes"
        raise ReproError(f"{folder} has {found}; its manifest says otherwise. {again}")
    return Dataset(name, images, labels, classes, manifest)


def rows_of(
    array: Shaped[np.ndarray, "all *shape"], rows: Int[np.ndarray, " n"]
) -> Shaped[np.ndarray, "n *shape"]:
    """`array[rows]`, in memory.

    Of a file mapped into memory each row is asked for first: then the disk reads many side by side, and
    nothing around them. Without that a page is read at a time, with what the system reads ahead around it:
    many times what was wanted, of a file that memory does not hold. Nothing is asked for of a part of a map,
    of a file that is no longer at the map's path, and where the system has no posix_fadvise (macOS).

    rows: 0 or more, each below the length. Raises `IndexError` beyond it.
    """
    whole = isinstance(array, np.memmap) and array.filename is not None and array.flags.c_contiguous
    if whole and hasattr(os, "posix_fadvise"):
        size = math.prod(array.shape[1:]) * array.itemsize
        with suppress(OSError), open(array.filename, "rb") as file:
            if array.offset + array.nbytes == os.fstat(file.fileno()).st_size:  # all of it, not a part
                for row in rows.tolist():
                    os.posix_fadvise(file.fileno(), array.offset + row * size, size, os.POSIX_FADV_WILLNEED)
    return array[rows]


def _command(name: str) -> str:
    """The command that prepares a data set of this name."""
    base = name.removesuffix("-val")
    dataset = "imagenet64" if base.startswith("imagenet") else "celeba64"
    if base.startswith("imagenet256"):
        dataset = "imagenet256"
    named = "" if base == dataset else f" --name {base}"
    return f"python -m repro prepare {dataset}{named} --source FOLDER_OR_TAR"


def verify(name: str, root: str | Path | None = None) -> str:
    """Recompute the fingerprint of a prepared data set from all its bytes, and return it.

    Raises `ReproError` where it is not the manifest's, besides what `load` raises.
    """
    manifest = load(name, root).manifest
    found = fingerprint(data_root(root) / name)
    if found != manifest["fingerprint"]:
        raise ReproError(
            f"the pixels or labels of {name} changed since it was prepared: fingerprint {found}, "
            f"manifest {manifest['fingerprint']}. Prepare it again: {_command(name)} --overwrite"
        )
    return found


def holdout_split(count: int, holdout: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and `holdout` indices held out of `count` images: two sorted int64 arrays.

    Held out are those whose SHA-256 of "<HOLDOUT_SEED>/<index>" is smallest: the same on every machine
    and for every version of numpy, and a smaller hold-out is a subset of a larger one.
    Raises `ValueError` unless 0 <= holdout < count.
    """
    if not 0 <= holdout < count:
        raise ValueError(f"cannot hold out {holdout} of {count} images")
    digests = [hashlib.sha256(f"{HOLDOUT_SEED}/{index}".encode()).digest() for index in range(count)]
    order = sorted(range(count), key=digests.__getitem__)
    return np.sort(np.array(order[holdout:], np.int64)), np.sort(np.array(order[:holdout], np.int64))
