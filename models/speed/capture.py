"""Captures one iteration as CUDA graphs, with functions between them that each replay calls."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_recording: Recording | None = None  # the one in progress


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Context manager: no garbage collection, which may free a CUDA graph.

    That would end a capture in the same thread with an error.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Recording:
    """One iteration: graphs to replay and functions to call, in order."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any):
        self.stream, self.pool = stream, pool
        self.parts: list[Callable[[], Any]] = []
        self.static_inputs: dict[str, torch.Tensor] = {}  # by attribute
        self.results: dict[str, Any] = {}  # attributes that the iteration sets
        self.gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Context manager: kernels are captured, not run."""
        global _recording
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        _recording = self
        try:
            with no_garbage_collection(), torch.cuda.stream(self.stream):
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
        """Interrupt the capture: each replay calls a function at this point."""
        self._end()
        self.parts.append(function)
        self._begin()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # other threads, such as those that load data, may use the GPU meanwhile
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
            # After a failed capture PyTorch 2.11 stays in capture mode: memory can't be freed, and
            # random numbers can't be drawn, until another capture succeeds.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            self.pool = torch.cuda.graph_pool_handle()
            self._begin()
            self._end()


def in_each_iteration(function: Callable[..., Any], *args: Any) -> None:
    """Call a function whose Python code has to run each time, even if an iteration is replayed."""
    if _recording is None:
        function(*args)
    else:
        _recording.call(functools.partial(function, *args))


@contextlib.contextmanager
def capturable(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Context manager: steps can be captured; a fused Adam computes the same with this flag."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value
