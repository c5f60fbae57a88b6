"""Captures one iteration as CUDA graphs, with functions in between that run in each replay."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_recording: Recording | None = None  # that is being made


class Recording:
    """One iteration: graphs to replay and functions to call, in their order."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any):
        self.stream, self.pool = stream, pool
        self.parts: list[Callable[[], Any]] = []
        self.static_inputs: dict[str, torch.Tensor] = {}  # attributes
        self.results: dict[str, Any] = {}  # attributes that the iteration sets
        self.gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Context manager: kernels are captured, not run."""
        global _recording
        torch.cuda.synchronize()
        gc.collect()  # for the memory, and nothing on the GPU may end in between
        torch.cuda.empty_cache()
        _recording = self
        try:
            with torch.cuda.stream(self.stream):
                self._begin()
                try:
                    yield
                    self._end()
                except BaseException:
                    self._abandon()
                    raise
        finally:
            _recording = None

    def call(self, function: Callable[[], Any]) -> None:
        """Interrupt the capture: each replay calls a function here."""
        self._end()
        self.parts.append(function)
        self._begin()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile, such as loading, is no part of it
        self._graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        with warnings.catch_warnings():  # there may be nothing between two functions
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self._graph.capture_end()
        self.parts.append(self._graph.replay)

    def _abandon(self) -> None:
        try:
            self._end()
        except RuntimeError:
            # A capture that has failed leaves PyTorch 2.11 in it: memory can't be given back, and
            # random numbers can't be drawn until another one ends well.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            self.pool = torch.cuda.graph_pool_handle()
            self._begin()
            self._end()


def in_each_iteration(function: Callable[..., Any], *args: Any) -> None:
    """Call a function whose Python has to run each time, also where an iteration is replayed."""
    if _recording is None:
        function(*args)
    else:
        _recording.call(functools.partial(function, *args))


@contextlib.contextmanager
def capturable(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Context manager: steps may be recorded; a fused Adam computes the same with that flag."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value
