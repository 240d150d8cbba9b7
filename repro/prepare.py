"""From folders or archives of images to a prepared data set (see `repro.data`).

A folder with a manifest is whole: it is built beside, in `.<name>.partial`, and renamed at the end.
Images are in the order of their names, so the bytes do not depend on the number of workers, on the
archive's order, or on earlier runs that were killed. They do depend on the JPEG decoder: the manifest
records its version.

Preparation of one image, in this order:
1. Colour (`rgb`): the EXIF orientation is applied; grey, palette, CMYK and other modes become RGB;
   whatever is transparent lies on white; of 16-bit grey the high byte is kept (as Pillow itself does
   for 16-bit colour); the first frame of an animation is taken.
2. An image that has the data set's side (`SIDES`) now is taken as it is. One whose short side is below it is
   refused.
3. `celeba64` and 178x218 pixels, the size of the aligned CelebA images: `celeba_crop`.
4. All others: `adm_crop`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import itertools
import lzma
import os
import shutil
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError, features
from tqdm import tqdm

from repro import files
from repro.data import SIZE, data_root, fingerprint, load
from repro.files import ReproError

PREPARATION = 1
"""Version of the preparation described above: raised with every change of the pixels it makes."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files that count as images (in any case of letters); all others, and hidden ones, are ignored."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")

SIDES = {"celeba64": 64, "imagenet64": 64, "imagenet256": 256}
"""Data sets that can be prepared, and the side of their images, pixels."""


def _row(dataset: str) -> int:
    """Bytes of an image."""
    return 3 * SIDES[dataset] ** 2


# ---------------------------------------------------------------- one image


def rgb(image: Image.Image) -> Image.Image:
    """`image` upright and in mode RGB, 8 bits, transparent parts on white.

    Colour profiles are ignored and CMYK is converted by Pillow's plain formula, as ADM's preparation
    does. Raises `OSError` for a truncated file and `ValueError` for a mode without a defined range of
    brightness (32-bit integer or float).
    """
    image.load()
    with suppress(Exception):  # broken EXIF data say nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no defined range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Resize along the rows first, then along the columns.

    Both passes round and clip to 8 bits, so their order shows. Pillow always had this one, ADM's data
    too, until version 13 turned it round for tall images (python-pillow/Pillow, pull request 9549).
    """
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def celeba_crop(image: Image.Image, size: int = SIZE) -> Image.Image:
    """The central 140x140 pixels, resized to `size` by an antialiased bilinear (triangle) filter.

    score_sde (Song et al. 2021), `datasets.py`, CELEBA: `tf.image.resize(..., antialias=True)`, whose
    default method is bilinear. Pillow's BILINEAR is that filter; it rounds to 8 bits after each of its
    two passes, where score_sde stays in float: at most one grey level apart after rounding.
    """
    left, top = (image.width - 140) // 2, (image.height - 140) // 2
    crop = image.crop((left, top, left + 140, top + 140))
    return _resize(crop, size, size, Image.Resampling.BILINEAR)


def adm_crop(image: Image.Image, size: int = SIZE) -> Image.Image:
    """Halve by a box filter while the short side is at least 2 * size; bicubic to short side = size;
    central size x size pixels.

    guided-diffusion (Dhariwal and Nichol 2021), `image_datasets.py`, `center_crop_arr`.
    """
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = _resize(image, width, height, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pixels(encoded: bytes, dataset: str) -> np.ndarray:
    """The prepared pixels of an image file's bytes: uint8 [3, side, side], with the side of `dataset`.

    Raises `ValueError` for an image that is too small, and whatever Pillow raises for a damaged one.
    """
    with Image.open(io.BytesIO(encoded)) as opened:
        image = rgb(opened)
    side = SIDES[dataset]
    if min(image.size) < side:
        raise ValueError(f"too small: {image.width}x{image.height}, the short side must be at least {side}")
    if image.size != (side, side):
        aligned_celeba = dataset == "celeba64" and image.size == (178, 218)
        image = celeba_crop(image, side) if aligned_celeba else adm_crop(image, side)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# ---------------------------------------------------------------- the sources


@dataclass(frozen=True, slots=True)
class _File:
    source: Path
    inner: str
    """Path inside the source, as the source spells it."""
    name: str
    """Path that decides order and class; the same for a folder and for an archive of it."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class _Part:
    """One data set to be made: its files, sorted, and its class names."""

    name: str
    dataset: str
    listed: list[_File]
    classes: list[str]

    def source_hash(self) -> str:
        names_and_sizes = "".join(f"{file.name}\0{file.size}\n" for file in self.listed)
        return hashlib.sha256(names_and_sizes.encode(errors="surrogateescape")).hexdigest()


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


@contextmanager
def _archive(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:*") as tar:
            yield tar
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ReproError(
            f"cannot read the archive {path}: {error}. Is it complete? Fetch or make it again."
        ) from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # or the list of a million members would stay in memory
        if member.isreg() and _is_image(member.name):
            yield member


def _list(source: Path) -> Iterator[_File]:
    """The image files of a folder or archive, in any order. A folder's own name begins their names."""
    if source.is_dir():
        try:
            for folder, _, names in os.walk(source, onerror=_raise, followlinks=True):
                for name in sorted(filter(_is_image, names)):
                    path = Path(folder, name)
                    inner = path.relative_to(source).as_posix()
                    yield _File(source, inner, f"{source.name}/{inner}", path.stat().st_size)
        except OSError as error:
            raise ReproError(f"cannot read {error.filename}: {error.strerror}") from error
    elif source.name.lower().endswith(ARCHIVES) and source.is_file():
        with _archive(source) as tar:
            for member in _members(tar):
                name = PurePosixPath(member.name).as_posix().lstrip("/")
                yield _File(source, member.name, name, member.size)
    elif source.exists():
        raise ReproError(f"{source} is neither a folder nor an archive ({' '.join(ARCHIVES)})")
    else:
        raise ReproError(f"no such folder or archive: {source}")


def _raise(error: OSError) -> None:
    raise error


def _read(listed: list[_File]) -> Iterator[tuple[int, Path | bytes]]:
    """Row and content (or path) of each file. Archives are streamed, never unpacked to the disk."""
    rows: dict[Path, dict[str, int]] = {}
    for row, file in enumerate(listed):
        rows.setdefault(file.source, {})[file.inner] = row
    for source, inside in rows.items():
        if source.is_dir():
            for inner, row in inside.items():
                yield row, source / inner
        else:
            with _archive(source) as tar:
                for member in _members(tar):
                    if member.name in inside:
                        yield inside[member.name], tar.extractfile(member).read()


def _without_common_folder(listed: list[_File]) -> list[_File]:
    depth = len(PurePosixPath(os.path.commonpath([PurePosixPath(file.name).parent for file in listed])).parts)
    return [replace(file, name="/".join(PurePosixPath(file.name).parts[depth:])) for file in listed]


def _by_split(listed: list[_File]) -> dict[str | None, list[_File]]:
    """The files of train and of val, or of None where there are plain class folders.

    Their names become `<class>/<file>`: the class is the folder below `train` or `val`, or the file's
    own folder where there is neither.
    """
    parts: dict[str | None, list[_File]] = {}
    for file in listed:
        path = PurePosixPath(file.name).parts
        at = next((i for i, part in enumerate(path[:-1]) if part in ("train", "val")), None)
        below = path[at + 1 :] if at is not None else path[-2:]
        # a folder's own name is not a class: images directly in the folder that was given have none
        if len(below) < 2 or (at is None and file.source.is_dir() and len(path) == 2):
            raise ReproError(
                f"{file.source}: {file.inner} lies in no class folder; "
                "expected CLASS/IMAGE, train/CLASS/IMAGE or val/CLASS/IMAGE"
            )
        parts.setdefault(None if at is None else path[at], []).append(replace(file, name="/".join(below)))
    if None in parts and len(parts) > 1:
        stray = parts[None][0]
        raise ReproError(
            f"{stray.source}: {stray.inner} lies outside train/ and val/, which are there too; "
            "give those two folders: --source FOLDER/train --source FOLDER/val"
        )
    return parts


def _sorted(listed: list[_File]) -> list[_File]:
    listed = sorted(listed, key=lambda file: file.name)
    for one, other in itertools.pairwise(listed):
        if one.name == other.name:
            where = f"{one.source} ({one.inner}) and {other.source} ({other.inner})"
            raise ReproError(f"{one.name} is there twice, in {where}; give each image once")
    return listed


# ---------------------------------------------------------------- prepare


def prepare(
    dataset: str,
    source: str | Path | Iterable[str | Path],
    root: str | Path | None = None,
    *,
    name: str | None = None,
    split: str | None = None,
    on_corrupt: str = "error",
    workers: int | None = None,
    overwrite: bool = False,
) -> list[dict]:
    """Prepare the images of `source` and return the manifest of each data set made.

    `dataset`: one of `SIDES`. `source`: one or several folders or archives. `name`: the data
    set's name, by default `dataset`. ImageNet takes class folders, or `train/` and `val/` with class
    folders, which become `<name>` and `<name>-val` (`split`, train or val, chooses one of them, or says
    which one plain class folders are); labels count the sorted class names of the whole source.
    `on_corrupt`: "error", or "skip" to leave out the images that cannot be used and name them in the
    manifest. `workers`: threads, by default one per core.

    The same source again (same names and sizes) does nothing. Raises `ReproError` for a missing,
    empty or unreadable source, for unusable images (all are looked at, the first 20 listed), for
    another source under a name that is taken unless `overwrite`, and for a full disk; a data set that
    was there stays as it was.
    """
    if dataset not in SIDES:
        raise ReproError(f"unknown data set {dataset!r}; known: {', '.join(SIDES)}")
    if on_corrupt not in ("error", "skip"):
        raise ReproError(f"on_corrupt is {on_corrupt!r}; it must be error or skip")
    if split not in (None, "train", "val"):
        raise ReproError(f"split is {split!r}; it must be train or val")
    if workers is not None and workers < 1:
        raise ReproError(f"workers is {workers}; it must be at least 1")
    name = name or dataset
    if name.startswith(".") or "/" in name or os.sep in name:
        raise ReproError(f"{name!r} is no name for a data set: it names a folder, without / or leading dot")
    sources = [Path(one).resolve() for one in ([source] if isinstance(source, str | Path) else source)]
    listed = [file for one in dict.fromkeys(sources) for file in _list(one)]
    if not listed:
        raise ReproError(
            f"no images in {', '.join(map(str, sources))}: none of {' '.join(SUFFIXES)} "
            "(archives inside an archive must be unpacked first)"
        )
    if dataset == "celeba64":
        if split is not None:
            raise ReproError("celeba64 has no splits; leave split out")
        parts = [_Part(name, dataset, _sorted(_without_common_folder(listed)), [])]
    else:
        splits = _by_split(listed)
        classes = sorted({file.name.split("/")[0] for found in splits.values() for file in found})
        if None in splits:
            splits = {split or "train": splits[None]}
        if split is not None and split not in splits:
            raise ReproError(f"the source has no {split}/ folder, only {', '.join(sorted(splits))}/")
        parts = [
            _Part(name if which == "train" else f"{name}-val", dataset, _sorted(splits[which]), classes)
            for which in ([split] if split else sorted(splits))
        ]
    workers = workers or os.cpu_count() or 1
    return [_prepare_part(part, data_root(root), on_corrupt, workers, overwrite) for part in parts]


def _prepare_part(part: _Part, root: Path, on_corrupt: str, workers: int, overwrite: bool) -> dict:
    """Build one data set in a folder beside its place, then put it there; or find it there."""
    name = part.name
    final, partial, old = root / name, root / f".{name}.partial", root / f".{name}.old"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root / f".{name}.lock", name):
            if old.exists() and not final.exists():  # killed between the two renames below
                old.rename(final)
            if (final / "manifest.json").exists() and not overwrite:
                manifest = load(name, root).manifest
                if (
                    manifest["source"]["sha256"] == part.source_hash()
                    and manifest["preparation"] == PREPARATION
                ):
                    print(f"already prepared from this source: {_summary(manifest, final)}")
                    return manifest
                raise ReproError(
                    f"{final} was prepared from another source, or by another version of the preparation; "
                    "nothing was changed. Add --overwrite to replace it, or --name to keep both."
                )
            if final.exists() and not (final / "manifest.json").exists():
                raise ReproError(f"{final} is there and is no prepared data set; move it away, or use --name")
            shutil.rmtree(partial, ignore_errors=True)  # of an earlier run that was killed
            shutil.rmtree(old, ignore_errors=True)
            partial.mkdir()
            try:
                manifest = _build(part, partial, on_corrupt, workers)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if final.exists():
                final.rename(old)
            try:
                partial.rename(final)
            except OSError:
                if old.exists():
                    old.rename(final)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ReproError(
            f"cannot write {final}: {error}. Nothing was changed. "
            "Make room, or choose another folder by REPRO_DATA, and run again."
        ) from error
    print(f"prepared: {_summary(manifest, final)}")
    return manifest


def _summary(manifest: dict, folder: Path) -> str:
    skipped = len(manifest["skipped"])
    return f"{manifest['name']}, {manifest['count']:,} images, {skipped} skipped, in {folder}"


@contextmanager
def _only_one(lock: Path, name: str) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process ends, however it ends."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReproError(f"{name} is being prepared by another process; wait for it") from None
        yield


def _build(part: _Part, folder: Path, on_corrupt: str, workers: int) -> dict:
    """Write the files of a data set into `folder`, the manifest last, and return the manifest."""
    name, listed = part.name, part.listed
    unusable = _write_images(part, folder / "images.u8", workers)
    if unusable and on_corrupt == "error":
        lines = [f"{len(unusable)} of {len(listed):,} images of {name} cannot be used:"]
        for row in sorted(unusable)[:20]:
            lines.append(f"  {listed[row].source}: {listed[row].inner}: {unusable[row]}")
        if len(unusable) > 20:
            lines.append(f"  and {len(unusable) - 20} more")
        lines.append("Mend or remove them, or add --on-corrupt skip to leave them out. Nothing was written.")
        raise ReproError("\n".join(lines))
    if len(unusable) == len(listed):
        raise ReproError(f"none of the images of {name} can be used; {listed[0].inner}: {unusable[0]}")
    used = [file for row, file in enumerate(listed) if row not in unusable]
    if part.classes:
        position = {wnid: label for label, wnid in enumerate(part.classes)}
        np.save(folder / "labels.npy", np.array([position[file.name.split("/")[0]] for file in used], "<i8"))
        files.write_json(folder / "classes.json", part.classes)
    manifest = {
        "name": name,
        "dataset": part.dataset,
        "count": len(used),
        "shape": [len(used), 3, SIDES[part.dataset], SIDES[part.dataset]],
        "classes": len(part.classes),
        "preparation": PREPARATION,
        "versions": {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")},
        "source": {"files": len(listed), "hashed": "sorted names and sizes", "sha256": part.source_hash()},
        "skipped": [{"file": listed[row].name, "reason": unusable[row]} for row in sorted(unusable)],
        "fingerprint": fingerprint(folder),
    }
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def _write_images(part: _Part, path: Path, workers: int) -> dict[int, str]:
    """Write the pixels of the usable images in order; return why each other file cannot be used.

    Written by pwrite, not through a memory map: on a full disk that is an error, not a killed process.
    """
    listed, unusable, size = part.listed, {}, _row(part.dataset)
    with open(path, "wb+") as file:

        def work(row: int, content: Path | bytes) -> None:
            encoded = content if isinstance(content, bytes) else _read_file(content)
            try:
                prepared = pixels(encoded, part.dataset)
            except MemoryError:
                raise
            except UnidentifiedImageError:  # its own message holds a memory address
                unusable[row] = "not an image, or its first bytes are damaged"
                return
            except Exception as error:  # damaged files make Pillow raise almost anything
                unusable[row] = str(error) or type(error).__name__
                return
            _write_row(file.fileno(), row * size, prepared.tobytes())

        # threads are enough: Pillow decodes and resizes outside the interpreter lock
        bar = tqdm(total=len(listed), desc=part.name, unit="img", disable=None)
        with bar, ThreadPoolExecutor(workers) as pool:
            flying: deque[Future] = deque()
            try:
                for row, content in _read(listed):
                    flying.append(pool.submit(work, row, content))
                    if len(flying) > 8 * workers:
                        flying.popleft().result()
                        bar.update()
                while flying:
                    flying.popleft().result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        kept = [row for row in range(len(listed)) if row not in unusable]
        for new, row in enumerate(kept if unusable else ()):
            _write_row(file.fileno(), new * size, os.pread(file.fileno(), size, row * size))
        os.ftruncate(file.fileno(), len(kept) * size)
        os.fsync(file.fileno())
    return unusable


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from error


def _write_row(handle: int, first: int, content: bytes) -> None:
    if os.pwrite(handle, content, first) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
