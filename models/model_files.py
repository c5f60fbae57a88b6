"""What a model holds, and how it is saved to files and loaded."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from util import distributed
from util.errors import UserError, first_line, warn
from util.files import TextPath
from util.run import checkpoint, weight_files

from . import attributes, ema, training_state
from .attributes import unwrap
from .schedulers import MeanLoss, rebase, sets_rates
from .speed.steps import Steps, parameters_of
from .weights import explain_mismatch, fit_state_dict, other_model, other_options

T = TypeVar("T")


class ModelFiles:
    """The part of `BaseModel` that finds networks and optimizers, and saves and loads them."""

    # the entries of `training_state` that differ between ranks
    PER_RANK_STATE = ("parts", "metric", "gradients", "plain")

    opt: argparse.Namespace
    isTrain: bool
    device: torch.device
    save_dir: TextPath
    model_names: list[str]
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]
    resumed: checkpoint.FoundCheckpoint | None
    _steps: Steps
    _averages: dict[str, ema.WeightAverage]
    _changes: Callable[[], dict[str, Any]]
    _mean_loss: MeanLoss

    def networks(self) -> dict[str, nn.Module]:
        """The networks by their names in `model_names`."""
        return {n: getattr(self, "net" + n) for n in self.model_names if isinstance(n, str)}

    def all_modules(self) -> dict[str, nn.Module]:
        """All modules in attributes, also within lists, dictionaries and plain objects, by name."""
        return dict(attributes.find_all(vars(self), nn.Module))

    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those in `optimizers`, then others that attributes hold, then those that these wrap."""
        outer = [*self.optimizers, *self.find_all(torch.optim.Optimizer)]
        inner = [x for o in outer for x in vars(o).values() if isinstance(x, torch.optim.Optimizer)]
        return list(dict.fromkeys([*outer, *inner]))

    def find_all(self, kind: type[T]) -> list[T]:
        """All objects of a class that attributes hold."""
        return [value for _, value in attributes.find_all(vars(self), kind)]

    def trained_tensors(self) -> list[torch.Tensor]:
        """Parameters and buffers of all modules, and other tensors that an optimizer trains."""
        of_modules = (t for net in self.all_modules().values() for t in attributes.tensors(net))
        return list(dict.fromkeys([*of_modules, *self.stepped_tensors()]))

    def stepped_tensors(self) -> list[torch.Tensor]:
        """The parameters of all optimizers."""
        return list(dict.fromkeys(p for o in self.all_optimizers() for p in parameters_of(o)))

    def load_suffix(self) -> str:
        """The prefix of the files to load: `iter_N` with `--load_iter`, else `--epoch`."""
        return f"iter_{self.opt.load_iter}" if self.opt.load_iter > 0 else str(self.opt.epoch)

    # ------------------------------------------------------------------------------------- weights
    def network_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state dictionaries of all networks by name, without `module.` prefixes."""
        # contiguous, so that files do not depend on --channels_last
        return {
            name: {k: v.detach().contiguous() for k, v in unwrap(net).state_dict().items()}
            for name, net in self.networks().items()
        }

    def save_networks(self, epoch: int | str) -> None:
        """Write the state dictionary of each network to `<epoch>_net_<name>.pth`, on rank 0.

        With `--ema`, also writes its average, to `<epoch>_net_<name>_ema.pth`.
        """
        if not distributed.is_main():  # a custom training loop may call this on all ranks
            return
        for name, state in self.network_states().items():
            weight_files.save_file(state, self.save_dir / f"{epoch}_net_{name}.pth")

    def _save_averages_too(self) -> None:
        """Make `save_networks`, even a model's own, write the averages too."""
        save_networks = self.save_networks

        def save(epoch: int | str) -> None:
            save_networks(epoch)
            for name, average in self._averages.items() if distributed.is_main() else ():
                path = ema.average_path(self.save_dir, str(epoch), name)
                if average.steps:
                    weight_files.save_file(average.weights(), path)
                else:  # no optimizer steps this network: the model may average it itself
                    path.unlink(missing_ok=True)

        self.save_networks = save

    def weights_file(self, epoch: int | str, name: str) -> Path:
        """The file from which testing reads a network, according to `--weights`."""
        weights = getattr(self.opt, "weights", "auto")  # training does not have this option
        return ema.choose_weights(self.save_dir, str(epoch), name, weights)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[bool]:
        """Context manager: networks have their averaged weights; yields whether there are any."""
        nets = self.networks()
        with contextlib.ExitStack() as stack:
            for name, average in self._averages.items():
                if average.steps:
                    stack.enter_context(average.applied_to(unwrap(nets[name])))
            yield any(average.steps for average in self._averages.values())

    def load_networks(self, epoch: int | str) -> None:
        """Load the networks that `save_networks`, or the original code, wrote.

        In testing, `--weights` chooses between these and averaged ones. Raises UserError if a file
        is missing, can't be read, or does not fit; then no network has changed.
        """
        weights = {}
        for name in self.networks():
            path = self.save_dir / f"{epoch}_net_{name}.pth"
            try:
                path = path if self.isTrain else self.weights_file(epoch, name)
                weights[name] = path, weight_files.load_weights(path, self.device)
            except UserError as e:
                raise UserError(f"{e}{other_model(self.opt, self.save_dir)}") from e
        self._load_weights(weights)
        for path, _ in weights.values():
            print(f"loading the model from {path}")

    def _load_weights(self, weights: dict[str, tuple[Path, dict[str, torch.Tensor]]]) -> None:
        """Load each network's weights, given as (file, state dictionary) by name; all or none."""
        fitted = {}
        for name, (path, state) in weights.items():
            net = unwrap(self.networks()[name])
            fitted[name] = fit_state_dict(state, net)
            problem = explain_mismatch(name, fitted[name], net)
            if problem:
                hint = other_model(self.opt, self.save_dir)
                hint = hint or other_options(self.opt, self.save_dir)
                raise UserError(f"the weights in {path} do not fit: {problem}{hint}")
        for name, state in fitted.items():
            net = unwrap(self.networks()[name])
            net.load_state_dict(state)
            if name in self._averages:
                self._averages[name].restart(net)

    # ---------------------------------------------------------------------- the state of training
    def load_saved(self, opt: argparse.Namespace) -> None:
        """Find the checkpoint to resume from, and load its weights.

        Raises UserError if that replaces a network that an optimizer trains.
        """
        before = self._weights_by_module()
        newest = opt.epoch == "latest" and opt.load_iter == 0
        suffix = None if newest else self.load_suffix()
        self.resumed = checkpoint.find_checkpoint(self.save_dir, self.networks(), suffix)
        if self.resumed is not None and self.resumed.state is not None:
            self._load_checkpoint(self.resumed, self.resumed.state.pop("weights"))
        elif self.resumed is not None:
            self.load_networks(self.resumed.suffix)
        elif suffix is not None:
            self.load_networks(suffix)  # raises an error that lists the saved ones
        now = self._weights_by_module()
        replaced = {p for name in before.keys() & now for p in before[name]}
        replaced -= {p for own in now.values() for p in own}
        if replaced and not replaced.isdisjoint(self.stepped_tensors()):
            raise UserError(
                f"load_networks of {type(self).__name__} replaces a network, and an optimizer goes "
                "on with the weights of the old one: load the weights into the network instead"
            )

    def _weights_by_module(self) -> dict[str, list[nn.Parameter]]:
        return {name: list(net.parameters()) for name, net in self.all_modules().items()}

    def _loads_more(self) -> bool:
        """Whether a model has a `load_networks` of its own, which may read more than weights."""
        return type(self).load_networks is not ModelFiles.load_networks

    def load_on_other_ranks(self, suffix: str) -> None:
        """Call a model's own `load_networks` for what else it reads; weights are broadcast."""
        if not suffix or distributed.is_source() or not self._loads_more():
            return
        try:
            self.load_networks(suffix)
        except (UserError, OSError) as e:  # the files may be on another machine
            warn(
                f"load_networks of this model fails here ({first_line(e)}): only weights are loaded"
            )

    def _load_checkpoint(self, found: checkpoint.FoundCheckpoint, weights: dict[str, Any]) -> None:
        """Load the weights of a training state; warn if the exported files have different ones."""
        path = checkpoint.state_path(self.save_dir, found.suffix)
        own = {name: (path, weights[name]) for name in self.networks()}
        self._load_weights(own)
        try:
            self.load_networks(found.suffix)  # in a subclass it may load more than networks
            exported = self.network_states()
            other = [name for name in own if not _equal(exported[name], weights[name])]
            reason = f"the files of {', '.join(other)} have other weights" if other else ""
        except Exception as e:  # whatever the code of a user's model raises
            reason = first_line(e)
        if reason and (self._loads_more() or not found.unfinished):
            warn(f"{reason}; training goes on from {path}: delete it to start from weights alone")
        if reason:
            self._load_weights(own)

    def watch_attributes(self) -> None:
        """Make `training_state` include numbers and tensors in attributes that change from now."""
        before = training_state.plain_values(self)
        # held by a closure, since attributes are searched for tensors
        self._changes = lambda: training_state.changes(before, training_state.plain_values(self))

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights: plain values and tensors.

        Optimizers, schedules, modules that are not in `model_names`, each attribute that has a
        `state_dict`, such as an image pool, and numbers and tensors that have changed since
        `watch_attributes`. A model with more to save extends this method and
        `load_training_state`.
        """
        own = training_state.collect(self, self._steps)
        return {**own, "plain": self._changes(), "metric": list(self._mean_loss.values())}

    def load_training_state(self, state: dict[str, Any], options: dict[str, Any]) -> None:
        """Load what `training_state` returned in a run with these options.

        If `--lr` or the number of epochs has changed since, learning rates follow the new values.
        """
        averaged = options["ema"]
        if averaged and not self.opt.ema:
            print(f"--ema 0: the averages so far (--ema {averaged:g}) end here")
        elif self.opt.ema and not averaged:
            print(f"--ema {self.opt.ema:g}: averages start from the current weights")
        rates = [initial_rates(o) for o in self.optimizers]
        training_state.restore(self, state, self._steps, options)
        training_state.restore_plain(self, state["plain"], options)
        self._mean_loss = MeanLoss(*state["metric"])
        schedule = ("lr", "lr_policy", "n_epochs", "n_epochs_decay", "lr_decay_iters")
        changed = any(getattr(self.opt, k) != options[k] for k in schedule)
        if changed or rates != [initial_rates(o) for o in self.optimizers]:
            saved = zip(state["schedulers"], state["optimizers"], strict=False)
            followed = [sets_rates(*pair) for pair in saved]
            policy, lr = options["lr_policy"], options["lr"]
            rebase(self.schedulers, self.opt, rates, policy, lr, followed)

    @staticmethod
    def reshard_state(states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """Reshard `PER_RANK_STATE`, one entry for each saved rank, for a new world size."""
        return training_state.reshard(states, world_size)


def initial_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each parameter group, before any schedule."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dictionaries have the same keys and values."""
    return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)
