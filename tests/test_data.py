"""Prepared data sets: loading, verifying, holding out; bad input by name."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import PROJECT, classes, contents, faces

from repro import data, prepare
from repro.files import ReproError


def test_a_missing_data_set_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_DATA", str(tmp_path))
    prepare.prepare("celeba64", faces(tmp_path / "faces", 1))
    assert data.load("celeba64").manifest["count"] == 1
    for name, command in [
        ("celeba46", "prepare celeba64 --name celeba46 --source"),
        ("imagenet64", "prepare imagenet64 --source"),
        ("imagenet64-val", "prepare imagenet64 --source"),
        ("imagenet64-subset-val", "prepare imagenet64 --name imagenet64-subset --source"),
    ]:
        with pytest.raises(ReproError) as error:
            data.load(name)
        assert f"{name!r} is not prepared in {tmp_path} (there: celeba64)" in str(error.value)
        assert f"python -m repro {command}" in str(error.value) and "REPRO_DATA" in str(error.value)


def test_loaded_images_cannot_be_changed(tmp_path):
    prepare.prepare("celeba64", faces(tmp_path / "faces", 2), tmp_path)
    images = data.load("celeba64", tmp_path).images
    assert images.dtype == np.uint8 and images.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_damage_is_noticed(tmp_path):
    prepare.prepare("imagenet64", classes(tmp_path / "set"), tmp_path)
    folder = tmp_path / "imagenet64"
    assert data.verify("imagenet64", tmp_path) == data.load("imagenet64", tmp_path).manifest["fingerprint"]
    whole = contents(folder)

    def broken(name, content, call=data.load):
        (folder / name).write_bytes(content)
        with pytest.raises(ReproError) as error:
            call("imagenet64", tmp_path)
        (folder / name).write_bytes(whole[name])
        assert "Prepare it again: python -m repro prepare imagenet64" in str(error.value)
        return str(error.value)

    pixels = whole["images.u8"]
    assert "73,727 bytes, its manifest says 73,728" in broken("images.u8", pixels[:-1])
    assert "5 labels and 2 classes" in broken("labels.npy", npy(np.arange(5)))
    assert "is damaged" in broken("manifest.json", whole["manifest.json"][:50])
    assert "is damaged" in broken("manifest.json", b"{}")
    flipped = bytes([pixels[0] ^ 1]) + pixels[1:]
    assert "changed since it was prepared" in broken("images.u8", flipped, data.verify)
    assert "changed since it was prepared" in broken("labels.npy", npy(np.arange(6)), data.verify)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_loading_does_not_need_torch():
    script = "import sys, repro.data; print([m for m in ('torch', 'pydantic', 'scipy') if m in sys.modules])"
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@given(st.integers(1, 400), st.data())
def test_holdout_split(count, draw):
    fewer, more = sorted(draw.draw(st.integers(0, count - 1)) for _ in range(2))
    train, held_out = data.holdout_split(count, more)
    assert train.dtype == held_out.dtype == np.int64 and len(held_out) == more
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    assert sorted([*train, *held_out]) == list(range(count))
    assert set(data.holdout_split(count, fewer)[1]) <= set(held_out)


def test_holdout_split_recorded():
    assert data.holdout_split(10, 3)[1].tolist() == [0, 1, 4]
    assert data.holdout_split(17_469, 500)[1][:5].tolist() == [0, 51, 55, 142, 145]


@pytest.mark.parametrize(("count", "holdout"), [(10, 10), (10, -1), (0, 0)])
def test_holdout_split_out_of_range(count, holdout):
    with pytest.raises(ValueError, match=f"cannot hold out {holdout} of {count} images"):
        data.holdout_split(count, holdout)


@given(st.lists(st.integers(0, 19), max_size=30), st.integers(0, 3))
def test_rows_of_a_mapped_file_are_its_rows_and_are_asked_for_before(tmp_path_factory, rows, header):
    path = tmp_path_factory.mktemp("rows") / "rows.f16"
    numbers = np.arange(20 * 6, dtype=np.float16).reshape(20, 2, 3)
    path.write_bytes(bytes(header) + numbers.tobytes())
    mapped = np.memmap(path, np.float16, "r", offset=header, shape=(20, 2, 3))
    asked, rows = [], np.array(rows, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fadvise", lambda _, *given: asked.append(given), raising=False)
        patch.setattr(os, "POSIX_FADV_WILLNEED", "will need", raising=False)
        found = data.rows_of(mapped, rows)
        assert asked == [(header + 12 * row, 12, "will need") for row in rows]
        assert np.array_equal(found, numbers[rows]) and not isinstance(found.base, np.memmap)
        # what is no whole map of a file that is there: read all the same, and nothing is asked for
        path.unlink()
        for array in (mapped, mapped.copy(), mapped.astype(np.float32), numbers):
            assert np.array_equal(data.rows_of(array, rows), numbers[rows])
        assert len(asked) == len(rows)


def test_rows_of_a_part_of_a_map_are_those_of_the_part(tmp_path, monkeypatch):
    (tmp_path / "rows.u8").write_bytes(bytes(range(200)))
    mapped = np.memmap(tmp_path / "rows.u8", np.uint8, "r", shape=(20, 10))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: pytest.fail("asked for other rows"), raising=False)
    for part in (mapped[5:], mapped[::2], mapped[:, :5], mapped.T):
        rows = np.array([3, 0])
        assert np.array_equal(data.rows_of(part, rows), np.array(part)[rows])
