"""Activation checkpointing (Chen et al. 2016): memory for arithmetic.

A network whose attribute `recompute` is set keeps, of each of its blocks, only what enters it until the
backward pass, which computes the block again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from repro.files import ReproError


def allow(net: torch.nn.Module, recompute: bool) -> None:
    """Let `net` compute its blocks again in backward passes, or not.

    Raises `ReproError` where a network that cannot is to.
    """
    if hasattr(net, "recompute"):
        net.recompute = recompute
    elif recompute:
        raise ReproError(
            f"train.recompute: a {type(net).__name__} cannot compute its blocks again, only ViTs, UNets and "
            "noisy classifiers can; to save memory, take train.micro_batch"
        )


def block(recompute: bool, function: Callable[..., Any], *given: Any) -> Any:
    """function(*given); with `recompute`, and where there will be a backward pass, computed again there.

    `function` must give the same when it is called again: random numbers are those of the first call.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *given, use_reentrant=False)
    return function(*given)
