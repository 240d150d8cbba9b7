"""Preparing data sets: pixels against independent computations, the same bytes however made, bad input."""

import fcntl
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repro import data, prepare
from repro.files import ReproError

SHARED = Path(__file__).parents[2] / "shared" / "data"
PROJECT = Path(__file__).parents[1]


def noise(width, height, seed=0, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def faces(folder, count, side=64, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.fromarray(noise(side, side, seed=i)).save(folder / f"{i:06}.png")
    return folder


def classes(folder, wnids=("n01", "n02"), count=3):
    for k, wnid in enumerate(wnids):
        faces(folder / wnid, count, first=100 * k)
    return folder


def pack(folder, archive, order=1):
    """A tar of `folder`, its files in name order or (order = -1) against it."""
    with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tar', '')}") as tar:
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=order < 0):
            tar.add(path, path.relative_to(folder.parent))
    return archive


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- another size


def test_images_of_256_pixels_are_prepared_whole_where_some_are_not(tmp_path):
    """Cropped as ADM's, in rows of their own size, also where an unusable image before them is left out."""
    source = classes(tmp_path / "source", count=1)
    (source / "n01" / "a.png").write_bytes(b"no image")
    (source / "n01" / "000000.png").unlink()
    (source / "n02" / "000100.png").unlink()
    large = Image.fromarray(noise(300, 270, seed=3))
    large.save(source / "n01" / "b.png")
    Image.fromarray(noise(256, 256, seed=4)).save(source / "n02" / "c.png")
    faces(source / "n02", 1, first=9)  # too small
    prepare.prepare("imagenet256", source, tmp_path / "data", on_corrupt="skip", workers=2)
    found = data.load("imagenet256", tmp_path / "data")
    assert found.images.shape == (2, 3, 256, 256) and found.labels.tolist() == [0, 1]
    crop = np.asarray(prepare.adm_crop(large, 256)).transpose(2, 0, 1)
    np.testing.assert_array_equal(found.images[0], crop)
    np.testing.assert_array_equal(found.images[1], noise(256, 256, seed=4).transpose(2, 0, 1))
    assert "short side must be at least 256" in found.manifest["skipped"][1]["reason"]
    assert data.verify("imagenet256", tmp_path / "data") == found.manifest["fingerprint"]
    with pytest.raises(ReproError, match="prepare imagenet256 --source"):
        data.load("imagenet256", tmp_path / "nowhere")


# ---------------------------------------------------------------- one image


def prepared(image, form="PNG", dataset="celeba64", **options):
    return prepare.pixels(encode(image, form, **options), dataset).transpose(1, 2, 0)


def test_an_image_of_the_right_size_is_taken_as_it_is():
    array = noise(64, 64)
    np.testing.assert_array_equal(prepared(Image.fromarray(array)), array)
    jpeg = encode(Image.fromarray(array), "JPEG")
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    np.testing.assert_array_equal(prepare.pixels(jpeg, "imagenet64"), decoded.transpose(2, 0, 1))


def test_grey_and_two_tone():
    grey = noise(64, 64, channels=1)
    np.testing.assert_array_equal(prepared(Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    black_white = Image.fromarray(grey > 127)
    assert black_white.mode == "1"
    expected = np.repeat((grey > 127)[..., None] * np.uint8(255), 3, 2)
    np.testing.assert_array_equal(prepared(black_white), expected)


def test_sixteen_bit_grey_keeps_the_high_byte():
    deep = np.random.default_rng(0).integers(0, 65536, (64, 64)).astype(np.uint16)
    expected = np.repeat((deep // 256).astype(np.uint8)[..., None], 3, 2)
    for form in ("PNG", "TIFF"):
        np.testing.assert_array_equal(prepared(Image.fromarray(deep), form), expected)


def test_palette_with_and_without_transparency():
    index = noise(64, 64, channels=1)
    table = noise(256, 1)[0]
    image = Image.fromarray(index)
    image.putpalette(table.tobytes())
    assert image.mode == "P"
    np.testing.assert_array_equal(prepared(image), table[index])
    expected = table[index]
    expected[index == 7] = 255
    np.testing.assert_array_equal(prepared(image, transparency=7), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_lie_on_white(mode):
    colour, alpha = noise(64, 64, channels=len(mode) - 1), noise(64, 64, seed=1, channels=1)
    alpha[:8], alpha[8:16] = 0, 255
    image = Image.fromarray(np.dstack([colour, alpha]), mode)
    weight = alpha[..., None] / 255
    expected = np.broadcast_to(weight * np.atleast_3d(colour) + (1 - weight) * 255, (64, 64, 3))
    found = prepared(image)
    np.testing.assert_allclose(found, expected, atol=1)
    assert (found[:8] == 255).all() and (found[8:16] == expected[8:16]).all()


def test_cmyk():
    inks = noise(64, 64, channels=4)
    expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    np.testing.assert_allclose(prepared(Image.fromarray(inks, "CMYK"), "TIFF"), expected, atol=1)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation):
    array = noise(64, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(prepared(Image.fromarray(array), exif=exif), UPRIGHT[orientation](array))


def test_a_rotated_celeba_image_is_cropped_as_celeba():
    array = noise(178, 218)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter anticlockwise
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(array, 1)))
    assert lying.size == (218, 178)
    np.testing.assert_array_equal(prepared(lying, exif=exif), prepared(Image.fromarray(array)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_matter():
    array = noise(64, 64)
    broken = encode(Image.fromarray(array), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    whole = encode(Image.fromarray(array), "JPEG")
    np.testing.assert_array_equal(prepare.pixels(broken, "celeba64"), prepare.pixels(whole, "celeba64"))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"pixels of mode {mode} have no defined range"):
        prepared(Image.new(mode, (64, 64)), "TIFF")


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(noise(64, 64, seed=i, channels=1)) for i in range(2)]
    found = prepared(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(found[..., 0], np.asarray(frames[0]))


def test_too_small_names_its_size():
    with pytest.raises(ValueError, match="too small: 300x63, the short side must be at least 64"):
        prepared(Image.new("RGB", (300, 63)))


def triangle(x):
    return np.maximum(1 - np.abs(x), 0)


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    outer = np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, outer)


def resample(array, width, height, kernel, eight_bit=True):
    """Antialiased separable resize: the kernel, stretched by the reduction, normalised at the edges.

    `eight_bit`: rounded to 0, ..., 255 after the pass along the rows, which comes first, and after the other.
    """
    for axis, size in ((1, width), (0, height)):
        ratio = array.shape[axis] / size
        centres = (np.arange(size) + 0.5) * ratio
        weights = kernel((np.arange(array.shape[axis]) + 0.5 - centres[:, None]) / max(ratio, 1))
        weights /= weights.sum(1, keepdims=True)
        array = np.moveaxis(np.tensordot(weights, array, (1, axis)), 0, axis)
        array = np.clip(np.floor(array + 0.5), 0, 255) if eight_bit else array
    return array


def test_celeba_crop_is_an_antialiased_bilinear_resize_of_the_central_140():
    array = noise(178, 218)
    centre = array[39 : 39 + 140, 19 : 19 + 140].astype(float)
    expected = np.round(resample(centre, 64, 64, triangle, eight_bit=False))
    np.testing.assert_allclose(prepared(Image.fromarray(array)), expected, atol=1)
    other = prepared(Image.fromarray(array), dataset="imagenet64")  # the size means nothing elsewhere
    assert np.abs(other - expected).max() > 20


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (129, 128), (64, 80), (1000, 130), (200, 206), (127, 127), (65, 513)]
)
def test_adm_crop(size):
    array = noise(*size)
    expected = array.astype(float)
    while min(expected.shape[:2]) >= 128:
        expected = resample(expected, expected.shape[1] // 2, expected.shape[0] // 2, box)
    height, width = expected.shape[:2]
    height, width = round(height * 64 / min(height, width)), round(width * 64 / min(height, width))
    expected = resample(expected, width, height, cubic)
    top, left = (height - 64) // 2, (width - 64) // 2
    expected = expected[top : top + 64, left : left + 64]
    np.testing.assert_allclose(prepared(Image.fromarray(array)), expected, atol=1)


# ---------------------------------------------------------------- the same bytes


def test_bytes_do_not_depend_on_workers_or_on_the_kind_of_source(tmp_path):
    folder = faces(tmp_path / "in" / "my_faces", 30, side=90)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._000001.png").write_text("left by another system")
    sources = [
        folder,
        folder.parent,
        pack(folder, tmp_path / "faces.tar"),
        pack(folder, tmp_path / "faces.tar.gz", order=-1),
        pack(folder, tmp_path / "faces.tar.xz", order=-1),
    ]
    made = []
    for i, source in enumerate(sources):
        for workers in (1, 4):
            root = tmp_path / f"out{i}-{workers}"
            prepare.prepare("celeba64", source, root, workers=workers)
            made.append(contents(root / "celeba64"))
    assert all(one == made[0] for one in made)
    images = data.load("celeba64", tmp_path / "out0-1").images
    expected = prepare.adm_crop(Image.open(folder / "000029.png"))
    np.testing.assert_array_equal(images[29].transpose(1, 2, 0), np.asarray(expected))


def test_several_sources_join_into_one(tmp_path):
    whole = classes(tmp_path / "whole", ("n01", "n02", "n03"))
    halves = [classes(tmp_path / "a" / "set", ("n03",)), classes(tmp_path / "b" / "set", ("n01", "n02"))]
    for path in (halves[0] / "n03").iterdir():  # the same pixels as in the whole
        path.unlink()
    for path in (whole / "n03").iterdir():
        (halves[0] / "n03" / path.name).write_bytes(path.read_bytes())
    archives = [pack(half, tmp_path / f"{half.parent.name}.tar.xz") for half in halves]
    prepare.prepare("imagenet64", whole, tmp_path / "one")
    prepare.prepare("imagenet64", archives, tmp_path / "two")
    assert contents(tmp_path / "one" / "imagenet64") == contents(tmp_path / "two" / "imagenet64")


def test_train_and_val_with_labels(tmp_path):
    source = tmp_path / "subset"
    classes(source / "train", ("n02", "n01"), 3)
    classes(source / "val", ("n01", "n02", "n03"), 2)
    root = tmp_path / "out"
    manifests = prepare.prepare("imagenet64", source, root, name="imagenet64-few")
    assert [manifest["name"] for manifest in manifests] == ["imagenet64-few", "imagenet64-few-val"]
    train, val = data.load("imagenet64-few", root), data.load("imagenet64-few-val", root)
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.labels.dtype == np.int64 and train.images.shape == (6, 3, 64, 64)
    first = np.asarray(Image.open(source / "train" / "n01" / "000100.png"))
    np.testing.assert_array_equal(train.images[0].transpose(1, 2, 0), first)
    # one at a time: by the folder's name, or by split
    prepare.prepare("imagenet64", source / "train", tmp_path / "b", name="imagenet64-few", split="train")
    prepare.prepare("imagenet64", source, tmp_path / "b", name="imagenet64-few", split="val")
    np.testing.assert_array_equal(data.load("imagenet64-few", tmp_path / "b").images, train.images)
    assert contents(tmp_path / "b" / "imagenet64-few-val") == contents(root / "imagenet64-few-val")
    # plain class folders are whatever split is asked for
    prepare.prepare("imagenet64", classes(tmp_path / "plain"), tmp_path / "c", split="val")
    assert data.load("imagenet64-val", tmp_path / "c").classes == ["n01", "n02"]


SLOW = """
import sys, time
from repro import data, prepare
pixels = prepare.pixels
prepare.pixels = lambda *args: (time.sleep(0.02), pixels(*args))[1]
prepare.prepare("celeba64", sys.argv[1], sys.argv[2], workers=2, overwrite=len(sys.argv) > 3)
"""


def killed_in_the_middle(source, root, *more):
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(root), *more], cwd=PROJECT)
    growing = root / ".celeba64.partial" / "images.u8"
    while not (growing.exists() and growing.stat().st_size > 20 * 3 * 64 * 64):
        assert child.poll() is None, "ended before it was killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert growing.exists()


def test_killed_in_the_middle_then_run_again(tmp_path):
    source, root = pack(faces(tmp_path / "faces", 300), tmp_path / "faces.tar.gz"), tmp_path / "out"
    killed_in_the_middle(source, root)
    with pytest.raises(ReproError, match="is not prepared"):
        data.load("celeba64", root)
    prepare.prepare("celeba64", source, root)
    prepare.prepare("celeba64", source, tmp_path / "uninterrupted")
    assert contents(root / "celeba64") == contents(tmp_path / "uninterrupted" / "celeba64")
    assert [path.name for path in root.iterdir() if path.name != ".celeba64.lock"] == ["celeba64"]
    # killed while it replaces: the old one is whole
    old = contents(root / "celeba64")
    killed_in_the_middle(faces(tmp_path / "other", 300, first=500), root, "--overwrite")
    assert contents(root / "celeba64") == old and data.verify("celeba64", root)


def test_killed_between_the_two_renames(tmp_path):
    source, root = faces(tmp_path / "faces", 3), tmp_path / "out"
    prepare.prepare("celeba64", source, root)
    before = contents(root / "celeba64")
    (root / "celeba64").rename(root / ".celeba64.old")
    prepare.prepare("celeba64", source, root)
    assert contents(root / "celeba64") == before and not (root / ".celeba64.old").exists()


def test_a_rename_that_fails_while_it_replaces(tmp_path, monkeypatch):
    root, rename = tmp_path / "out", Path.rename
    prepare.prepare("celeba64", faces(tmp_path / "faces", 3), root)
    before = contents(root / "celeba64")

    def fail_for_the_new_one(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no more names")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(ReproError, match="no more names. Nothing was changed"):
        prepare.prepare("celeba64", faces(tmp_path / "others", 4), root, overwrite=True)
    assert contents(root / "celeba64") == before


def test_again_from_the_same_source_does_nothing(tmp_path, capsys):
    source, root = faces(tmp_path / "faces", 4), tmp_path / "out"
    first = prepare.prepare("celeba64", source, root)
    when = (root / "celeba64" / "images.u8").stat().st_mtime_ns
    assert prepare.prepare("celeba64", pack(source, tmp_path / "faces.tar"), root) == first
    assert "already prepared from this source: celeba64, 4 images, 0 skipped" in capsys.readouterr().out
    assert (root / "celeba64" / "images.u8").stat().st_mtime_ns == when


def test_another_source_needs_overwrite(tmp_path):
    root = tmp_path / "out"
    prepare.prepare("celeba64", faces(tmp_path / "faces", 4), root)
    before = contents(root / "celeba64")
    other = faces(tmp_path / "others", 5)
    with pytest.raises(ReproError, match="another source.*nothing was changed. Add --overwrite"):
        prepare.prepare("celeba64", other, root)
    assert contents(root / "celeba64") == before
    prepare.prepare("celeba64", other, root, overwrite=True)
    assert len(data.load("celeba64", root).images) == 5


# ---------------------------------------------------------------- bad input


def damaged(folder, names):
    for name in names:
        whole = folder / name
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def test_unusable_images_are_listed_and_nothing_is_written(tmp_path):
    folder = faces(tmp_path / "faces", 6)
    damaged(folder, ["000002.png"])
    (folder / "000003.png").write_bytes(b"no image at all")
    Image.new("RGB", (64, 20)).save(folder / "000004.png")
    with pytest.raises(ReproError) as error:
        prepare.prepare("celeba64", folder, tmp_path / "out")
    message = str(error.value)
    assert "3 of 6 images of celeba64 cannot be used" in message and "--on-corrupt skip" in message
    assert f"{folder}: 000002.png: " in message and "truncated" in message
    assert "000003.png: not an image" in message
    assert "000004.png: too small: 64x20" in message
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"]


def test_at_most_twenty_unusable_images_are_listed(tmp_path):
    folder = faces(tmp_path / "faces", 25)
    damaged(folder, [path.name for path in folder.iterdir()][:23])
    with pytest.raises(ReproError, match="23 of 25 images") as error:
        prepare.prepare("celeba64", folder, tmp_path / "out")
    assert str(error.value).count(".png: ") == 20 and "and 3 more" in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_skipped_images_are_left_out_and_named(tmp_path, kind):
    folder = classes(tmp_path / "set", count=10)
    bad = ["n01/000000.png", "n01/000004.png", "n02/000109.png"]
    damaged(folder, bad)
    source = folder if kind == "folder" else pack(folder, tmp_path / "set.tar", order=-1)
    (manifest,) = prepare.prepare("imagenet64", source, tmp_path / "out", on_corrupt="skip")
    assert [skipped["file"] for skipped in manifest["skipped"]] == bad
    assert all("truncated" in skipped["reason"] for skipped in manifest["skipped"])
    assert manifest["count"] == 17
    for name in bad:
        (folder / name).unlink()
    prepare.prepare("imagenet64", folder, tmp_path / "without")
    found, expected = (data.load("imagenet64", tmp_path / where) for where in ("out", "without"))
    np.testing.assert_array_equal(found.images, expected.images)
    assert found.labels.tolist() == expected.labels.tolist() == [0] * 8 + [1] * 9
    assert found.manifest["fingerprint"] == expected.manifest["fingerprint"]


def test_nothing_usable(tmp_path):
    folder = faces(tmp_path / "faces", 2)
    damaged(folder, ["000000.png", "000001.png"])
    with pytest.raises(ReproError, match="none of the images of celeba64 can be used; 000000.png"):
        prepare.prepare("celeba64", folder, tmp_path / "out", on_corrupt="skip")


def test_unreadable_sources(tmp_path):
    with pytest.raises(ReproError, match="no such folder or archive: .*missing.tar"):
        prepare.prepare("celeba64", tmp_path / "missing.tar", tmp_path / "out")
    (tmp_path / "faces.zip").write_bytes(b"PK")
    with pytest.raises(ReproError, match="faces.zip is neither a folder nor an archive"):
        prepare.prepare("celeba64", tmp_path / "faces.zip", tmp_path / "out")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(ReproError, match="cannot read .*gone.png: No such file"):
        prepare.prepare("celeba64", tmp_path / "linked", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReproError, match="no images in .*empty"):
        prepare.prepare("celeba64", tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_a_cut_archive(tmp_path, suffix):
    archive = pack(faces(tmp_path / "faces", 20), tmp_path / f"faces{suffix}")
    archive.write_bytes(archive.read_bytes()[:-90_000])
    with pytest.raises(ReproError, match=f"cannot read the archive .*faces{suffix}.*Is it complete"):
        prepare.prepare("celeba64", archive, tmp_path / "out")


def test_an_image_given_twice(tmp_path):
    folder = faces(tmp_path / "faces", 3)
    with pytest.raises(ReproError, match=r"000000.png is there twice, in .*faces.tar.* and .*other.tar"):
        prepare.prepare(
            "celeba64",
            [pack(folder, tmp_path / "faces.tar"), pack(folder, tmp_path / "other.tar")],
            tmp_path / "out",
        )


def test_images_without_a_class(tmp_path):
    with pytest.raises(ReproError, match="000000.png lies in no class folder; expected CLASS/IMAGE"):
        prepare.prepare("imagenet64", faces(tmp_path / "flat", 2), tmp_path / "out")
    with pytest.raises(ReproError, match="val/000000.png lies in no class folder"):
        prepare.prepare("imagenet64", faces(tmp_path / "set" / "val", 2).parent, tmp_path / "out")
    mixed = tmp_path / "mixed"
    classes(mixed / "train")
    faces(mixed / "test", 1)
    with pytest.raises(ReproError, match="test/000000.png lies outside train/ and val/.*FOLDER/train"):
        prepare.prepare("imagenet64", mixed, tmp_path / "out")
    with pytest.raises(ReproError, match="no val/ folder, only train/"):
        prepare.prepare("imagenet64", mixed / "train", tmp_path / "out", split="val")


def test_bad_options(tmp_path):
    folder = faces(tmp_path / "faces", 1)
    for options, message in [
        ({"dataset": "celeba"}, "unknown data set 'celeba'; known: celeba64, imagenet64"),
        ({"split": "val"}, "celeba64 has no splits"),
        ({"split": "test"}, "split is 'test'; it must be train or val"),
        ({"on_corrupt": "ignore"}, "on_corrupt is 'ignore'; it must be error or skip"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"name": "../up"}, "is no name for a data set"),
    ]:
        with pytest.raises(ReproError, match=message):
            prepare.prepare(**{"dataset": "celeba64", "source": folder, "root": tmp_path / "out"} | options)


def test_a_folder_of_the_users_own_is_not_replaced(tmp_path):
    faces(tmp_path / "celeba64", 2)
    with pytest.raises(ReproError, match="is there and is no prepared data set; move it away, or use --name"):
        prepare.prepare("celeba64", tmp_path / "celeba64", tmp_path, overwrite=True)
    assert len(list((tmp_path / "celeba64").iterdir())) == 2


def test_two_at_once(tmp_path):
    root = tmp_path / "out"
    root.mkdir()
    with open(root / ".celeba64.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ReproError, match="celeba64 is being prepared by another process"):
            prepare.prepare("celeba64", faces(tmp_path / "faces", 1), root)


FULL = """
import resource, sys
from repro import files, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    prepare.prepare("celeba64", sys.argv[1], sys.argv[2], overwrite=True)
except files.ReproError as error:
    print(error)
"""


def test_a_full_disk_keeps_what_was_there(tmp_path):
    root = tmp_path / "out"
    prepare.prepare("celeba64", faces(tmp_path / "few", 3), root)
    before = contents(root / "celeba64")
    command = [sys.executable, "-c", FULL, str(faces(tmp_path / "many", 20)), str(root)]
    output = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert f"cannot write {root / 'celeba64'}" in output and "Nothing was changed" in output
    assert contents(root / "celeba64") == before and not (root / ".celeba64.partial").exists()


# ---------------------------------------------------------------- real images


def real(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the images of {name}, which are not part of the repository")
    return path


def test_originals(tmp_path):
    with tarfile.open(real("originals-sample.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    originals = tmp_path / "originals"
    (celeba,) = prepare.prepare("celeba64", originals / "celeba", tmp_path / "out")
    (imagenet,) = prepare.prepare("imagenet64", originals / "imagenet", tmp_path / "out")
    assert (celeba["count"], imagenet["count"]) == (150, 120)
    # Pillow 13.0.0, libjpeg-turbo 3.2.0
    assert celeba["fingerprint"] == "8b2c383edee180f76a094cc0b62fb400e0b05d11a7bec7f9c71f28c150f6a3f0"
    assert imagenet["fingerprint"] == "041e330efe72cf5de3357dd0c6cc469d995934b0ed1bcc9c18c762bfd4058b71"
    loaded = data.load("imagenet64", tmp_path / "out")
    assert loaded.classes == ["n02086240", "n02102040", "n03888257"]
    paths = sorted(originals.glob("imagenet/*/*"))
    assert [loaded.classes[label] for label in loaded.labels] == [path.parent.name for path in paths]
    grey = [i for i, path in enumerate(paths) if Image.open(path).mode == "L"]
    assert len(grey) == 1 and np.ptp(loaded.images[grey[0]], axis=0).max() == 0


def test_ready_images_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "celeba64"
    folder.mkdir()
    with tarfile.open(real("celeba64.tar.xz")) as tar:
        while len(list(folder.iterdir())) < 16:
            member = tar.next()
            if member.isreg():
                (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    (manifest,) = prepare.prepare("celeba64", folder, tmp_path / "out")
    images = data.load("celeba64", tmp_path / "out").images
    for image, path in zip(images, sorted(folder.iterdir()), strict=True):
        np.testing.assert_array_equal(image.transpose(1, 2, 0), np.asarray(Image.open(path)))
    assert manifest["fingerprint"] == "f175945392fb7a53c4498f680037de8abde0e802febd97eb104803280ac96e9f"
    assert json.loads((tmp_path / "out" / "celeba64" / "manifest.json").read_text()) == manifest
