"""The measurements of `benchmark.py`: training, loading, translating.

The setting `plain` is the loop of the original: plain modules with ReLUs in place, torch's Adam at
its defaults, no guard against NaN, no cache, an ordinary DataLoader, and a batch size of 1 when
translating.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import create_dataset
from data.loader import Batch
from models import create_model
from models.base_model import BaseModel
from models.speed.layout import contiguous_gradients
from models.speed.row_convolution import RowConv2d
from options.test_options import TestOptions
from options.train_options import TrainOptions
from scripts.launch_counts import count_launches
from util import distributed, util
from util.html import HTML
from util.randomness import seed_everything
from util.run.finite import FiniteGuard
from util.temporarily import temporarily
from util.visualizer import save_images

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("data", "forward/backward", "optimizer", "other")
LEAST_STEPS = 3  # in a turn, however long they take


# ------------------------------------------------------------------------------- as the original
def plain_layers(model: BaseModel) -> None:
    """Make all ReLUs of a model's networks work in place, and its convolutions those of torch."""
    for net in model.networks().values():
        for module in net.modules():
            if isinstance(module, (torch.nn.ReLU, torch.nn.LeakyReLU)):
                module.inplace = True
            elif type(module) is RowConv2d:
                module.__class__ = torch.nn.Conv2d


def torchs_adam(model: BaseModel, lr: float, beta1: float) -> None:
    """Replace a model's Adam optimizers with torch's Adam at its own defaults."""
    for name, old in list(vars(model).items()):
        if isinstance(old, torch.optim.Adam):
            weights = [p for group in old.param_groups for p in group["params"]]
            new = torch.optim.Adam(weights, lr=lr, betas=(beta1, 0.999))
            model.optimizers = [new if o is old else o for o in model.optimizers]
            setattr(model, name, new)


def ordinary_loader(dataset: Any, opt: argparse.Namespace) -> DataLoader:
    """A DataLoader that restarts its workers in every epoch and does not pin memory."""
    workers = int(opt.num_threads)
    return DataLoader(dataset.dataset, opt.batch_size, shuffle=True, num_workers=workers)


# ------------------------------------------------------------------------------------ what is timed
class Training:
    """Iterations as in train.py, on a dataset (`real`) or on random images in memory."""

    unit = "images/s"

    def __init__(self, words: list[str], plain: bool, real: bool):
        self.opt = opt = TrainOptions(words).parse(save=False)
        seed_everything(opt.seed)
        self.plain, self.device = plain, opt.device
        self.dataset = create_dataset(opt) if real else None
        self.model: BaseModel = create_model(opt)
        self.model.setup(opt)
        self.guard = None
        if plain:
            plain_layers(self.model)
            torchs_adam(self.model, opt.lr, opt.beta1)
            # TF32 in convolutions only, PyTorch's default
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            contiguous_gradients(self.model.networks().values())
            self.guard = FiniteGuard(self.model, opt.on_nan)
        self.batches = self._real() if self.dataset else self._random()

    def _random(self) -> Iterator[dict[str, Any]]:
        opt = self.opt
        generator = torch.Generator().manual_seed(0)

        def pictures(channels: int) -> torch.Tensor:
            shape = (opt.batch_size, channels, opt.crop_size, opt.crop_size)
            values = torch.rand(shape, generator=generator) * 2 - 1
            return values.pin_memory() if self.device.type == "cuda" else values

        channels = (opt.input_nc, opt.output_nc)
        A, B = channels if opt.direction == "AtoB" else channels[::-1]
        names = [""] * opt.batch_size
        several = [
            {"A": pictures(A), "B": pictures(B), "A_paths": names, "B_paths": names}
            for _ in range(4)
        ]
        while True:
            yield from several

    def _real(self) -> Iterator[dict[str, Any]]:
        assert self.dataset is not None
        loader = ordinary_loader(self.dataset, self.opt) if self.plain else self.dataset
        while True:
            for batch in loader:
                yield Batch(batch)

    def step(self, timed: Callable = lambda part, function, *args: function(*args)) -> None:
        """One iteration, as in train.py; `timed` calls each part of it."""
        model, guard = self.model, self.guard
        batch = timed("data", next, self.batches)
        if guard is not None:
            timed("other", guard.start)
        timed("other", model.set_input, batch)
        timed("forward/backward", model.optimize_parameters)
        if guard is not None:
            timed("other", guard.finish, "a random batch", batch)
            model.track_metric()

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def warm_up(self, steps: int) -> dict[str, Any]:
        """Run the first steps, which compile; returns their time and the FLOPs of an iteration."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        seconds = time.perf_counter() - start
        flops = 0
        if self.plain:
            with FlopCounterMode(display=False) as counter:
                self.step()
            flops = counter.get_total_flops()
        self.make_room()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"warm_up_s": seconds, "flops": flops}

    def rate(self, seconds: float) -> float:
        """Images/s, over that many seconds and at least `LEAST_STEPS` iterations."""
        self.step()  # not timed: it follows the turns of other settings
        self.wait()
        start, steps = time.perf_counter(), 0
        while steps < LEAST_STEPS or time.perf_counter() - start < seconds:
            self.step()
            steps += 1
            if steps % 8 == 0:  # else the launches would run far ahead of the GPU
                self.wait()
        self.wait()
        rate = steps * self.opt.batch_size / (time.perf_counter() - start)
        self.make_room()
        return rate

    def details(self, trace: str = "") -> dict[str, Any]:
        """Figures other than rates: time by part, peak memory and, given `trace`, a profile."""
        # the split runs eagerly, beside recordings
        found: dict[str, Any] = {"peak_bytes": self.memory(), "split_s": self.split(4)}
        if trace:
            found |= self.profile(trace)
        self.make_room()
        return found

    def make_room(self) -> None:
        """Release memory that is cached but unused, for the other settings."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def split(self, steps: int) -> dict[str, float]:
        """Seconds per iteration by part; their sum is too large, as each waits for the device."""
        times: dict[str, float] = dict.fromkeys(PARTS, 0.0)

        def timed(part: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            times[part] += time.perf_counter() - start
            return result

        before = [(optimizer, optimizer.step) for optimizer in self.model.optimizers]
        for optimizer, step in before:
            optimizer.step = lambda *a, step=step, **k: timed("optimizer", step, *a, **k)
        try:
            for _ in range(steps):
                self.step(timed)
        finally:
            for optimizer, step in before:
                optimizer.step = step
        times["forward/backward"] -= times["optimizer"]
        return {part: seconds / steps for part, seconds in times.items()}

    def memory(self) -> int:
        """Peak bytes: reserved by PyTorch on a GPU, for CUDA graphs too; else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved()
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def profile(self, trace: str) -> dict[str, Any]:
        """Write a Chrome trace of one iteration; return its slowest operators and its launches."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.step()
        self.wait()
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            self.step()
            self.wait()
        profiler.export_chrome_trace(trace)
        by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60)
        return {"heaviest": table, "launched": count_launches(profiler.events() or ())}

    def matmul(self) -> float:
        """TFLOP/s of a large bf16 matrix product, the median of ten."""
        n = 8192 if self.device.type == "cuda" else 1024
        a = torch.randn(n, n, device=self.device).bfloat16()
        times = []
        for _ in range(12):
            self.wait()
            start = time.perf_counter()
            torch.mm(a, a)
            self.wait()
            times.append(time.perf_counter() - start)
        return 2 * n**3 / statistics.median(times[2:]) / 1e12

    def close(self) -> None:
        """End the loading processes."""
        if self.dataset is not None:
            self.dataset.close()


class Loading:
    """Batches of a dataset, without a model."""

    unit = "samples/s"

    def __init__(self, words: list[str], plain: bool, real: bool):
        opt = TrainOptions(words).parse(save=False)
        seed_everything(opt.seed)
        self.dataset = create_dataset(opt)
        self.loader: Any = ordinary_loader(self.dataset, opt) if plain else self.dataset

    def _epoch(self) -> None:
        for _ in self.loader:
            pass

    def warm_up(self, steps: int) -> dict[str, Any]:
        """A whole epoch, which fills the cache."""
        start = time.perf_counter()
        self._epoch()
        return {"warm_up_s": time.perf_counter() - start}

    def rate(self, seconds: float) -> float:
        """Samples/s over whole epochs, the start of an epoch included."""
        start, samples = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not samples:
            self._epoch()
            samples += len(self.dataset)
        return samples / (time.perf_counter() - start)

    def close(self) -> None:
        """End the loading processes."""
        self.dataset.close()


class Translating:
    """test.py on a folder, from parsing the command line to the finished page."""

    unit = "images/s"

    def __init__(self, words: list[str], plain: bool, real: bool):
        self.words, self.plain = words, plain
        self.count = len(list(Path(words[words.index("--dataroot") + 1]).iterdir()))

    def warm_up(self, steps: int) -> dict[str, Any]:
        """Does nothing: starting, loading and compiling are part of the time."""
        return {"warm_up_s": 0.0}

    def rate(self, seconds: float) -> float:
        """Images/s, over the whole folder."""
        start = time.perf_counter()
        if self.plain:
            self._loop()
        else:
            with temporarily(sys, argv=["test.py", *self.words]):
                runpy.run_path(str(ROOT / "test.py"), run_name="__main__")
        return self.count / (time.perf_counter() - start)

    def _loop(self) -> None:
        util.PNG_LEVEL = 6  # Pillow's default
        opt = TestOptions(self.words).parse(save=False)
        opt.serial_batches = opt.no_flip = True
        opt.num_threads = 0
        dataset = create_dataset(opt, batch_size=1)
        model = create_model(opt)
        model.setup(opt)
        plain_layers(model)
        page = HTML(str(Path(opt.results_dir) / opt.name), "plain")
        for data in dataset:
            model.set_input(data)
            with torch.no_grad():
                model.forward()
            save_images(page, model.get_current_visuals(), model.get_image_paths())
        page.save()

    def close(self) -> None:
        """Nothing to close."""


def train_as_rank(
    words: list[str], real: bool, warm_up: int, seconds: float
) -> dict[str, float] | None:
    """Train in one of several processes; rank 0 returns the rate and what the ranks exchange."""
    with distributed.process_group(), contextlib.redirect_stdout(io.StringIO()):
        training = Training(words, False, real)
        took = training.warm_up(warm_up)["warm_up_s"] / warm_up
        # the same number in all processes: they wait for each other in each iteration
        steps = distributed.broadcast_object(max(LEAST_STEPS, int(seconds / took)))
        before = replace(distributed.traffic)
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            training.step()
        training.wait()
        distributed.barrier()
        images = steps * training.opt.batch_size * distributed.world_size()
        found = {
            "rate": images / (time.perf_counter() - start),
            "reductions": (distributed.traffic.reductions - before.reductions) / steps,
            "bytes": (distributed.traffic.bytes - before.bytes) / steps,
        }
        training.close()
        return found if distributed.is_main() else None
