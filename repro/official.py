"""Released files of others: checkpoints as recorded runs (`python -m repro import NAME`), FID references.

The files' tensors are renamed to ours, and nothing else: they are recorded in float32 as they are, so that
what a network computes is what its authors' does. What each file holds is known by name and shape; anything
else is refused. Files are read as safetensors, or with `torch.load(weights_only=True)`: no code of theirs
runs.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from repro import config, evaluate, files, presets, provenance, runs
from repro.files import ReproError
from repro.models.unet import heads_for

RELEASED = provenance.ROOT / "paper" / "released.json"
"""Address, size and SHA-256 of each file as it was first seen (none is published); later ones must be the
same."""

MIN_SNR = "https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/releases/download/v0.0.0/"
SD_VAE = (
    "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
    "diffusion_pytorch_model.safetensors"
)
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


@dataclass(frozen=True)
class Checkpoint:
    """A released file, and the run that it becomes."""

    url: str
    config: config.Config
    rename: Callable[[str], str]
    """What a tensor of our network is called in the file."""
    heads_within: bool = False
    """Whether attention layers of the file's UNet order their outputs by q, k and v first, then by heads."""
    published: dict[str, str | int] = field(default_factory=dict)
    """Size in bytes and SHA-256, where they are published."""
    constants: dict[str, float] = field(default_factory=dict)
    """Numbers that our network has beside the file's tensors."""

    @property
    def file(self) -> str:
        """The file's name; where many are called the same, that of what it is of."""
        name = name_in(self.url)
        return (
            name if name != "diffusion_pytorch_model.safetensors" else self.url.split("/")[4] + ".safetensors"
        )


def same_name(name: str) -> str:
    """The ViT of the Min-SNR authors has the names of ours."""
    return name


def adm_name(name: str) -> str:
    """What guided-diffusion calls a tensor of `models.unet.ADMUNet` or `models.unet.NoisyClassifier`.

    There the first convolution counts as a block of the way down.
    """
    for ours, theirs in (
        (r"^time_in\.", "time_embed.0."),
        (r"^time_out\.", "time_embed.2."),
        (r"^label_table\.", "label_emb."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^pool\.position$", "out.2.positional_embedding"),
        (r"^pool\.qkv\.", "out.2.qkv_proj."),
        (r"^pool\.proj\.", "out.2.c_proj."),
    ):
        if re.search(ours, name):
            return re.sub(ours, theirs, name)
    match = re.fullmatch(r"(encoder|middle|decoder)\.(.+)", name)
    if not match:
        raise ReproError(f"{name} is no tensor of ADM's networks")
    part, rest = match.groups()
    if part == "encoder":
        number, rest = rest.split(".", 1)
        rest = f"{int(number) + 1}.{rest}"
    block = {"encoder": "input_blocks", "middle": "middle_block", "decoder": "output_blocks"}[part]
    for ours, theirs in (
        (".norm_in.", ".in_layers.0."),
        (".conv_in.", ".in_layers.2."),
        (".emb.", ".emb_layers.1."),
        (".norm_out.", ".out_layers.0."),
        (".conv_out.", ".out_layers.3."),
        (".skip.", ".skip_connection."),
        (".proj.", ".proj_out."),
        (".conv.", ".op." if part == "encoder" else ".conv."),
    ):
        rest = rest.replace(ours, theirs)
    return f"{block}.{rest}"


def autoencoder_name(name: str) -> str:
    """What Stable Diffusion's autoencoder calls a tensor of `models.autoencoder.KLAutoencoder`.

    diffusers' names, with those that its attention had when the file was written.
    """
    name = name.removeprefix("kl.")
    if ".attentions." in name:
        for ours, theirs in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _released(preset: str, name: str, note: str, **changes: object) -> config.Config:
    run = replace(presets.preset(preset), name=f"paper/{name}", note=note, **changes)
    return replace(run, train=replace(run.train, precision="fp32"))  # what it is measured in, as the file is


_unet = presets.preset("paper/imagenet64-unet")
CHECKPOINTS = {
    "minsnr-vit-l-imagenet64": Checkpoint(
        MIN_SNR + "ema_0.9999_large.pt",
        _released(
            "paper/imagenet64-vit",
            "minsnr-vit-l-imagenet64",
            "The Min-SNR authors' released ViT-L of Figure 10 (release v0.0.0 of their repository), by 20 "
            "steps of Heun under guidance 1.5. Options of training are not theirs; how many images it saw is "
            "not published.",
        ),
        same_name,
    ),
    "minsnr-vit-xl-imagenet256": Checkpoint(
        MIN_SNR + "ema_0.9999_xl.pt",
        _released(
            "paper/imagenet256-vit",
            "minsnr-vit-xl-imagenet256",
            "The Min-SNR authors' released ViT-XL of Figure 12 (release v0.0.0 of their repository), by 50 "
            "steps of Heun under guidance 1.5. Options of training are not theirs; how many images it saw is "
            "not published.",
        ),
        same_name,
    ),
    "sd-vae-ft-mse": Checkpoint(
        SD_VAE,
        config.Config(
            name="paper/sd-vae-ft-mse",
            data=config.Data("imagenet256", resolution=256, classes=1000),
            model=config.Autoencoder(),
            train=config.Train(images=1),
            evaluate=config.Evaluate(samples=50_000, features="inception"),
            note="Stable Diffusion's autoencoder with the decoder that was trained on for squared error "
            "(stabilityai/sd-vae-ft-mse, MIT licence). Its model card says on which images: not ImageNet. "
            "Options of training and data are not theirs.",
        ),
        autoencoder_name,
        published={
            "bytes": 334_643_276,
            "sha256": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        },
        constants={"scale": 0.18215},
    ),
    "adm-imagenet64-unet": Checkpoint(
        ADM + "64x64_diffusion.pt",
        _released(
            "paper/imagenet64-unet",
            "adm-imagenet64-unet",
            "ADM's released network for ImageNet 64 x 64 (Dhariwal and Nichol 2021), without the half of its "
            "output that predicts a variance: sampled with the smaller of the fixed ones, not the learned "
            "one that ADM takes. Options of training are not theirs.",
            model=replace(_unet.model, null_class=False),
            train=replace(_unet.train, label_drop=0.0),
            weight=config.Weight("constant"),
            sample=config.Sample(
                "ancestral",
                eta=1.0,
                steps=250,
                grid="uniform",
                clip=True,
                classifier="paper/adm-imagenet64-classifier",
                classifier_scale=1.0,
            ),
        ),
        adm_name,
        heads_within=True,
    ),
    "adm-imagenet64-classifier": Checkpoint(
        ADM + "64x64_classifier.pt",
        _released(
            "paper/imagenet64-classifier",
            "adm-imagenet64-classifier",
            "ADM's released noisy classifier for ImageNet 64 x 64 (Dhariwal and Nichol 2021). Options of "
            "training are not theirs.",
        ),
        adm_name,
    ),
}
"""By name: the files that Figures 1, 10, 11 and 12 need. A run of each is `paper/<name>`."""


def checkpoint(name: str) -> Checkpoint:
    """The released checkpoint of that name; raises `ReproError` with the known ones for any other."""
    if name not in CHECKPOINTS:
        near = difflib.get_close_matches(name, CHECKPOINTS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ReproError(
            f"there is no released checkpoint {name!r}. {hint}Known are {', '.join(CHECKPOINTS)}"
        )
    return CHECKPOINTS[name]


def import_checkpoint(name: str, file: str | Path | None = None) -> Path:
    """Make a recorded run of a released checkpoint; returns its folder.

    file: the released file; by default it is downloaded, once. Nothing is written where it is not the file
    that it should be. Of a run that is there without its weights (git keeps none) they are restored.

    Raises `ReproError` for an unknown name, a run that is there already, and a file that
    is missing, damaged, of other content than before, or that holds other tensors, or more than tensors.
    """
    known = checkpoint(name)
    out = runs.root_folder() / known.config.name
    there = runs.load_run(out) if (out / "run.json").exists() else None
    if there and all((out / weights).exists() for weights in there.record.weights):
        raise ReproError(f"{out} is there already; remove the folder to import {name} anew")
    path = download(known.url, known.file, "--file", known.published) if file is None else Path(file)
    if not path.is_file():
        raise ReproError(f"there is no file {path}; leave out --file to download {known.url}")
    seen = checked(path, known.url, known.file, known.published, (there and there.record.imported) or {})
    with torch.device("meta"):
        state = runs.network(known.config).state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items() if key not in known.constants}
    try:
        state = translated(read_tensors(path, known.file.endswith(".safetensors")), wanted, known, path)
    except ReproError:
        if file is None:
            path.unlink()  # or it would be taken from the cache again
        raise
    parameters = sum(tensor.numel() for tensor in state.values())
    state |= {name: torch.tensor(value) for name, value in known.constants.items()}
    with files.lock(out):
        files.remove_partial(out)
        hashes = runs.save_weights(out, state, known.config, dtype=torch.float32, limit=LARGEST)
        remember(known.file, seen)
        if there and there.record.weights == hashes:  # a clone of a record: samples and metrics stay
            return out
        record = runs.Record(
            config=known.config,
            data=runs.DataUsed(known.config.data.name, "unknown", 0, 0, 0),
            images=0,
            seconds=0.0,
            device="unknown",
            processes=0,
            versions={},
            commit="unknown",
            code=provenance.code_version("import repro.official"),
            parameters=parameters,
            weights=hashes,
            imported=seen,
        )
        runs.write_record(out, record)
    return out


REFERENCES = {
    "imagenet64": ADM + "ref_batches/imagenet/64/VIRTUAL_imagenet64_labeled.npz",
    "imagenet256": ADM + "ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
}
"""By data set: ADM's reference batches (evaluations/README.md of openai/guided-diffusion), with `mu` and
`sigma` of Inception's features over the whole data set, and 10,000 images."""


def fid_reference(dataset: str, file: str | Path | None = None) -> evaluate.ReferenceFile:
    """What an FID by protocol edm of a network of that data set is measured against.

    file: statistics to take instead of ADM's, by whose name a distance to them is called, or ADM's file where
    it is here already; by default ADM's is downloaded, once, while other processes wait. A file called as
    ADM's is must be the one that was first downloaded (`RELEASED`), where one was.

    Raises `ReproError` for a data set that ADM has no reference of, where no file is given, and for a file
    that is missing, ADM's of another data set, another than before, or no such statistics (see
    `evaluate.read_reference`).
    """
    import pooch

    if file is None and dataset not in REFERENCES:
        raise ReproError(
            f"protocol edm measures against ADM's references, of {' and '.join(REFERENCES)}; there is none "
            f"of {dataset}. Give statistics of other images with --reference FILE (an .npz of mu and sigma)."
        )
    if file is None:
        url, name = REFERENCES[dataset], name_in(REFERENCES[dataset])
        with files.lock(pooch.os_cache("repro"), wait=True):
            path = download(url, name, "--reference")
            try:
                seen = checked(path, url, name)
                found = evaluate.read_reference(path, seen["sha256"])
            except ReproError:
                path.unlink(missing_ok=True)  # or it would be taken from the cache again
                raise
        remember(name, seen)
        return found
    path = Path(file)
    if not path.is_file():
        raise ReproError(f"--reference: there is no file {path}")
    of = {name_in(url): known for known, url in REFERENCES.items()}.get(path.name)
    if of is None:
        found = evaluate.read_reference(path, files.sha256(path))
        return replace(found, title=f"FID (edm, {path.name})")
    if of != dataset:
        right = "statistics of its own images, under a name of their own"
        if dataset in REFERENCES:
            right = name_in(REFERENCES[dataset])
        raise ReproError(f"{path} is ADM's reference of {of}, and the run is of {dataset}: give {right}")
    return evaluate.read_reference(path, checked(path, REFERENCES[of], path.name)["sha256"])


def name_in(url: str) -> str:
    """The name of the file at an address."""
    return url.rsplit("/", 1)[1]


def first_seen() -> dict[str, dict]:
    """What `RELEASED` holds; nothing where it is not there yet."""
    return files.read_json(RELEASED) if RELEASED.exists() else {}


def remember(name: str, seen: dict) -> None:
    """Add a file, as `checked` gives it, to `RELEASED`."""
    if first_seen().get(name) != seen:
        with files.lock(RELEASED.parent, wait=True):
            files.write_json(RELEASED, first_seen() | {name: seen})


def checked(path: Path, url: str, name: str, *known: dict) -> dict:
    """Address, size and SHA-256 of the released file `name`, which lies at `path`.

    Raises `ReproError` where size or hash are not those of `RELEASED`, or of each of `known`, which may lack
    some.
    """
    seen = {"url": url, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
    for before in (seen | each | {"url": url} for each in (*known, first_seen().get(name, {}))):
        if before != seen:
            raise ReproError(
                f"{path} is not the {name} that is known: {seen['bytes']:,} bytes of "
                f"SHA-256 {seen['sha256'][:16]}…, not {before['bytes']:,} of {before['sha256'][:16]}…. "
                f"Download it again{_or_forget(name)}."
            )
    return seen


def _or_forget(name: str) -> str:
    """What else can be done about a file that is not the one that is known, where `RELEASED` knows it."""
    return f", or, if you trust this file, remove its entry from {RELEASED}" if name in first_seen() else ""


LARGEST = 2**30
"""Bytes of a file of imported weights, which are not kept in git."""


def download(url: str, name: str, option: str, published: dict | None = None) -> Path:
    """The released file `name`, from the user's cache or its address.

    option: of the command line, that takes the file instead. published: its SHA-256, where it is known.
    Raises `ReproError` where it cannot be had, or is not the one that is known.
    """
    import pooch

    sha256 = (first_seen().get(name, {}) | (published or {})).get("sha256")
    try:
        return Path(
            pooch.retrieve(url, sha256 and f"sha256:{sha256}", fname=name, path=pooch.os_cache("repro"))
        )
    except Exception as error:  # pooch passes on whatever requests and urllib raise
        if isinstance(error, ValueError) and sha256 and sha256 in str(error):  # pooch's, of another hash
            raise ReproError(
                f"{url} gave another file than the {name} that is known, of SHA-256 {sha256[:16]}…. "
                f"Download it again{_or_forget(name)}."
            ) from error
        raise ReproError(
            f"{name} could not be downloaded ({type(error).__name__}). Fetch {url} on a machine "
            f"with internet access and give the file with {option}."
        ) from error


def read_tensors(path: Path, as_safetensors: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote of a state dict, or one of safetensors, by name.

    Raises `ReproError` where it cannot be read, or holds anything else.
    """
    again = "Download it again."
    if as_safetensors:
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # as below
            raise ReproError(
                f"{path} is no whole file of safetensors ({type(error).__name__}). {again}"
            ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ReproError(
            f"{path} is refused: it is damaged, or holds more than tensors, which could run code. {again}"
        ) from error
    except Exception as error:  # torch raises whatever a damaged file leads it to
        raise ReproError(
            f"{path} is no whole file of torch.save ({type(error).__name__}). {again}"
        ) from error
    plain = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not plain:
        raise ReproError(f"{path} holds no plain state dict of tensors. {again}")
    return state


def translated(
    state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], known: Checkpoint, path: Path
) -> dict[str, Tensor]:
    """The file's tensors by our names, in float32, of the shapes that are wanted.

    Only the first rows are taken of a longer table of timesteps, and of an output that predicts a variance
    too; products with one pixel become products. Raises `ReproError` for tensors that are missing, too many,
    of another shape, or not finite.
    """
    theirs = {name: known.rename(name) for name in wanted}
    missing = [name for name in theirs.values() if name not in state]
    more = sorted(set(state) - set(theirs.values()))
    if missing or more:
        told = [f"{len(names)} {what} ({names[0]}, ...)" for what, names in
                (("missing", missing), ("unknown", more)) if names]  # fmt: skip
        raise ReproError(f"{path} is another network's: of its tensors {' and '.join(told)}")
    found = {}
    for name, shape in wanted.items():
        tensor = state[theirs[name]].float()
        if tensor.ndim == len(shape) + 1 and tensor.shape[-1] == 1:
            tensor = tensor[..., 0]
        longer = {"time_embedding.weight": 4000, "conv_out.weight": 6, "conv_out.bias": 6}.get(name)
        if len(tensor) == longer:  # the released tables, and a variance for each of 3 channels
            tensor = tensor[: shape[0]]
        if tuple(tensor.shape) != shape:
            raise ReproError(
                f"{path} is another network's: {theirs[name]} is of shape "
                f"{tuple(state[theirs[name]].shape)}, not {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise ReproError(f"{path}: the tensor {theirs[name]} is not finite. Download it again.")
        if known.heads_within and ".qkv." in name:
            heads = heads_for(known.config.model, shape[0] // 3)
            tensor = tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        found[name] = tensor.contiguous()
    return found
