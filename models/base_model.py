"""The contract of a model, and what all models share."""

from __future__ import annotations

import argparse
import re
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from util import distributed
from util.errors import UserError, warn
from util.run import checkpoint
from util.run.saved_options import DEFAULT_NAME, NETWORK_OPTIONS, read_saved_options

from .schedulers import fast_forward, get_scheduler, rebase
from .speed import acceleration
from .speed.gradient_scale import GradientScale
from .speed.prepared import prepared, share_pass
from .speed.steps import Steps, parameters_of
from .speed.sync_norm import synchronize_norms
from .weights import explain_mismatch, fit_state_dict

T = TypeVar("T")


_Path: Any = type(Path())


class SaveFolder(_Path):
    """A path that also takes a string behind it, as where it was a string itself."""

    def __add__(self, text: str) -> str:
        return str(self) + text


class BaseModel(ABC):
    """A subclass names its losses, networks and pictures, and says what one iteration does.

    In `__init__`, after calling this one, it sets

    - `loss_names`: `"G"` for the attribute `loss_G`, shown and logged
    - `model_names`: `"G"` for the network `netG`, saved, loaded and printed
    - `visual_names`: attributes with tensors (N, C, H, W) in [-1, 1], shown and saved
    - `optimizers`: each gets a learning rate schedule
    """

    # what of `training_state` is each process's own, where there are several
    PER_RANK_STATE = ("parts", "metric", "gradients")
    shows_batches = True  # whether the pictures of `visual_names` are those of the whole batch

    def __init__(self, opt: argparse.Namespace):
        self.opt = opt
        self.gpu_ids: list[int] = opt.gpu_ids
        self.isTrain: bool = opt.isTrain
        self.device: torch.device = opt.device
        self.save_dir = SaveFolder(opt.checkpoints_dir, opt.name)
        fixed_size = opt.preprocess not in ("scale_width", "none")
        acceleration.set_backends(opt.precision, fixed_size, opt.deterministic)
        self.loss_names: list[str] = []
        self.model_names: list[str] = []
        self.visual_names: list[str] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Any] = []
        self.image_paths: list[str] = []
        self.metric: float = 0  # what the learning rate policy `plateau` watches
        self.resumed: checkpoint.FoundCheckpoint | None = None  # what --continue_train goes on from
        fp16 = self.isTrain and opt.precision == "fp16"
        self._gradient_scale = GradientScale() if fp16 else None
        accumulate = opt.accumulate if self.isTrain else 1
        self._steps = Steps(self.trained_tensors, accumulate, self._gradient_scale)
        self._rates: list[list[float]] = []  # those of the options of now, which resuming needs
        self._told_of_norms = False
        self._metric_sum: torch.Tensor | float = 0.0
        self._metric_count: torch.Tensor | int = 0

    @staticmethod
    def modify_commandline_options(
        parser: argparse.ArgumentParser, is_train: bool
    ) -> argparse.ArgumentParser:
        """Add options of this model, or change defaults; return the parser."""
        return parser

    @staticmethod  # noqa: B027 - most models take them all
    def check_options(opt: argparse.Namespace) -> None:
        """Raise UserError where options do not go together with this model."""

    @abstractmethod
    def set_input(self, input: dict[str, Any]) -> None:
        """Take what the dataset gives, a batch, to the device."""

    @abstractmethod
    def forward(self) -> None:
        """Compute what is shown: for training and testing."""

    @abstractmethod
    def optimize_parameters(self) -> None:
        """Compute losses and gradients and update the networks: one iteration."""

    # ---------------------------------------------------------------------------------- running
    def setup(self, opt: argparse.Namespace) -> None:
        """Move networks to the device, load weights where asked for, and make the schedules."""
        several = self.isTrain and distributed.world_size() > 1
        for net in self.networks().values():
            net.to(self.device)
            if several:
                prepared(net, with_module=True)
            self.prepare_network(net)
        if several:
            for net in self.all_modules().values():
                self.synchronize(net)
        if not self.isTrain:
            self.load_networks(self.load_suffix())
        elif opt.continue_train and distributed.is_source():
            self.load_saved(opt)  # the others, which may not see the files, get it from here
        if self.isTrain:
            self._check_optimizers()
            self._steps.activate()
            self.schedulers = [get_scheduler(o, opt) for o in self.optimizers]
            self._rates = [_initial_rates(o) for o in self.optimizers]
        self.print_networks(opt.verbose)

    def load_saved(self, opt: argparse.Namespace) -> None:
        """Find what `--continue_train` goes on from, and load its weights."""
        newest = opt.epoch == "latest" and opt.load_iter == 0
        suffix = None if newest else self.load_suffix()
        self.resumed = checkpoint.find_checkpoint(self.save_dir, self.networks(), suffix)
        if self.resumed is not None and self.resumed.state is not None:
            self._load_checkpoint(self.resumed, self.resumed.state.pop("weights"))
        elif self.resumed is not None:
            self.load_networks(self.resumed.suffix)
        elif suffix is not None:
            self.load_networks(suffix)  # says what there is instead

    def _load_checkpoint(self, found: checkpoint.FoundCheckpoint, weights: dict[str, Any]) -> None:
        """Load the weights of a training state, and warn where the exported files have others."""
        path = checkpoint.state_path(self.save_dir, found.suffix)
        own = {name: (path, weights[name]) for name in self.networks()}
        self._load_weights(own)
        try:
            self.load_networks(found.suffix)  # in a subclass it may load more than networks
            exported = self.network_states()
            other = [name for name in own if not _equal(exported[name], weights[name])]
            reason = f"the files of {', '.join(other)} have other weights" if other else ""
        except UserError as e:
            reason = str(e)
        if reason and not found.unfinished:
            warn(f"{reason}; training goes on from {path}: delete it to start from weights alone")
        if reason:
            self._load_weights(own)

    def synchronize(self, net: nn.Module) -> None:
        """Make batch norms take their statistics over the batches of all processes."""
        converted = synchronize_norms(net, self.needs_second_gradients(net))
        if converted and self.opt.norm == "batch" and not self._told_of_norms:
            self._told_of_norms = True
            print(
                "--norm batch: statistics are those of the batches of all "
                f"{distributed.world_size()} processes together, as with syncbatch"
            )

    def share_weights(self) -> None:
        """Give the weights and statistics of the process that has read them to all the others.

        Those of all networks, also of ones that are not in `model_names`, such as a teacher.
        """
        distributed.broadcast_tensors(
            [t.detach() for t in self.trained_tensors()], src=distributed.source_rank()
        )

    def prepare_network(self, net: nn.Module) -> None:
        """Make a network compute as --precision, --compile and --grad_checkpoint say."""
        opt = self.opt
        acceleration.prepare(
            net,
            self.device,
            precision=opt.precision,
            channels_last=opt.channels_last,
            compiled=opt.compile,
            recompute=getattr(opt, "grad_checkpoint", False),
            graphs=opt.cuda_graphs,
            scale=self._gradient_scale,
        )

    def needs_second_gradients(self, net: nn.Module) -> bool:
        """Whether gradients of gradients go through a network, which some kernels do not have."""
        penalized = getattr(self.opt, "gan_mode", "") == "wgangp" and self.opt.lambda_gp > 0
        discriminators = [n for name, n in self.networks().items() if name.startswith("D")]
        return penalized and any(net is n for n in discriminators)

    def load_suffix(self) -> str:
        """Which save `--load_iter` and `--epoch` ask for: `iter_N`, or the epoch."""
        return f"iter_{self.opt.load_iter}" if self.opt.load_iter > 0 else str(self.opt.epoch)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by their names in `model_names`."""
        return {n: getattr(self, "net" + n) for n in self.model_names if isinstance(n, str)}

    def all_modules(self) -> dict[str, nn.Module]:
        """Every module that an attribute holds, by itself or in lists and dictionaries."""
        return dict(_held(vars(self), nn.Module))

    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of `optimizers`, and after them others that an attribute holds."""
        others = (o for _, o in _held(vars(self), torch.optim.Optimizer))
        return list(dict.fromkeys([*self.optimizers, *others]))

    def trained_tensors(self) -> list[torch.Tensor]:
        """Weights and statistics of all modules, and whatever else an optimizer trains."""
        of_modules = (t for net in self.all_modules().values() for t in _tensors(net))
        others = (p for optimizer in self.all_optimizers() for p in parameters_of(optimizer))
        return list(dict.fromkeys([*of_modules, *others]))

    def _check_optimizers(self) -> None:
        """Raise UserError where an optimizer has no step that could be hooked into."""
        for optimizer in self.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise UserError(
                    f"{type(optimizer).__name__} in `optimizers` is no torch.optim.Optimizer: "
                    "derive it from that class"
                )
            # the fused kernel rounds in another way on a CPU, so there it takes a --fast
            fits = self.device.type == "cuda" or (self.opt.fast and self.device.type == "cpu")
            if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and fits:
                for group in [optimizer.defaults, *optimizer.param_groups]:
                    if group["fused"] is None and not group["foreach"]:
                        group["fused"] = True

    def eval(self) -> None:
        """Put all networks into evaluation mode."""
        for net in self.networks().values():
            net.eval()

    def begin_iteration(self) -> None:
        """What networks returned so far is not needed any more; see --cuda_graphs."""
        acceleration.begin_iteration(self.opt.cuda_graphs)

    def test(self) -> None:
        """Forward without gradients, for testing."""
        self.begin_iteration()
        with torch.no_grad():
            self.forward()
            self.compute_visuals()

    def compute_visuals(self) -> None:  # noqa: B027 - most models have nothing to add
        """Compute pictures that only the display needs; called before they are shown."""

    def get_image_paths(self) -> list[str]:
        """Files of the current batch."""
        return self.image_paths

    def update_learning_rate(self) -> None:
        """Step the schedules, at the end of an epoch.

        `plateau` watches `metric` if the model sets it, else the mean over the epoch of the sum
        of the losses that are not a discriminator's (`track_metric`).
        """
        old = self.learning_rate()
        with warnings.catch_warnings():
            # a run that was resumed at the very end of an epoch has made no step of its own yet
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            metric = self._mean_metric() if self.opt.lr_policy == "plateau" else 0.0
            for scheduler in self.schedulers:
                if self.opt.lr_policy == "plateau":
                    scheduler.step(metric)
                else:
                    scheduler.step()
        self._metric_sum, self._metric_count = 0.0, 0
        print(f"learning rate {old:.7f} -> {self.learning_rate():.7f}")

    def _mean_metric(self) -> float:
        # the same number in all processes, so that their rates stay the same
        own = float(self._metric_sum), int(self._metric_count), float(self.metric)
        summed, count, metric = distributed.sum_over_ranks(*own)
        return metric / distributed.world_size() or summed / max(1, count)

    def fast_forward_schedules(self) -> None:
        """Take the schedules to where they are when epoch `--epoch_count` begins."""
        for scheduler in self.schedulers:
            fast_forward(scheduler, self.opt)

    def learning_rate(self) -> float:
        """The current learning rate of the first optimizer."""
        return float(self.optimizers[0].param_groups[0]["lr"]) if self.optimizers else 0.0

    def track_metric(self) -> None:
        """Take the losses of this iteration into the mean that `plateau` watches."""
        if self.opt.lr_policy != "plateau":
            return
        names = [n for n in self.loss_names if not self._is_of_discriminator(n)]
        # stays on the device: nothing waits for the GPU here
        total = self.loss_values(names).sum()
        finite = total.isfinite()  # --on_nan skip goes on after one that is not
        self._metric_sum = self._metric_sum + torch.where(finite, total, 0.0)
        self._metric_count = self._metric_count + finite

    def _is_of_discriminator(self, loss: str) -> bool:
        """Whether a loss is that of a discriminator: D, D_real, gp_A; but not Dice or Depth."""
        nets = [n for n in self.model_names if re.fullmatch(r"D([A-Z0-9_].*)?", n)]
        return any(loss == n or loss.startswith(n + "_") for n in (*nets, "D", "gp"))

    # ------------------------------------------------------------------------------ optimization
    def batch_passes(self, net: nn.Module, *inputs: torch.Tensor) -> None:
        """Announce inputs (N, C, H, W) that will all go through a network in this iteration.

        Where `--batch_passes` allows it they go through now, as one larger batch, and `net(x)` for
        each of them then gives its part: the same, but for the rounding of sums. Elsewhere nothing
        happens, and `net(x)` computes.
        """
        shared = torch.is_grad_enabled() and acceleration.wants_one_pass(self.opt, inputs[0])
        if shared and acceleration.fits_one_pass(net, *inputs):
            share_pass(net, inputs)

    def inspect_steps(self, inspect: Callable[[torch.optim.Optimizer], None] | None) -> None:
        """Have a function called before each step; it may set gradients to None."""
        self._steps.inspect = inspect
        self._steps.activate()

    # short for what they do: optimizers do by themselves what these were once needed for
    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam with `--lr` and `--beta1`."""
        return torch.optim.Adam(parameters, lr=self.opt.lr, betas=(self.opt.beta1, 0.999))

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer.zero_grad()`."""
        optimizer.zero_grad()

    def backpropagate(self, loss: torch.Tensor) -> None:
        """`loss.backward()`."""
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer.step()`."""
        optimizer.step()

    # ---------------------------------------------------------------------------------- showing
    def get_current_visuals(self) -> OrderedDict[str, Any]:
        """The current pictures by name."""
        return OrderedDict((n, getattr(self, n)) for n in self.visual_names if isinstance(n, str))

    def get_current_losses(self) -> OrderedDict[str, float]:
        """The losses as numbers, by name; without those not computed yet. Waits for the GPU once.

        One that is computed in some iterations only is that of the last of these.
        """
        names = self.present_losses()
        return OrderedDict(zip(names, self.loss_values(names).tolist(), strict=True))

    def present_losses(self) -> list[str]:
        """Those of `loss_names` that have been computed so far."""
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
        """Print the size of each network, and with `verbose` its layers."""
        print("---------- Networks initialized -------------")
        for name, net in self.networks().items():
            if verbose:
                print(net)
            count = sum(p.numel() for p in net.parameters())
            print(f"[Network {name}] Total number of parameters : {count / 1e6:.3f} M")
        print("-----------------------------------------------")

    # ------------------------------------------------------------------------ saving and loading
    def network_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """The weights of all networks by name, under plain keys."""
        # contiguous: files are the same whatever the memory format in which was trained
        return {
            name: {k: v.detach().contiguous() for k, v in unwrap(net).state_dict().items()}
            for name, net in self.networks().items()
        }

    def save_networks(self, epoch: int | str) -> None:
        """Write each network to `<epoch>_net_<name>.pth`, a plain state dictionary."""
        for name, state in self.network_states().items():
            checkpoint.save_file(state, self.save_dir / f"{epoch}_net_{name}.pth")

    def load_networks(self, epoch: int | str) -> None:
        """Read the networks that `save_networks` wrote, or that the original did.

        Raises UserError where a file is missing, can't be read, or does not fit; then no network
        has changed.
        """
        weights = {}
        for name in self.networks():
            path = self.save_dir / f"{epoch}_net_{name}.pth"
            try:
                weights[name] = path, checkpoint.load_weights(path, self.device)
            except UserError as e:
                raise UserError(f"{e}{self._other_model()}") from e
        self._load_weights(weights)
        for path, _ in weights.values():
            print(f"loading the model from {path}")

    def _load_weights(self, weights: dict[str, tuple[Path, dict[str, torch.Tensor]]]) -> None:
        """Load weights by the name of their network, all or none; each has the file it is from."""
        fitted = {}
        for name, (path, state) in weights.items():
            net = unwrap(self.networks()[name])
            fitted[name] = fit_state_dict(state, net)
            problem = explain_mismatch(name, fitted[name], net)
            if problem:
                hint = self._other_model() or self._other_options()
                raise UserError(f"the weights in {path} do not fit: {problem}{hint}")
        for name, state in fitted.items():
            unwrap(self.networks()[name]).load_state_dict(state)

    def _other_model(self) -> str:
        """What to add to an error about weights where those of another model were meant."""
        if self.opt.name == DEFAULT_NAME and not self.save_dir.is_dir():
            return " (--name was not given)"
        trained = read_saved_options(self.save_dir).get("model", self.opt.model)
        if self.isTrain or self.opt.model in (trained, "test"):
            return ""
        return f" ({self.opt.name} was trained with --model {trained})"

    def _other_options(self) -> str:
        """The same where options are given that are not those of the training."""
        saved = read_saved_options(self.save_dir)
        opt = self.opt
        other = [n for n in NETWORK_OPTIONS if n in saved and saved[n] != str(getattr(opt, n))]
        if self.isTrain or not other:
            return ""
        flags = ", ".join("--" + name for name in other)
        return f", or leave out {flags}: what is left out is as it was saved"

    def training_state(self) -> dict[str, Any]:
        """What training needs besides the weights: plain values and tensors.

        Optimizers, schedules, modules that are not in `model_names`, and each attribute that has a
        state of its own, such as an image pool. A model with more to remember extends this and
        `load_training_state`.
        """
        optimizers, steps = self.all_optimizers(), self._steps
        return {
            "optimizers": [o.state_dict() for o in optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
            "parts": {name: part.state_dict() for name, part in self._stateful_parts().items()},
            "modules": {name: net.state_dict() for name, net in self._unnamed_modules().items()},
            "tensors": [t.detach() for t in self.loose_tensors()],
            "metric": [float(self._metric_sum), int(self._metric_count)],
            # what --accumulate has added up since the last step
            "accumulated": [steps.counts.get(o, 0) for o in optimizers],
            "gradients": [steps.gradients(o) for o in optimizers],
        }

    def load_training_state(self, state: dict[str, Any], options: dict[str, Any]) -> None:
        """Take back what `training_state` gave, saved by a run with these options.

        Where `--lr` or the number of epochs is another one now, the rates follow the new ones.
        """
        optimizers = self.all_optimizers()
        if len(state["optimizers"]) == len(self.optimizers):  # others were not saved once
            optimizers = self.optimizers
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        for name, part in self._stateful_parts().items():
            if name in state["parts"]:
                part.load_state_dict(state["parts"][name])
        if self._gradient_scale is not None and "_gradient_scale" not in state["parts"]:
            # of an older version, or none at all
            self._gradient_scale.load_state_dict(state["parts"].get("scaler", {}))
        saved_modules = state.get("modules", {})
        for name, net in self._unnamed_modules().items():
            if name in saved_modules:
                net.load_state_dict(saved_modules[name])
        with torch.no_grad():
            for tensor, saved in zip(self.loose_tensors(), state.get("tensors", []), strict=False):
                tensor.copy_(saved)
        self._metric_sum, self._metric_count = state["metric"]
        if self.opt.accumulate == options.get("accumulate", self.opt.accumulate):
            for o, count, sums in zip(
                optimizers, state["accumulated"], state["gradients"], strict=True
            ):
                self._steps.resume(o, count, sums)
        schedule = ("lr", "lr_policy", "n_epochs", "n_epochs_decay", "lr_decay_iters")
        changed = any(getattr(self.opt, k) != options.get(k) for k in schedule)
        if changed or self._rates != [_initial_rates(o) for o in self.optimizers]:
            rebase(self.schedulers, self.opt, self._rates)

    @staticmethod
    def reshard_state(states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """Reshard `PER_RANK_STATE`, one entry a saved rank, for a new world size.

        Pictures of image pools are shared out in turn, and each rank keeps what its pools can
        hold. Accumulated gradients and the metric keep their means.
        """
        first = states[0]
        gradients = [
            [_mean_gradient(own) for own in zip(*of_optimizer, strict=True)]
            for of_optimizer in zip(*(s["gradients"] for s in states), strict=True)
        ]
        metric = [sum(s["metric"][i] for s in states) for i in (0, 1)]
        resharded = []
        for rank in range(world_size):
            parts = {}
            for name, part in first["parts"].items():
                parts[name] = part
                if set(part) == {"images"}:
                    images = [x for s in states for x in s["parts"][name]["images"]]
                    parts[name] = {"images": images[rank::world_size]}
            resharded.append(
                {
                    "parts": parts,
                    "gradients": gradients,
                    "metric": [0.0, 0] if rank else metric,
                }
            )
        return resharded

    def _unnamed_modules(self) -> dict[str, nn.Module]:
        """Modules with weights that no network of `model_names` has."""
        named = {p for net in self.networks().values() for p in net.parameters()}
        modules = self.all_modules().items()
        return {n: net for n, net in modules if any(p not in named for p in net.parameters())}

    def loose_tensors(self) -> list[torch.Tensor]:
        """What optimizers train and no module has."""
        of_modules = {t for net in self.all_modules().values() for t in _tensors(net)}
        trained = (p for optimizer in self.all_optimizers() for p in parameters_of(optimizer))
        return list(dict.fromkeys(p for p in trained if p not in of_modules))

    def _stateful_parts(self) -> dict[str, Any]:
        others = (nn.Module, torch.optim.Optimizer)
        return {
            name: part
            for name, part in vars(self).items()
            if hasattr(part, "load_state_dict") and not isinstance(part, others)
        }

    # ------------------------------------------------------------------------------------ helpers
    @staticmethod
    def set_requires_grad(nets: nn.Module | list[nn.Module], requires_grad: bool = False) -> None:
        """Freeze networks, or thaw them: a frozen one costs no gradients of its weights."""
        for net in nets if isinstance(nets, list) else [nets]:
            for parameter in net.parameters():
                parameter.requires_grad = requires_grad


def _mean_gradient(own: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """That of several processes; as in `average_gradients` one that is not there counts as zero."""
    there = [gradient.cpu() for gradient in own if gradient is not None]
    return torch.stack(there).sum(0) / len(own) if there else None


def _held(values: Any, kind: type[T], name: str = "", depth: int = 3) -> Iterator[tuple[str, T]]:
    """What dictionaries, lists and tuples hold of a kind, with names such as `nets.0`."""
    if isinstance(values, kind):
        yield name, values
    elif isinstance(values, (dict, list, tuple)) and depth:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _held(value, kind, f"{name}.{key}" if name else str(key), depth - 1)


def _tensors(net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers()]


def _initial_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rates of the groups of an optimizer, before any schedule."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dictionaries have the same keys and values."""
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)


def unwrap(net: nn.Module) -> nn.Module:
    """The network inside a wrapper for several GPUs."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return net.module if isinstance(net, wrappers) else net
