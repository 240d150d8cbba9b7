"""Recorded runs: what is damaged, missing or unknown is refused by name."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from repro import config, files, runs, train
from repro.files import ReproError

NAME = "lab/tiny"
SMALL = 270_000
"""Bytes of a shard, instead of 15 MiB."""
MODEL = config.UNet(channels=32, multipliers=(1,), blocks=1, attention=(), heads=1)
RUN = config.Config(
    NAME, config.Data("drawn"), MODEL, config.Train(images=8, batch=4), sample=config.Sample(steps=2)
)


def network():
    torch.manual_seed(0)
    net = runs.build(RUN).net
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder of runs with one run of random weights in three shards."""
    root = tmp_path_factory.mktemp("recorded")
    record = runs.Record(
        config=RUN, data=runs.DataUsed("drawn", "f" * 64, 10, 10, 0), images=8, seconds=1.0, device="cpu",
        processes=1, versions={}, commit="unknown", code="0", parameters=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SHARD_BYTES", SMALL)
        train.record_run(root / NAME, record, network(), (2, 3), torch.device("cpu"))
    return root


@pytest.fixture
def root(recorded, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def load(root):
    return runs.load_run(NAME, root)


def shards(root):
    return sorted((root / NAME).glob("weights-*.safetensors"))


def test_weights_come_back_rounded_to_float16(root):
    net = network()
    loaded = load(root).weights()
    assert loaded.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded[name], tensor.half().float()), name


def test_shards_keep_to_their_size_and_carry_the_configuration(root):
    assert len(shards(root)) == 3
    for path in shards(root):
        assert path.stat().st_size <= SMALL
        with safe_open(path, "pt") as file:
            assert config.from_json(json.loads(file.metadata()["config"])) == RUN


@pytest.mark.parametrize("over", [0, 1])
def test_a_tensor_that_fills_a_file_or_more_has_one_to_itself(tmp_path, monkeypatch, over):
    """The largest that fits leaves the header its place, and no file is empty."""
    monkeypatch.setattr(runs, "SHARD_BYTES", SMALL)
    state = {"a": torch.ones(3), "b": torch.zeros((SMALL - 2**17) // 2 + over), "c": torch.ones(3)}
    names = list(runs.save_weights(tmp_path, state, RUN))
    assert [list(load_file(tmp_path / name)) for name in names] == [["a"], ["b"], ["c"]]
    assert ((tmp_path / names[1]).stat().st_size <= SMALL) or over


def test_weights_are_kept_in_another_type_and_larger_files_where_asked_for(tmp_path):
    state = {"a": torch.tensor([1 / 3]), "b": torch.zeros(9_000_000)}
    (name,) = runs.save_weights(tmp_path, state, RUN, dtype=torch.float32, limit=2**30)
    assert torch.equal(load_file(tmp_path / name)["a"], state["a"])
    with pytest.raises(ReproError, match="the tensor a is not finite in float16"):
        runs.save_weights(tmp_path, {"a": torch.tensor([1e6])}, RUN)


def test_fewer_shards_replace_more(root):
    hashes = runs.save_weights(root / NAME, load(root).weights(), RUN)
    assert [path.name for path in shards(root)] == list(hashes) == ["weights-00001-of-00001.safetensors"]


@pytest.mark.parametrize("place", [9, 1000, -1])  # in the header, in the weights, the last byte
def test_one_flipped_bit_is_caught(root, place):
    path = shards(root)[1]
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ReproError, match=f"{path.name} is damaged: its SHA-256 is"):
        load(root).denoiser()


def test_a_missing_or_cut_shard_is_named(root):
    path = shards(root)[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ReproError, match=f"{path.name} is damaged"):
        load(root).weights()
    path.unlink()
    with pytest.raises(
        ReproError, match=f"{path.name} is missing: {NAME} needs all of weights-00001-of-00003"
    ):
        load(root).weights()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(colour="red"), "colour: "),
        (lambda r: r["config"]["train"].update(lrr=1), "config.train.lrr: "),
        (lambda r: r.update(images="many"), "images: "),
        (lambda r: r.pop("seconds"), "seconds: "),
    ],
)
def test_what_is_wrong_in_run_json_is_named(root, change, message):
    path = root / NAME / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ReproError, match=f"run.json does not fit this version of the package: {message}"):
        load(root)


@pytest.mark.parametrize("content", [b"{", b'{"images": "\xff"}', b""])
def test_a_run_json_that_is_no_json_is_named(root, content):
    (root / NAME / "run.json").write_bytes(content)
    with pytest.raises(ReproError, match="run.json is not JSON"):
        load(root)


def test_an_unknown_run_names_the_near_ones_and_the_command(root):
    with pytest.raises(
        ReproError, match="(?s)no recorded run lab/tyni .*Near names: lab/tiny.*repro train lab/tyni"
    ):
        runs.load_run("lab/tyni", root)


def test_a_run_is_found_by_its_folder(root):
    assert runs.load_run(root / NAME).record == load(root).record


def test_samples_are_those_of_the_weights_and_seeds_in_order(root):
    run = load(root)
    images = run.samples()
    assert images.shape == (6, 64, 64, 3)
    np.testing.assert_array_equal(run.draw(range(6)), images)
    np.testing.assert_array_equal(run.draw([4]), images[[4]])
    assert run.check_samples(2) == {
        "seeds": [0, 3], "largest_mean_difference": 0.0, "tolerance": runs.SAMPLE_TOLERANCE,
    }  # fmt: skip


@pytest.mark.parametrize("count", [-1, 0, 7])
def test_samples_that_there_are_not_cannot_be_checked(root, count):
    with pytest.raises(ReproError, match=f"{count} of the recorded samples cannot be checked: there are 6"):
        load(root).check_samples(count)


def test_the_picture_is_the_images_row_by_row(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
    runs.save_samples(tmp_path, images, 2, 3)
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    assert picture.shape == (8, 15, 3)
    for i, image in enumerate(images):
        row, col = divmod(i, 3)
        np.testing.assert_array_equal(picture[4 * row : 4 * row + 4, 5 * col : 5 * col + 5], image)
    with pytest.raises(ValueError, match="6 images do not fill 3 rows of 3"):
        runs.save_samples(tmp_path, images, 3, 3)


def test_samples_of_other_weights_are_refused(root):
    state = {name: -tensor for name, tensor in load(root).weights().items()}
    record = dataclasses.replace(load(root).record, weights=runs.save_weights(root / NAME, state, RUN))
    runs.write_record(root / NAME, record)
    with pytest.raises(
        ReproError, match="samples recorded for lab/tiny are not what its weights draw: with seed"
    ):
        load(root).check_samples(1)


def test_a_picture_that_was_not_recorded_is_refused(root):
    path = root / NAME / "samples.png"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ReproError, match="samples.png is missing or not the file that was recorded"):
        load(root).samples()


def test_a_run_without_weights_says_so(root):
    runs.write_record(root / NAME, dataclasses.replace(load(root).record, weights={}))
    with pytest.raises(ReproError, match="recorded without weights"):
        load(root).denoiser()


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ReproError, match="the tensor w is not finite in float16"):
        runs.save_weights(tmp_path, {"w": torch.tensor([1e6])}, RUN)


def test_distances_are_those_of_one_sampler_and_network_by_images_seen(root):
    line = {"name": "FD (EfficientNet-Lite0)", "features": "efficientnet_lite0", "samples": 10,
            "sample": config.sample_json(RUN.sample), "first_seed": RUN.evaluate.first_seed,
            "precision": RUN.train.precision}  # fmt: skip
    other = {**line, "sample": {**line["sample"], "steps": 30}}
    inception = {**line, "name": "FID (clean)", "features": "inception"}
    neighbours = {**line, "name": "nearest training image"}
    lines = [
        {**line, "images": 8, "value": 1},
        {**line, "images": 4, "value": 2},
        {**line, "images": 8, "value": 3},
    ]
    lines += [
        {**some, "images": 8, "value": 9} for some in (other, inception, neighbours, {**line, "samples": 5})
    ]
    for change in ({"first_seed": 5}, {"precision": "fp32"}):  # as by `evaluate` with options
        lines.append({**line, "images": 8, "value": 9} | change)
    for one in lines:
        files.append_line(root / NAME / "metrics.jsonl", one)
    assert [(m["images"], m["value"]) for m in load(root).distances(RUN.sample, 10)] == [(4, 2), (8, 3)]
    assert load(root).curve(dataclasses.replace(RUN.sample, steps=RUN.sample.steps + 1)) == ([], [])


def test_a_distance_of_another_protocol_is_in_no_selection(root):
    """Of a run that is measured on Inception too: else all is the same."""
    run = dataclasses.replace(RUN, evaluate=config.Evaluate(samples=10, features="inception"))
    record = dataclasses.replace(load(root).record, config=run, images=8)
    runs.write_record(root / NAME, record)
    line = {"name": "FID (clean)", "features": "inception", "protocol": "clean", "samples": 10, "images": 8,
            "value": 1.0, "sample": config.sample_json(RUN.sample), "precision": RUN.train.precision,
            "first_seed": run.evaluate.first_seed}  # fmt: skip
    edm = {**line, "name": "FID (edm)", "features": "inception_legacy", "protocol": "edm", "value": 9.0}
    files.append_line(root / NAME / "metrics.jsonl", line)
    early, other = edm | {"images": 4}, edm | {"name": "FID (edm, other.npz)"}
    for one in (edm, edm | {"first_seed": 7, "value": 8.0}, early, other):
        files.append_line(root / NAME / "metrics.jsonl", one)
    found = load(root)
    assert found.distances(RUN.sample) == [line] and found.curve(RUN.sample) == ([8], [1.0])
    assert found.blocks(RUN.sample) == [1.0] and [m for _, m in found.at_the_end()] == [line]
    assert found.of_the_same_samples(line) == [line]
    assert found.distances(RUN.sample, protocol="edm") == [early, edm]  # but of other statistics
    assert found.blocks(RUN.sample, protocol="edm") == [8.0, 9.0]
    with pytest.raises(ReproError, match="unknown protocol 'adm'; known are lab, clean, edm"):
        found.distances(RUN.sample, protocol="adm")


def test_rows_of_images_go_with_the_weights_that_drew_them(root):
    how = dataclasses.replace(RUN.sample, steps=3)
    record = train.record_further_samples(root / NAME, load(root).record, range(2), torch.device("cpu"), how)
    (row,) = record.further_samples
    assert (root / NAME / row.file).exists()
    record = train.record_weights(root / NAME, record, network())
    assert record == load(root).record and record.further_samples == ()
    assert not (root / NAME / row.file).exists()


def test_the_name_of_a_row_says_what_is_not_default():
    """So that options which come later leave it as it is: of {"steps": 3}, and of no change."""
    for how, changed in ((config.Sample(steps=3), b'{"steps": 3}'), (config.Sample(), b"{}")):
        expected = f"samples-{hashlib.sha256(changed).hexdigest()[:8]}.png"
        assert runs.further_samples_file(how) == expected


def test_each_way_of_drawing_is_found_once_at_the_end(root):
    own = RUN.evaluate
    line = {"name": "FD (EfficientNet-Lite0)", "features": own.features, "samples": 10, "images": 8,
            "first_seed": own.first_seed, "precision": RUN.train.precision,
            "sample": config.sample_json(RUN.sample)}  # fmt: skip
    other = dataclasses.replace(RUN.sample, steps=30)
    later = {**line, "sample": config.sample_json(other)}
    old = {
        key: value for key, value in line["sample"].items() if key != "low_noise"
    }  # of before there was one
    for one in (
        {**later, "value": 1}, {**line, "value": 2, "sample": old}, {**line, "value": 3},
        {**line, "value": 9, "images": 4}, {**line, "value": 9, "samples": 5},
        {**line, "value": 9, "first_seed": 5}, {**line, "value": 9, "ema_halflife_images": 2.0},
        {**line, "value": 9, "name": "nearest training image"},
        {**line, "value": 9, "images": 4, "sample": {**line["sample"], "steps": 40}},
    ):  # fmt: skip
        files.append_line(root / NAME / "metrics.jsonl", one)
    found = load(root).at_the_end(10)
    assert [(how, m["value"]) for how, m in found] == [(other, 1), (RUN.sample, 3)]
    assert [m["value"] for _, m in load(root).at_the_end(5)] == [9]


def test_blocks_are_of_disjoint_seeds_at_the_end(root):
    own = RUN.evaluate
    line = {"name": "FD (EfficientNet-Lite0)", "features": own.features, "samples": own.samples, "images": 0,
            "sample": config.sample_json(RUN.sample), "first_seed": 2 * own.first_seed,
            "precision": RUN.train.precision, "value": 9.0}  # fmt: skip
    line["images"] = load(root).record.images
    taken = [line | {"value": 1.0}, line | {"value": 2.0, "first_seed": own.first_seed + own.samples}]
    others = [
        {"first_seed": own.first_seed},
        {"first_seed": own.first_seed + own.samples - 1},  # shares seeds with the run's own
        {"samples": own.samples + 1},
        {"images": line["images"] - 1},
        {"ema_halflife_images": 7.0},
        {"name": "nearest training image"},
        {"sample": line["sample"] | {"steps": 99}},
        {"precision": "other"},
        {"first_seed": 2 * own.first_seed + own.samples - 1},  # shares seeds with the first block
    ]
    twice = line | {"value": 5.0}  # the first block again
    for one in (taken[0], *(line | change for change in others), taken[1], twice):
        files.append_line(root / NAME / "metrics.jsonl", one)
    assert load(root).blocks(RUN.sample) == [9.0, 2.0, 5.0]  # the run's own is 9
    assert load(root).blocks(RUN.sample, own.samples + 1) == [9.0]


def test_the_last_standard_error_of_the_end_is_taken(root):
    own = RUN.evaluate
    line = {"name": "standard error of FD (EfficientNet-Lite0)", "features": own.features, "value": 1.0,
            "sample": config.sample_json(RUN.sample), "first_seed": 7, "samples": own.samples,
            "precision": RUN.train.precision, "images": load(root).record.images}  # fmt: skip
    assert load(root).standard_errors(RUN.sample) is None
    changes = (
        {"value": 2.0}, {"images": 1}, {"name": "FD"}, {"samples": 3}, {"ema_halflife_images": 7.0},
        {"sample": line["sample"] | {"steps": 99}},
    )  # fmt: skip
    for change in ({}, *changes):
        files.append_line(root / NAME / "metrics.jsonl", line | change)
    assert load(root).standard_errors(RUN.sample)["value"] == 2
    assert load(root).standard_errors(RUN.sample, 3)["samples"] == 3
    assert load(root).distances(RUN.sample, 3) == []


def test_lines_of_the_same_samples(root):
    line = {
        "name": "FD (EfficientNet-Lite0)", "features": "efficientnet_lite0", "precision": "bf16", "images": 8,
        "sample": config.sample_json(RUN.sample), "samples": 10, "first_seed": 5, "value": 1.0,
    }  # fmt: skip
    older = {**line, "name": "nearest training image", "sample": {"sampler": "heun", "steps": 2}}
    fewer = {**line, "name": "precision (EfficientNet-Lite0, k = 3)", "samples": 4}
    others = [
        {**line, **change}
        for change in (
            {"first_seed": 6}, {"images": 4}, {"features": "inception"}, {"precision": "fp32"},
            {"ema_halflife_images": 7.0}, {"sample": {**line["sample"], "guidance": 1.5}},
            {"classifier": {"run": "lab/c", "weights": {}}},
        )
    ]  # fmt: skip
    loss = {"name": "loss on training images", "images": 8, "value": 1.0}
    for one in (older, *others, line, loss, fewer):
        files.append_line(root / NAME / "metrics.jsonl", one)
    assert load(root).of_the_same_samples(line) == [fewer, older, line]
    assert load(root).of_the_same_samples(others[0]) == [others[0]]


def test_a_record_may_name_its_classes(root):
    record = load(root).record
    assert record.data.classes == ()  # as in older records, which do not have the key
    values = json.loads((root / NAME / "run.json").read_text())
    del values["data"]["classes"]
    (root / NAME / "run.json").write_text(json.dumps(values))
    assert load(root).record == record
    named = dataclasses.replace(record, data=dataclasses.replace(record.data, classes=("n1", "n2")))
    runs.write_record(root / NAME, named)
    assert load(root).record.data.classes == ("n1", "n2")


def test_each_part_of_a_training_counts_its_own_gpus():
    lines = [{"images": 10 * n, "training_seconds": 7.0 * n} for n in range(1, 5)] + [{"images": 10}]
    assert runs.gpu_seconds([(0, 2)], 30.0, lines) == 60.0
    parts = [(0, 2), (20, 4), (30, 1)]  # which end after 14, 21 and 30 seconds
    assert runs.gpu_seconds(parts, 30.0, lines) == 2 * 14 + 4 * 7 + 1 * 9
    assert runs.gpu_seconds(parts, 30.0, lines, since=16.0) == 4 * 5 + 1 * 9
    vit = runs.load_run("lab/imagenet64-vit")  # on two GPUs, and in the end on four
    assert vit.record.processes == 4 and vit.gpu_seconds == pytest.approx(2 * 1406.7 + 4 * (1833.9 - 1406.7))
    # where nothing was measured at the end of a part, it ends with the last measurement before
    assert runs.gpu_seconds([(0, 2), (25, 4)], 30.0, lines) == 2 * 14 + 4 * 16


def test_the_committed_weights_take_less_than_240_megabytes_together():
    """What a clone downloads; weights that git ignores, of imported checkpoints, do not count."""
    folders = [runs.RECORDED / name for name in runs.names() if not runs.load_run(name).record.imported]
    assert sum(path.stat().st_size for folder in folders for path in folder.glob("weights*")) < 240e6


def test_the_committed_runs_are_whole():
    assert runs.names(), "no run is recorded"
    for name in runs.names():
        run = runs.load_run(name)
        assert run.record.config.name == name
        if run.record.imported:  # whose weights are not kept in git
            continue
        if not run.record.weights:  # only what was measured and drawn is kept, and the note says so
            assert "weights" in run.config.note and run.metrics
            continue
        tensors = run.weights()
        tensors.pop("scale", None)  # of an autoencoder's latents: no parameter
        assert sum(tensor.numel() for tensor in tensors.values()) == run.record.parameters
        if run.config.model.kind == "autoencoder":  # draws nothing
            measured = [m["name"] for m in run.metrics if m["images"] == run.record.images]
            assert "reconstruction error" in measured
        elif run.config.model.kind == "classifier":
            assert run.metrics[-1]["name"] == "accuracy by noise level"
            assert run.metrics[-1]["images"] == run.record.images
        else:
            assert len(run.samples()) == run.record.samples.rows * run.record.samples.cols
            assert any(m["images"] == run.record.images for m in run.distances(run.sample))
        for path in run.path.glob("weights-*"):
            assert path.stat().st_size <= 15 * 2**20


def test_runs_that_differ_in_more_than_is_compared_are_named(root):
    run = load(root)
    free = ["parameterization", "weight", "train.seed"]

    def other(images=run.record.images, fingerprint=run.record.data.fingerprint, **changes):
        used = dataclasses.replace(run.record.data, fingerprint=fingerprint)
        changed = dataclasses.replace(run.config, name="test/other", note="another", **changes)
        return runs.Run(
            "test/other",
            run.path,
            dataclasses.replace(run.record, config=changed, data=used, images=images),
        )

    seeded = dataclasses.replace(run.config.train, seed=run.config.train.seed + 1)
    gamma = dataclasses.replace(run.config.weight, gamma=3.0)
    runs.check_comparable([run, other(), other(train=seeded, weight=gamma, parameterization="v")], free)
    executed = dataclasses.replace(run.config.train, micro_batch=1, cudnn_plans=3, compile=False)
    runs.check_comparable([run, other(train=executed)], free)
    faster = dataclasses.replace(run.config.train, lr=2 * run.config.train.lr)
    for apart, message in (
        (other(train=faster), "train.lr"),
        (other(fingerprint="0" * 64), "the data's pixels"),
        (other(images=1), "images seen"),
    ):
        with pytest.raises(ReproError, match=f"test/other and .* cannot be compared: .*{message}"):
            runs.check_comparable([run, apart], free)
