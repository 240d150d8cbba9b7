"""Activation checkpointing (Chen et al. 2016): memory for arithmetic.

A network whose attribute `recompute` is set keeps, of each of its blocks, only what enters it until the
backward pass, which computes the block again. Compiled, all of a network is one graph, of which torch.compile
chooses what to keep, unless it is told. So what blocks give is copied there, by an operator of our own, and a
policy says that these copies are to be kept, and nothing else within blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from repro.files import ReproError

how = functools.partial(checkpoint, use_reentrant=False)
"""how(function, *given) -> function(*given), of which only what is given is kept; not compiled."""


@contextmanager
def by(other: Callable[..., Any]) -> Iterator[None]:
    """Within a block, `other` takes the place of `how`: to count what would be computed again."""
    global how
    before, how = how, other
    try:
        yield
    finally:
        how = before


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
    if not (recompute and torch.is_grad_enabled()):
        return function(*given)
    if torch.compiler.is_compiling():
        return checkpoint(_apart, function, *given, use_reentrant=False, context_fn=_contexts)
    return how(function, *given)


def _apart(function, *given):
    """function(*given), copied by `_copy`."""
    return tree_map_only(torch.Tensor, _copy, function(*given))


def _contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx, operator, *given, **named):
    """Whether what an operator gives is kept: copies alone. By operators, since torch 2.11 loses its marks of
    what is to be computed again within our kernels' functions."""
    kept = operator is torch.ops.repro.copy.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@torch.library.custom_op("repro::copy", mutates_args=(), schema="(Tensor x) -> Tensor")
def _copy(x: torch.Tensor) -> torch.Tensor:
    """A copy that Inductor does not take away, as it does those of torch.clone, before it chooses."""
    return torch.clone(x)


@_copy.register_fake
def _(x):
    return torch.empty_like(x)


_copy.register_autograd(lambda ctx, gradient: gradient)
