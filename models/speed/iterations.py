"""Whole training iterations, recorded as CUDA graphs: a few launches in place of thousands.

A recording holds the kernels that `optimize_parameters` launches, and nothing that Python does in
between. So only models that declare `recordable` are recorded; a recording is replayed only while
nothing that Python may have read has changed; and an iteration that draws random numbers in Python,
or reads what the one before has left, is refused when it is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from models.losses import GradientPenalty
from util import distributed, randomness
from util.errors import first_line, say
from util.image_pool import ImagePool

from .capture import Recording, capturable
from .python_state import (
    OPAQUE,
    PLAIN,
    ByIdentity,
    State,
    Watch,
    hooked,
    state_of_layer,
    state_of_optimizer,
    values_of,
)

if TYPE_CHECKING:
    from models.base_model import BaseModel

WARM_UP = 3  # equal iterations before one is recorded: cuDNN searches and compilers work in them
PATIENCE = 100  # how far eager iterations may outnumber replays before recording is given up
RECORDINGS = 4  # for different kinds of batches, such as a smaller last one
ADAMS = (torch.optim.Adam, torch.optim.AdamW)
# attributes that may change between replays, and that an iteration must not read
_IGNORED = {"image_paths", "metric", "schedulers", "_mean_loss", "_warned_about"}


def says_recordable(kind: type[BaseModel]) -> bool:
    """Whether a class of models itself, not one that it is derived from, sets `recordable`."""
    return "recordable" in vars(kind) and kind.recordable


def why_not_recorded(kind: type[BaseModel], opt: argparse.Namespace) -> str | None:
    """Why the iterations of a class of models can't be recorded; None if they may be."""
    if not opt.isTrain:
        return "not in testing"
    if not says_recordable(kind):
        return f"a {kind.__name__} does not say that it is recordable"
    modes = {
        "several processes": distributed.world_size() > 1,
        "--accumulate": opt.accumulate > 1,
        "--precision fp16": opt.precision == "fp16",
        "--on_nan skip": opt.on_nan == "skip",
        "--grad_checkpoint": opt.grad_checkpoint,
        "--gp_every": getattr(opt, "gp_every", 1) > 1,
        "--flip_equivariance": getattr(opt, "flip_equivariance", False),
        f"--preprocess {opt.preprocess}": opt.preprocess in ("scale_width", "none"),
    }
    used = next((mode for mode, on in modes.items() if on), None)
    return f"not with {used}" if used else None


class RecordedIterations:
    """Stands in for the `optimize_parameters` of a model: records it, and replays recordings."""

    def __init__(self, model: BaseModel):
        self.model = model
        self.model_optimize, self.model_set_input = model.optimize_parameters, model.set_input
        # for eager iterations as well: autograd keeps to the stream on which it first accumulated
        self.stream = torch.cuda.Stream()
        self.refused = ""
        # names of the attributes that `set_input` has set, and of those that an iteration sets
        self.input_names: set[str] = set()
        self.output_names: set[str] = set()
        self.state: State | None = None  # in which the recordings were made
        self.seen: Counter[tuple] = Counter()
        self.recordings: dict[tuple, Recording] = {}
        self.balance = 0  # replays minus eager iterations
        self.changed = ""  # what changed last
        self.announced = False

    def set_input(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `set_input`, and note what it sets."""
        before = dict(vars(self.model))
        result = self.model_set_input(*args, **kwargs)
        self.input_names |= _changed(before, self.model).keys() - _IGNORED
        return result

    def optimize_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Run or replay one iteration; a call with arguments is never recorded."""
        eager = self.refused or args or kwargs or not torch.is_grad_enabled()
        recording = None if eager else self._find()
        if recording is None:
            before = dict(vars(self.model))
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.model_optimize(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.output_names = set(_changed(before, self.model))
            return result
        own = vars(self.model)
        for name, fixed in recording.static_inputs.items():
            fixed.copy_(own[name])
        for part in recording.parts:
            part()
        # copies, since a caller may keep them
        own.update(tree_map_only(torch.Tensor, torch.clone, recording.results))
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient

    def _find(self) -> Recording | None:
        """The recording to replay in this iteration, made now if due; None to run it eagerly."""
        try:
            state = self._state()
            changed = state.difference(self.state) if self.state else "nothing"
        except Exception as e:  # whatever a user's objects raise when they are compared
            return self._refuse(f"what the model holds can't be compared ({first_line(e)})")
        if changed:
            if self.recordings:
                self.recordings = {}
                torch.cuda.empty_cache()  # or their memory could not be used for anything else
            self.changed, self.state = changed, state
            # shared: recordings are replayed one at a time, and their results are copied out
            self.pool = torch.cuda.graph_pool_handle()
            self.seen.clear()
        batch = tuple((name, _kind(x)) for name, x in self._inputs().items())
        self.seen[batch] += 1
        full = len(self.recordings) == RECORDINGS
        if batch not in self.recordings and self.seen[batch] > WARM_UP and not full:
            if reason := self._obstacle() or self._record(batch):
                return self._refuse(reason)
            if not self.announced:
                say("iterations are replayed as CUDA graphs (--cuda_graphs off runs each one)")
                self.announced = True
        self.balance += 1 if batch in self.recordings else -1
        if self.balance < -PATIENCE:
            return self._refuse(f"{self.changed} changes too often, or is too large to compare")
        return self.recordings.get(batch)

    def _refuse(self, reason: str) -> None:
        """Run all iterations eagerly from now on."""
        say(f"--cuda_graphs: iterations are not recorded: {reason}")
        self.refused = reason
        self.state, self.recordings = None, {}
        self.layers, self.nets, self.optimizers, self.tensors = [], [], [], []

    def _inputs(self) -> dict[str, Any]:
        own = vars(self.model)
        return {name: own[name] for name in sorted(self.input_names) if name in own}

    def _obstacle(self) -> str:
        """Why an iteration can't be recorded; empty if it can."""
        model = self.model
        for optimizer in model.all_optimizers():
            known = type(optimizer) in ADAMS
            if not known or not all(group["fused"] for group in optimizer.param_groups):
                return f"{type(optimizer).__name__} is no fused Adam"
            if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
                return "an optimizer has hooks"
        if model._steps.inspect is not None:
            return "steps are inspected"
        if reason := hooked(self.nets, self.tensors):
            return reason
        if any(penalty.kind and penalty.every > 1 for penalty in model.find_all(GradientPenalty)):
            return "a gradient penalty is not computed in every iteration"
        for name, x in self._inputs().items():
            if not isinstance(x, (torch.Tensor, *PLAIN)):
                return f"set_input sets {name}, which is no tensor"
            if torch.is_tensor(x) and (x.requires_grad or x.device.type != model.device.type):
                what = "needs gradients" if x.requires_grad else f"is not on {model.device}"
                return f"set_input sets {name}, which {what}"
        # a recording keeps its memory, and other batches and validation need memory too
        if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
            return "it takes more than half of the GPU's memory"
        return ""

    def _record(self, batch: tuple) -> str:
        """Record an iteration; if that is impossible, restore everything and return why."""
        model, own = self.model, vars(self.model)
        recording = Recording(self.stream, self.pool)
        tensors = {n: x for n, x in self._inputs().items() if torch.is_tensor(x)}
        recording.static_inputs = {name: x.clone() for name, x in tensors.items()}
        before, undo, sources = dict(own), model.snapshot(), randomness.get_state()
        learning = [(t, t.requires_grad, t.grad) for t in self.tensors]

        def restore() -> None:
            own.clear()
            own.update(before)
            undo()
            randomness.set_state(sources)
            for tensor, learns, gradient in learning:
                tensor.requires_grad, tensor.grad = learns, gradient

        own.update(recording.static_inputs)
        drawn = randomness.fingerprint()
        watch = Watch((self.output_names | self._ignored_names()) - tensors.keys())
        try:
            with (
                capturable(model.all_optimizers()),
                self._pools_each_time(recording),
                watch.over(model),
                recording.capture(),
            ):
                returned = self.model_optimize()
            reason = watch.reason(self.output_names)
            if not reason and returned is not None:
                reason = "optimize_parameters returns something"
            if not reason and randomness.fingerprint() != drawn:
                reason = "it draws random numbers on the CPU"
        except Exception as e:  # whatever the code of a model raises
            reason = first_line(e)
        except BaseException:
            restore()
            raise
        if reason:
            restore()
            return reason
        results = {name: own[name] for name in self.output_names}
        # detached, so that the next iteration does not extend this one's autograd graph
        recording.results = tree_map_only(torch.Tensor, torch.Tensor.detach, results)
        recording.gradients = [(p, p.grad) for p in model.stepped_tensors()]
        own.update({name: before[name] for name in tensors})  # a replay reads its inputs here
        self.recordings[batch] = recording
        return ""

    @contextlib.contextmanager
    def _pools_each_time(self, recording: Recording) -> Iterator[None]:
        """Context manager: each replay queries image pools, which draw random numbers in Python."""
        pools = [pool for pool in self.model.find_all(ImagePool) if pool.pool_size]
        before = [[*map(id, pool.images)] for pool in pools]

        def query(pool: ImagePool, ask: Callable[..., Any], images: torch.Tensor) -> torch.Tensor:
            if any(kept.shape[1:] != images.shape[1:] for kept in pool.images):
                raise ValueError("an image pool has images of another size")
            images = images.detach()
            chosen = torch.empty_like(images)
            recording.call(lambda: chosen.copy_(ask(images)))
            return chosen

        for pool in pools:
            ask = functools.partial(query, pool, pool.query)
            pool.query = ask  # type: ignore[method-assign]
        try:
            yield
        finally:
            for pool in pools:
                del pool.query
        if before != [[*map(id, pool.images)] for pool in pools]:
            raise ValueError("an image pool has changed other than by pool.query()")

    def _state(self) -> State:
        """All that Python may read in an iteration, except the batch."""
        model, device = self.model, self.model.device
        if not self.recordings:  # later the state differs if any of these is replaced
            nets = [n for n in model.all_modules().values() if n not in model._averages.values()]
            self.layers = list(dict.fromkeys(m for net in nets for m in net.modules()))
            self.optimizers = model.all_optimizers()
            self.nets, self.tensors = nets, model.trained_tensors()
            names = {k.__module__ for k in (*type(model).__mro__[:-1], *map(type, self.layers))}
            self.modules = [sys.modules[n] for n in sorted(names) if not n.startswith("torch.")]
        passing = self.input_names | self.output_names | self._ignored_names()
        own = {n: values_of(x, device) for n, x in vars(model).items() if n not in passing}
        of_classes = (x for c in type(model).__mro__ for x in vars(c).values())
        values = (*PLAIN, dict, list)
        own["of the class"] = [values_of(x, device, 1) for x in of_classes if isinstance(x, values)]
        for module in self.modules:
            for name, x in vars(module).items():
                if not (isinstance(x, OPAQUE) or name.startswith("__")):
                    own[f"{name} of {module.__name__}"] = values_of(x, device, 1)
        own["with hooks"] = hooked(self.nets, self.tensors), ByIdentity(model._steps.inspect)
        kind = device.type
        own["of autocast"] = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        layers = [state_of_layer(layer, device) for layer in self.layers]
        adams = [o for o in self.optimizers if type(o) in ADAMS]  # others are not recorded
        return State(own, layers, [state_of_optimizer(o) for o in adams])

    def _ignored_names(self) -> set[str]:
        """Attributes that an iteration is not meant to read, and that may change at any time."""
        return _IGNORED | {n for n in self.model.visual_names if isinstance(n, str)}


def record_iterations(model: BaseModel) -> RecordedIterations:
    """Make a model on a GPU record its iterations, whatever training loop calls it."""
    recorded = RecordedIterations(model)
    for method in (recorded.set_input, recorded.optimize_parameters):
        setattr(model, method.__name__, _StandIn(model, method))
    return recorded


class _StandIn:
    """A method of `RecordedIterations` as an attribute of its model.

    It has no `__dict__`, so a search of the model's attributes does not go into it, and a copy of
    the model gets its own method back.
    """

    __slots__ = ("_method", "_model")

    def __init__(self, model: BaseModel, method: Callable[..., Any]):
        self._model, self._method = model, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._model)]
        return getattr(type(copied), self._method.__name__).__get__(copied)


def _kind(x: Any) -> Any:
    """What a recording is specific to: a tensor's shape, stride, dtype and device; else a value."""
    if torch.is_tensor(x):
        return x.shape, x.stride(), x.dtype, x.device
    return x if isinstance(x, PLAIN) else type(x)


def _changed(before: dict[str, Any], model: BaseModel) -> dict[str, Any]:
    """The attributes that are new, or other objects than before."""
    return {n: x for n, x in vars(model).items() if n not in before or before[n] is not x}
