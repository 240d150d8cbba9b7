"""What is captured, when, and from where it reads: on a stand-in for CUDA.

On a GPU, test_train and test_sample compare captured training and sampling with the same, launched kernel by
kernel.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from repro import cuda_graph


@pytest.fixture
def calls(monkeypatch):
    """The calls of `work` before and while a graph is captured; a replay does the work again, in place."""
    seen = []

    class Graph:
        def replay(self):
            self.captured.result.copy_(self.captured.work(*self.captured.given))

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        assert stream is seen_streams[0] and capture_error_mode == "thread_local"
        seen.append("captured")
        yield

    seen_streams = []

    def stream(device):
        seen_streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return seen_streams[-1]

    @contextmanager
    def on(stream):
        yield

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None)
    )
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return seen


def captured(work):
    found = cuda_graph.Captured(work)
    graph = torch.cuda.CUDAGraph
    graph.captured = found
    return found


def test_after_warming_up_work_is_captured_once_and_reads_what_each_call_gives(calls):
    replayed = captured(lambda a, b: a + 10 * b)
    results = []
    for n in range(cuda_graph.WARM_UP + 3):
        assert (replayed.graph is None) == (n <= cuda_graph.WARM_UP)
        results.append(replayed(torch.tensor([float(n)]), torch.tensor([1.0])))
    assert calls == ["captured"]
    # each result is a tensor of its own, which later replays leave alone
    assert [float(result) for result in results] == [10.0 + n for n in range(cuda_graph.WARM_UP + 3)]


def test_what_is_given_is_not_what_the_graph_writes_to_or_reads_from_later(calls):
    replayed = captured(lambda a: 2 * a)
    given = torch.tensor([1.0])
    for _ in range(cuda_graph.WARM_UP + 1):
        result = replayed(given)
    given.fill_(5.0)
    assert float(replayed.given[0]) == 1 and float(result) == 2
    assert float(replayed(given)) == 10


def test_inputs_of_another_shape_are_refused(calls):
    replayed = captured(lambda a: a)
    for _ in range(cuda_graph.WARM_UP + 1):
        replayed(torch.zeros(3))
    with pytest.raises(ValueError, match=r"captured for inputs of \(3,\), given \(1,\)"):
        replayed(torch.zeros(1))
