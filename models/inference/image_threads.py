"""Batches of images on a CPU: each thread computes images of its own.

That is faster than all threads sharing each operator: they need not wait for each other a hundred
times per image, and a single thread can use NNPACK.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import math
import os
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from models.networks import ResnetGenerator
from models.speed.inspection import has_hooks, has_known_layers, independent_of_batch
from models.speed.instance_norm import normalize_by_groups
from models.speed.nnpack import convolve_with_nnpack
from util.background import BackgroundWork

AT_ONCE = 3 * 2**21  # values of images computed at once: memory as for one of 1448x1448 pixels
BATCH = 8  # images for each thread; with fewer, threads that are done first wait more often


class ImageThreads:
    """A generator's forward pass without gradients, of a batch whose images do not mix.

    Takes and returns images (N, C, H, W) as `forward` does.
    """

    def __init__(self, net: nn.Module):
        self.net, self.forward = net, net.forward

    def __call__(self, input: torch.Tensor, *features: Any, **more: Any) -> Any:
        threads, count = torch.get_num_threads(), len(input)
        # with half of the threads idle, sharing each operator is as fast
        few = count == 1 or 2 * count <= threads
        special = features or more or torch.is_grad_enabled() or has_hooks(self.net)
        if few or special or not independent_of_batch(self.net):
            return self.forward(input, *features, **more)
        images = input.split(1)
        if threads == 1:
            return torch.cat([self.forward(image) for image in images])
        dtype, half = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        inference = torch.is_inference_mode_enabled()

        def compute(image: torch.Tensor) -> torch.Tensor:
            # each thread has modes of its own; the first turns gradients on if it is false
            mode = torch.inference_mode(inference)
            with mode, torch.no_grad(), torch.autocast("cpu", dtype, half):
                return self.forward(image)

        pool = _pool(threads, os.getpid())
        results = [pool.call(compute, image) for image in images]
        return torch.cat([result() for result in results])


@functools.cache
def _pool(threads: int, process: int) -> BackgroundWork:
    """Threads that compute by themselves, for this process: a fork does not inherit them."""
    pool, ready = BackgroundWork(threads), threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # else the first operator would set the number again
        torch.set_num_threads(1)
        ready.wait()

    for _ in range(threads):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(threads)  # of threads to come
    atexit.register(_end, pool, process)
    return pool


def _end(pool: BackgroundWork, process: int) -> None:
    """End the threads before the interpreter: it aborts if one of them is inside an operator."""
    if process == os.getpid():  # a fork has none of them
        pool.abandon()


def batch_limits(opt: argparse.Namespace, nets: Iterable[nn.Module]) -> tuple[int, float]:
    """The most images in a batch, and the most values in an image for it to share a batch.

    That is `--batch_size` where it is above 1; else, with `ImageThreads`, some for each thread.
    """
    if opt.batch_size > 1 or not _in_threads(nets):
        return opt.batch_size, math.inf
    threads = torch.get_num_threads()
    return BATCH * threads, AT_ONCE / threads


def encoding_threads(opt: argparse.Namespace, nets: Iterable[nn.Module]) -> int:
    """How many threads read and write files: `--num_threads`; if 0, those of `ImageThreads`.

    Unlike threads that share an operator, those that compute images are not slowed down by others.
    """
    return opt.num_threads or (torch.get_num_threads() if _in_threads(nets) else 0)


def _in_threads(nets: Iterable[nn.Module]) -> bool:
    return all(isinstance(net.forward, ImageThreads) and independent_of_batch(net) for net in nets)


def compute_in_threads(nets: Iterable[nn.Module], opt: argparse.Namespace) -> None:
    """Have ResNets on a CPU compute the images of a batch in threads, with faster layers.

    Not U-Nets, which spend their time on reading weights, and each thread would read them. And only
    if all layers are known here: others may not be made for several threads.
    """
    for net in nets:
        known = isinstance(net, ResnetGenerator) and has_known_layers(net)
        if known and next(net.parameters()).device.type == "cpu":
            net.forward = ImageThreads(net)
            if opt.precision == "tf32":
                convolve_with_nnpack(net)
                normalize_by_groups(net)
