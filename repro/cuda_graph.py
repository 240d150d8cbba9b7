"""Work on a GPU as one CUDA graph: launching many kernels one by one takes longer than small ones do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the graph is captured: compilation, and cuDNN's and Triton's choices."""


class Captured:
    """`work(*given) -> result` on tensors of one GPU, captured as a CUDA graph after a few calls.

    The graph reads its inputs from fixed places on the GPU, and all else that `work` uses where it lies, so
    none of that may be freed meanwhile. All calls must have inputs of the same shapes, which lie on the GPU;
    `work` may not wait for the GPU. Raises `ValueError` for inputs of other shapes.
    """

    def __init__(self, work: Callable[..., Tensor]):
        self.work, self.calls, self.side, self.graph = work, 0, None, None

    def __call__(self, *given: Tensor) -> Tensor:
        """What `work` makes of these inputs."""
        device = given[0].device
        if self.calls < WARM_UP:
            self.calls += 1
            stream = torch.cuda.current_stream(device)
            self.side = self.side or torch.cuda.Stream(device)
            self.side.wait_stream(stream)
            with torch.cuda.stream(self.side):
                result = self.work(*given)
            stream.wait_stream(self.side)
            return result
        if self.graph is None:
            self.given = tuple(tensor.clone() for tensor in given)
            self.graph = torch.cuda.CUDAGraph()
            # other threads may copy to the device, or ask for pinned memory, meanwhile
            with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                self.result = self.work(*self.given)
        for mine, tensor in zip(self.given, given, strict=True):
            if mine.shape != tensor.shape:
                raise ValueError(f"captured for inputs of {tuple(mine.shape)}, given {tuple(tensor.shape)}")
            mine.copy_(tensor)
        self.graph.replay()
        return self.result.clone()
