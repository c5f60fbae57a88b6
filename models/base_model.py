"""The contract of a model, and what all models share."""

from __future__ import annotations

import argparse
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from util import distributed
from util.errors import UserError, warn
from util.files import TextPath
from util.image_pool import ImagePool

from . import discriminators, ema
from .losses import GradientPenalty
from .model_files import ModelFiles
from .schedulers import MeanLoss, get_scheduler
from .speed import acceleration
from .speed.gradient_scale import GradientScale
from .speed.iterations import record_iterations, says_recordable, why_not_recorded
from .speed.passes import can_batch, share_pass, should_batch
from .speed.prepared import prepared, uncompiled
from .speed.steps import Steps
from .speed.sync_norm import synchronize_norms

LARGE_BATCH = 2**19  # pixels, from which computing takes longer than launching kernels one by one


class BaseModel(ModelFiles, ABC):
    """A subclass names its losses, networks and images, and says what one iteration does.

    In `__init__`, after `super().__init__(opt)`, it sets

    - `loss_names`: `"G"` for the attribute `loss_G`, shown and logged
    - `model_names`: `"G"` for the network `netG`, saved, loaded and printed
    - `visual_names`: attributes with tensors (N, C, H, W) in [-1, 1], shown and saved
    - `optimizers`: each gets a learning rate schedule
    """

    # for validation, which would compile networks once more, without gradients
    uncompiled = staticmethod(uncompiled)
    shows_batches = True  # whether `visual_names` show the whole batch, not one image of it
    # Whether `optimize_parameters` does the same in each iteration, apart from image pools, so that
    # CUDA graphs can replay it, and the model can take images in any memory layout from its
    # networks. Each class must set this itself: an inherited value is ignored.
    recordable = False

    def __init__(self, opt: argparse.Namespace):
        self.opt = opt
        self.gpu_ids: list[int] = opt.gpu_ids
        self.isTrain = opt.isTrain
        # a program may take the GPU away after parsing
        on_cpu = opt.device.type == "cuda" and not opt.gpu_ids
        self.device = torch.device("cpu") if on_cpu else opt.device
        self.save_dir = TextPath(opt.checkpoints_dir, opt.name)
        fixed_size = opt.preprocess not in ("scale_width", "none")
        acceleration.set_backends(opt.precision, fixed_size, opt.deterministic)
        self.loss_names: list[str] = []
        self.model_names = []
        self.visual_names: list[str] = []
        self.optimizers = []
        self.schedulers = []
        self.image_paths: list[str] = []
        self.metric: float = 0  # what the learning rate policy `plateau` watches
        self.resumed = None  # the checkpoint that --continue_train resumes from
        self.is_set_up = False  # whether `BaseModel.setup` was called
        fp16 = self.isTrain and opt.precision == "fp16"
        self._gradient_scale = GradientScale() if fp16 else None
        accumulate = opt.accumulate if self.isTrain else 1
        self._steps = Steps(self.trained_tensors, accumulate, self._gradient_scale)
        self._averages = {}  # with --ema
        self._changes = dict  # none before `watch_attributes`
        self._warned_about: set[str] = set()
        self._mean_loss = MeanLoss()

    @staticmethod
    def modify_commandline_options(
        parser: argparse.ArgumentParser, is_train: bool
    ) -> argparse.ArgumentParser:
        """Add options of this model, or change defaults; return the parser."""
        return parser

    @staticmethod
    def check_options(opt: argparse.Namespace) -> None:
        """Raise UserError if options are incompatible with this model."""

    @abstractmethod
    def set_input(self, input: dict[str, Any]) -> None:
        """Move a batch of the dataset to the device, and set `image_paths`."""

    def to_device(self, pictures: torch.Tensor) -> torch.Tensor:
        """The images of a batch (N, C, H, W) on the model's device, for `set_input`."""
        return distributed.to_device(pictures, self.device)

    @abstractmethod
    def forward(self) -> None:
        """Compute the images of `visual_names`, in training and in testing."""

    @abstractmethod
    def optimize_parameters(self) -> None:
        """One iteration: forward pass, losses, gradients, optimizer steps."""

    # ---------------------------------------------------------------------------------- running
    def data_dependent_initialize(self, data: dict[str, Any]) -> None:
        """Make what depends on a batch, such as layers and their optimizer; called before `setup`.

        Models in the form of CUT have it.
        """

    def parallelize(self) -> None:
        """Do nothing, after `setup`: training loops in the form of CUT call it."""

    def setup(self, opt: argparse.Namespace) -> None:
        """Move networks to the device, load weights, and create learning rate schedules."""
        several = self.isTrain and distributed.world_size() > 1
        self.is_set_up = True
        if self.isTrain:
            discriminators.apply_options(self)
            scalers = self.find_all(torch.amp.GradScaler) if self._gradient_scale else ()
            if any(scaler.is_enabled() for scaler in scalers):
                self._steps.refuse_scaler()
        for name, net in self.networks().items():
            if others := [k for k, v in net.state_dict().items() if not torch.is_tensor(v)]:
                raise UserError(
                    f"net{name} has a state that is no tensor ({others[0]}), but files of weights "
                    "hold only tensors: return a tensor from get_extra_state"
                )
            net.to(self.device)
            if several or self.gpu_ids:  # where the original wraps networks
                prepared(net, with_module=True)
            self.prepare_network(net)
        if several:
            self._synchronize_norms()
        if not self.isTrain:
            self.load_networks(self.load_suffix())
        elif opt.continue_train and distributed.is_source():
            self.load_saved(opt)  # other ranks, which may not have the files, get a broadcast
        if self.isTrain:
            self._set_up_optimizers()
            self._steps.activate()
            self.schedulers = [get_scheduler(o, opt) for o in self.optimizers]
            if self._records_iterations():
                record_iterations(self)
            if self._records_networks() or opt.accumulate > 1:
                self._begin_iterations()
        if several:
            self.broadcast_weights()  # here too, for training loops other than the one in train.py
        if self.isTrain and opt.ema:
            self._averages = ema.start_averages(self, opt.ema)
            self._save_averages_too()
        self.print_networks(opt.verbose)

    def _synchronize_norms(self) -> None:
        """Synchronize batch norm statistics over all ranks."""
        nets = self.all_modules().values()
        converted = sum(synchronize_norms(n, self.needs_second_gradients(n)) for n in nets)
        if converted and self.opt.norm == "batch":
            print(
                "--norm batch: statistics are those of all "
                f"{distributed.world_size()} processes' batches together, as with syncbatch"
            )

    def broadcast_weights(self) -> None:
        """Broadcast parameters and buffers from the rank that has loaded them.

        Includes modules that are not in `model_names`, such as a teacher.
        """
        distributed.broadcast_tensors(
            [t.detach() for t in self.trained_tensors()], src=distributed.source_rank()
        )
        self._steps.activate()  # also for networks that were made after `BaseModel.setup`

    def prepare_network(self, net: nn.Module) -> None:
        """Apply --precision, --compile, --channels_last and --grad_checkpoint to a network."""
        opt = self.opt
        acceleration.prepare(
            net,
            self.device,
            precision=opt.precision,
            channels_last=self._takes_channels_last(net),
            compiled=opt.compile,
            recompute=getattr(opt, "grad_checkpoint", False),
            graphs=self._records_networks(),
            scale=self._gradient_scale,
        )

    def _takes_channels_last(self, net: nn.Module) -> bool:
        """Whether --channels_last, or its default, applies to a network."""
        opt, kind = self.opt, type(self)
        if opt.channels_last != "auto":
            return opt.channels_last == "on"
        # where iterations are not recorded, launching kernels takes too long for a gain
        small = opt.batch_size * opt.crop_size**2 < LARGE_BATCH
        if self.isTrain and small and why_not_recorded(kind, opt):
            return False
        # other models may use functions that need the usual layout, such as `view`
        known = says_recordable(kind)
        return known and acceleration.prefers_channels_last(net, self.device, opt.precision)

    def _records_iterations(self) -> bool:
        """Whether --cuda_graphs records whole iterations."""
        return self.opt.cuda_graphs and why_not_recorded(type(self), self.opt) is None

    def _records_networks(self) -> bool:
        """Whether --cuda_graphs records each compiled network by itself."""
        return self.opt.cuda_graphs and self.opt.compile and not self._records_iterations()

    def needs_second_gradients(self, net: nn.Module) -> bool:
        """Whether a network needs double backward (gradient penalty), which some kernels lack."""
        asked = getattr(self.opt, "gan_mode", "") == "wgangp" or getattr(self.opt, "gp", None)
        penalized = asked and getattr(self.opt, "lambda_gp", 1) > 0  # a model may have none
        return bool(penalized) and any(net is n for n in discriminators.find(self).values())

    def _set_up_optimizers(self) -> None:
        """Use fused kernels where they help. Raises UserError unless all are torch optimizers."""
        if not self.optimizers:
            warn(
                f"{type(self).__name__}: self.optimizers is empty, so learning rates have no "
                "schedule: set self.optimizers = [...] in __init__"
            )
        for optimizer in self.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise UserError(
                    f"{type(optimizer).__name__} in `optimizers` is no torch.optim.Optimizer: "
                    "derive it from that class"
                )
            acceleration.use_fused_step(optimizer, self.device, self.opt.fast)

    def eval(self) -> None:
        """Put all networks into evaluation mode."""
        for net in self.networks().values():
            net.eval()

    def begin_iteration(self) -> None:
        """Start an iteration: outputs of earlier ones may be overwritten (--cuda_graphs)."""
        self._steps.stepped = set()
        if self._records_networks():  # the call imports the compiler
            torch.compiler.cudagraph_mark_step_begin()

    def _begin_iterations(self) -> None:
        """Make `set_input` start an iteration, whatever training loop calls it."""
        set_input = self.set_input

        def begin(*args: Any, **kwargs: Any) -> None:  # a loop of one's own may pass on more
            self.begin_iteration()
            set_input(*args, **kwargs)

        self.set_input = begin

    def test(self) -> None:
        """Run the forward pass without gradients, then `compute_visuals`."""
        self.begin_iteration()
        with torch.no_grad():
            self.forward()
            self.compute_visuals()

    def compute_visuals(self) -> None:
        """Compute images that only the display needs; called before it shows them."""

    def get_image_paths(self) -> list[str]:
        """Files of the current batch."""
        return self.image_paths

    def update_learning_rate(self) -> None:
        """Step the schedules, at the end of an epoch.

        `plateau` watches `metric` if the model sets it, else the sum of all losses but those of
        discriminators, averaged over the epoch (`track_metric`).
        """
        old = self.learning_rate()
        with warnings.catch_warnings():
            # resumed at the end of an epoch: no optimizer step has been made in this process
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            if self.opt.lr_policy == "plateau":
                (metric,) = distributed.sum_over_ranks(float(self.metric))
                watched = metric / distributed.world_size() or self._mean_loss.mean()
                for scheduler in self.schedulers:
                    scheduler.step(watched)
            else:
                for scheduler in self.schedulers:
                    scheduler.step()
        self._mean_loss = MeanLoss()
        print(f"learning rate {old:.7f} -> {self.learning_rate():.7f}")

    def learning_rate(self) -> float:
        """The current learning rate of the first optimizer."""
        return float(self.optimizers[0].param_groups[0]["lr"]) if self.optimizers else 0.0

    def track_metric(self) -> None:
        """Add the losses of this iteration to the mean that `plateau` watches."""
        if self.opt.lr_policy == "plateau":
            own = [n for n in self.loss_names if not discriminators.owns_loss(self, n)]
            self._mean_loss.add(self.loss_values(own))

    # ------------------------------------------------------------------------------ optimization
    def batch_passes(self, net: nn.Module, *inputs: torch.Tensor) -> None:
        """Announce inputs (N, C, H, W) on which a network will be called in this iteration.

        If `--batch_passes` allows it, the network runs on them now as one larger batch, and
        `net(x)` then returns the output for x, the same up to rounding. Otherwise this does
        nothing, and `net(x)` computes as usual.
        """
        if torch.is_grad_enabled() and self.shares_pass(net, *inputs):
            share_pass(prepared(net), inputs)

    def shares_pass(self, net: nn.Module, *inputs: torch.Tensor) -> bool:
        """Whether `--batch_passes` runs a network on these inputs (N, C, H, W) in one pass."""
        return should_batch(self.opt, inputs[0]) and can_batch(net, *inputs)

    def snapshot(self) -> Callable[[], None]:
        """Snapshot gradient sums, penalties and pools; returns a function that restores them."""
        parts = [self._steps, *self.find_all(GradientPenalty), *self.find_all(ImagePool)]
        undos = [part.snapshot() for part in parts]

        def undo() -> None:
            for one in undos:
                one()

        return undo

    def inspect_steps(self, inspect: Callable[[torch.optim.Optimizer], None] | None) -> None:
        """Call a function before each optimizer step; it may set gradients to None."""
        self._steps.inspect = inspect
        self._steps.activate()

    # ---------------------------------------------------------------------------------- showing
    def get_current_visuals(self) -> OrderedDict[str, Any]:
        """The images (N, C, H, W) in [-1, 1] that have been computed so far, by name.

        Those that only the losses need are missing before the first iteration, for example if a
        resumed run starts with a validation.
        """
        names = [n for n in self.visual_names if isinstance(n, str)]
        if not self.isTrain or self.present_losses():
            self._warn_of_missing("visual_names", {n: n for n in names})
        visuals = OrderedDict((n, getattr(self, n)) for n in names if hasattr(self, n))
        for name, x in list(visuals.items()):
            is_tensor = torch.is_tensor(x)
            if isinstance(x, np.ndarray) or (is_tensor and x.dim() == 4 and x.numel()):
                continue
            del visuals[name]
            what = f"tensor of shape {tuple(x.shape)}" if is_tensor else type(x).__name__
            self._warn_once(
                name + " shape",
                f"{type(self).__name__}: visual_names has '{name}', a {what}, and images are "
                "tensors (N, C, H, W) or arrays (H, W, C): it is not shown",
            )
        return visuals

    def get_current_losses(self) -> OrderedDict[str, float]:
        """The losses that have been computed so far, by name. Waits for the GPU once.

        A loss that is not computed in every iteration keeps its last value.
        """
        listed = {n: "loss_" + n for n in self.loss_names if isinstance(n, str)}
        self._warn_of_missing("loss_names", listed)
        discriminators.warn_of_unused_augmentation(self)
        names = self.present_losses()
        return OrderedDict(zip(names, self.loss_values(names).tolist(), strict=True))

    def _warn_of_missing(self, where: str, attributes: dict[str, str]) -> None:
        """Warn once about each name whose attribute does not exist."""
        for name, attribute in attributes.items():
            if not hasattr(self, attribute):
                self._warn_once(
                    attribute,
                    f"{type(self).__name__}: {where} has '{name}', but there is no attribute "
                    f"{attribute} so far: it is not shown",
                )

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned_about and distributed.is_main():
            warn(text)
        self._warned_about.add(key)

    def present_losses(self) -> list[str]:
        """The names in `loss_names` that have been computed so far."""
        names = [n for n in self.loss_names if isinstance(n, str)]
        return [n for n in names if getattr(self, "loss_" + n, None) is not None]

    def loss_values(self, names: list[str]) -> torch.Tensor:
        """The current losses of these names as one tensor (number of losses,) on the device."""
        values = [getattr(self, "loss_" + name, 0.0) for name in names]
        tensors = [torch.as_tensor(v, device=self.device).detach().float() for v in values]
        return (
            torch.stack([t.mean() for t in tensors])
            if tensors
            else torch.zeros(0, device=self.device)
        )

    def print_networks(self, verbose: bool) -> None:
        """Print the number of parameters of each network, and with `verbose` its layers."""
        print("---------- Networks initialized -------------")
        for name, net in self.networks().items():
            if verbose:
                print(net)
            count = sum(p.numel() for p in net.parameters())
            print(f"[Network {name}] Total number of parameters : {count / 1e6:.3f} M")
        print("-----------------------------------------------")

    # ------------------------------------------------------------------------------------ helpers
    @staticmethod
    def set_requires_grad(nets: nn.Module | list[nn.Module], requires_grad: bool = False) -> None:
        """Freeze or unfreeze networks: a frozen one computes no gradients of its weights."""
        for net in nets if isinstance(nets, (list, tuple)) else [nets]:
            for parameter in net.parameters() if net is not None else ():
                parameter.requires_grad = requires_grad
