"""One training run: resuming and saving, with its lock, stop request and check for NaN."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from util import distributed, randomness
from util.errors import UserError, first_line, say, warn
from util.files import backup_path

from . import checkpoint, weight_files
from .checkpoint import FoundCheckpoint
from .finite import FiniteGuard
from .position import Position
from .saved_options import experiment_folder, write_saved_options
from .stopping import ExperimentLock, StopRequest


class TrainingRun:
    """Resumes and saves a run, holds its lock, and knows whether it should stop.

    A context manager around the setup of the model and the training loop. Rank 0 writes the files.
    The other ranks send it their part of the state, and get it back when a run is resumed.
    """

    def __init__(self, opt: argparse.Namespace, model: Any, dataset: Any):
        self.opt, self.model, self.dataset = opt, model, dataset
        self.folder = experiment_folder(opt)
        self.id = ""
        self.lock = ExperimentLock(self.folder)
        self.stop = StopRequest(opt.max_hours)
        self.failed: str | None = None  # why the last save failed
        self.compared_untrained = False
        self.optimized: list[list[int]] | None = None  # see `_optimized`, at the start
        self.begun = False
        self.outdated: str | None = None  # suffix of saves to set aside: "*" (all) or "best"

    @functools.cached_property
    def guard(self) -> FiniteGuard:
        """The check for NaN, created once the model is set up."""
        return FiniteGuard(self.model, self.opt.on_nan)

    def __enter__(self) -> TrainingRun:
        if distributed.is_main():
            self.lock.acquire()
        self.stop.install()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if "guard" in vars(self):  # otherwise the setup has failed
            self.guard.close()
        self.dataset.close()
        self.lock.release()
        self.stop.uninstall()
        if error is not None and self.stop.exit_code and distributed.lost_another(error):
            sys.exit(self.stop.exit_code)  # torchrun ends all since one has failed, and reports it

    # ------------------------------------------------------------------------------------- resuming
    def resume(self) -> Position:
        """Restore a checkpoint with `--continue_train`; returns and prints the position.

        Raises UserError if the ranks have different images, or the state does not fit.
        """
        self._check_same_images()
        self._check_setup()
        self.model.watch_attributes()
        self.optimized = self._optimized()
        source = distributed.source_rank()
        found = self._loaded_checkpoint() if distributed.is_source() else None
        facts = (self.id, found.suffix if found else "", found is not None and found.unfinished)
        self.id, name, unfinished = distributed.broadcast_object(facts, src=source)
        self.model.load_on_other_ranks(name)
        self.model.broadcast_weights()
        if not distributed.is_main():
            # the initial weights are the same on all ranks; from here on random numbers differ
            self._seed_rank(0)
        state = self._state_of_rank(found.state if found else None)
        self.model.resumed = found = None  # frees the memory
        if state is None:
            position = Position(epoch=self.opt.epoch_count)
        else:
            position = self._restore(state, name)
            print(
                f"resuming from '{name}': epoch {position.epoch}, {position.epoch_iter} images "
                f"into it, {position.total_iters} in all"
            )
        if unfinished and state is not None:
            print("the last checkpoint was interrupted: saving it again")
            self.save(*state["suffixes"], position=position)
        return position

    def _check_same_images(self) -> None:
        """Raise UserError if this rank has another number of images than rank 0."""
        own = len(self.dataset)
        if own != (wanted := distributed.broadcast_object(own)):
            raise UserError(
                f"images: {own} here, {wanted} in the first process: all machines need the same"
            )

    def _check_setup(self) -> None:
        """Warn of what does not work if the model's `setup` does not call that of BaseModel.

        Raises UserError instead if training is to be resumed.
        """
        if not self.model.is_set_up:
            text = (
                f"setup() of --model {self.opt.model} does not call BaseModel.setup(self, opt), so "
                "--precision, --compile, --ema, --diffaug and --spectral_norm do nothing, and "
                "--continue_train does not work"
            )
            if self.opt.continue_train:
                raise UserError(text)
            warn(text)

    def _loaded_checkpoint(self) -> FoundCheckpoint | None:
        """The checkpoint that the model has loaded; prints what could not be restored."""
        opt = self.opt
        self.id = checkpoint.new_run(self.folder)
        if not opt.continue_train:
            self.outdated = "*"
            if distributed.launched() and checkpoint.saved_suffixes(self.folder):
                # torchrun may restart this before `begin`; the disk may be full
                with contextlib.suppress(OSError):
                    (self.folder / checkpoint.EARLIER).touch()
            return None
        found: FoundCheckpoint | None = self.model.resumed
        if found is None:  # a model's own load_networks may pass over missing files
            raise UserError(
                f"--continue_train: {self.folder} has no save '{self.model.load_suffix()}': choose "
                "another --epoch or --load_iter"
            )
        for reason in found.skipped:
            warn(f"skipping a damaged checkpoint: {reason}")
        if found.state is None:
            print(
                f"resuming from the weights '{found.suffix}' alone: optimizers, image pools, "
                "random state and position were not saved with them; this is epoch "
                f"{opt.epoch_count} (--epoch_count)"
            )
            if found.suffix != "best":
                self.outdated = "best"
        return found

    def begin(self, open_views: Callable[[Callable[[], None]], None], options: str) -> None:
        """Take over the folder for this training, on the first call.

        Sets aside saves of an earlier training, through `open_views`, and writes `options` to
        `train_opt.txt`. The first call comes after the first iteration, so that a command that
        can't train leaves an earlier training under this name untouched.
        """
        if self.begun:
            return
        self.begun = True
        open_views(functools.partial(_set_aside, self.folder, self.outdated))
        if distributed.is_main():
            (self.folder / checkpoint.EARLIER).unlink(missing_ok=True)
            write_saved_options(self.folder, options)

    def batches(self, loaded: Iterable[Any], position: Position) -> Iterator[Any]:
        """Yield batches; if loading one fails, save what was learned, then raise the error.

        With several processes nothing is saved, since the other ranks can't take part in a save.
        """
        try:
            yield from loaded
        except Exception:
            if self.begun and distributed.world_size() == 1:
                say(f"loading failed: saving the latest model (total_iters {position.total_iters})")
                self.save("latest", position=position)
            raise

    def _state_of_rank(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The training state for this rank, from the state that the source rank has read."""
        size, source = distributed.world_size(), distributed.source_rank()
        parts: list[Any] = [None] * size
        if state is not None:
            first = {"random": state.pop("random"), "model": state["model"]}
            parts = [first, *state.pop("ranks", [])]
            if len(parts) != size:
                models = self.model.reshard_state([part["model"] for part in parts], size)
                parts = [{"model": model} for model in models]
            for part in parts:
                own = part["model"]
                part["model"] = {k: own[k] for k in self.model.PER_RANK_STATE if k in own}
        state = distributed.broadcast_object(state, src=source)
        part = distributed.scatter_object(parts, src=source)
        return None if state is None else {**state, **part, "model": state["model"] | part["model"]}

    def _seed_rank(self, images: int) -> None:
        """Seed the random number generators of this rank; each rank gets its own seed."""
        seed = randomness.derived_seed(self.opt.seed, distributed.rank(), images)
        randomness.seed_everything(seed, self.opt.deterministic)

    def _restore(self, state: dict[str, Any], name: str) -> Position:
        try:
            return self._restore_state(state)
        except Exception as e:  # the file is whole, but its content does not fit
            path = checkpoint.state_path(self.folder, name)
            model = state["options"].get("model", self.opt.model)
            lacking = f"--model {model}" if model != self.opt.model else "the options"
            raise UserError(
                f"{path} does not fit this training ({type(e).__name__}: {first_line(e)}): give "
                f"{lacking} that it was saved with, or delete it to go on from weights alone"
            ) from e

    def _restore_state(self, state: dict[str, Any]) -> Position:
        opt, saved = self.opt, state["options"]
        if opt.epoch_count not in (1, saved["epoch_count"], state["epoch"]):
            warn(
                f"--epoch_count {opt.epoch_count} is ignored: the checkpoint says that this is "
                f"epoch {state['epoch']}"
            )
        if opt.seed != state["seed"]:
            warn(f"--seed {opt.seed} is ignored: this training goes on with {state['seed']}")
        size = len(self.dataset)
        if (saved_size := state["epoch_size"]) != size:
            warn(
                f"there are {size} images in an epoch now, {saved_size} when this was saved: the "
                "order differs from here on"
            )
        # schedules count from epoch_count
        opt.epoch_count = saved["epoch_count"]
        opt.seed = self.dataset.seed = state["seed"]
        self.model.load_training_state(state["model"], saved)
        if "random" in state:
            randomness.set_state(state["random"])
        else:
            print(
                f"number of processes: {state.get('processes', 1)} when this was saved, "
                f"{distributed.world_size()} now; image pools are resharded, and random numbers "
                "differ from here on"
            )
            self._seed_rank(state["total_iters"])
        # going back to an earlier checkpoint begins a new run, which is then the newest
        if opt.load_iter == 0 and opt.epoch == "latest":
            self.id = state["run"]
        return Position.from_state(state)

    # --------------------------------------------------------------------------------------- saving
    def save(self, *suffixes: str, position: Position) -> None:
        """Save a checkpoint under each suffix; all ranks have to call this.

        If writing fails, a warning says so, the older checkpoint stays, and the next save tries
        again. Raises UserError if weights are not finite, or not the same on all ranks.
        """
        self.guard.check()
        if not distributed.same_on_all_ranks(self.model.stepped_tensors()):
            raise UserError(
                "the weights have diverged between processes, so nothing is saved: with "
                "several processes a model may change weights only by steps of torch.optim "
                "optimizers, the same steps in all processes"
            )
        self._compare_untrained()
        state = self._state(position)
        if not distributed.is_main():
            return
        if self.optimized not in (None, self._optimized()):
            self.optimized = self._optimized()
            warn(
                "the model has made an optimizer, or given it more weights, since training began: "
                "--continue_train will not fit this save; make optimizers in __init__ with all "
                "their weights, and freeze those that learn later (set_requires_grad)"
            )
        self.failed = None
        start = time.perf_counter()
        names = ", ".join(f"'{suffix}'" for suffix in suffixes)
        try:
            with distributed.local_norms():  # a model may compute a sample
                checkpoint.save_checkpoint(self.folder, suffixes, state, self.model.save_networks)
        except (OSError, RuntimeError, MemoryError) as e:
            reason = getattr(e, "strerror", None) or first_line(e)
            self.failed = f"saving {names} in {self.folder} failed: {reason}"
            warn(f"{self.failed}; the older save is kept until the next one succeeds")
            return
        if self.opt.verbose:
            print(f"saved {names} in {time.perf_counter() - start:.2f} s")
        try:
            checkpoint.prune_states(self.folder, self.opt.keep_states)
        except OSError as e:
            warn(f"an old training state can't be deleted: {e}")

    def _optimized(self) -> list[list[int]]:
        """How many weights each group of each optimizer has."""
        groups = (o.param_groups for o in self.model.all_optimizers())
        return [[len(group["params"]) for group in own] for own in groups]

    def _compare_untrained(self) -> None:
        """In the first save, warn of tensors that no optimizer steps and that differ by rank."""
        if self.compared_untrained:
            return
        self.compared_untrained = True
        stepped = set(self.model.stepped_tensors())
        tensors = {
            f"{name}.{key}": tensor
            for name, net in self.model.all_modules().items()
            for key, tensor in (*net.named_buffers(), *net.named_parameters())
            if tensor.is_floating_point() and tensor not in stepped
        }
        own = [k for k, t in tensors.items() if not distributed.same_on_all_ranks([t])]
        if own and distributed.is_main():
            warn(
                f"{own[0]} (and {len(own) - 1} more that no optimizer steps) differs between "
                "processes, and the first process's value is saved: average it where it is updated"
            )

    def _state(self, position: Position) -> dict[str, Any]:
        plain = (str, int, float, bool, type(None), list)
        options = {k: v for k, v in vars(self.opt).items() if isinstance(v, plain)}
        state = {
            "run": self.id,
            **vars(position),
            "epoch_size": len(self.dataset),
            "seed": self.opt.seed,
            "random": randomness.get_state(),
            "weights": self.model.network_states(),
            "model": self.model.training_state(),
            "options": options,
        }
        if distributed.world_size() > 1:
            model = {k: state["model"][k] for k in self.model.PER_RANK_STATE}
            ranks = distributed.gather_object({"random": state["random"], "model": model})
            state |= {"processes": distributed.world_size(), "ranks": ranks[1:]}
        return state

    def finish(self) -> None:
        """Wait for all ranks at the end of training; raises UserError if the last save failed.

        If one rank ended while another is still saving, torchrun would kill the one that saves.
        """
        self.failed = distributed.broadcast_object(self.failed)
        distributed.barrier()
        if self.failed:
            raise UserError(
                f"the training is over, but {self.failed}; --continue_train goes on from an older "
                "save, if there is one"
            )


def _set_aside(folder: Path, which: str | None) -> None:
    """Move saves of an earlier training (`which`: "*", "best" or None) to another folder.

    Otherwise an old `10_net_G.pth` would look like the tenth epoch of the new training.
    """
    endings = "net_*.pth", f"{weight_files.STATE}.pth"
    files = [path for end in endings if which for path in folder.glob(f"{which}_{end}")]
    if not files:
        return
    earlier = backup_path(folder / "earlier")
    best = folder / "best_scores.json"
    options = folder / "train_opt.txt"
    try:
        earlier.mkdir()
        if options.exists():
            shutil.copy2(options, earlier)
        for path in [*files, *([best] if best.exists() else [])]:
            os.replace(path, earlier / path.name)
    except OSError as e:
        raise UserError(
            f"the weights of an earlier training can't be moved to {earlier}: {e.strerror or e}"
        ) from e
    what = "best weights so far" if which == "best" else "weights of an earlier training"
    resumable = any(path.name.endswith(f"{weight_files.STATE}.pth") for path in files)
    hint = " (--continue_train goes on with a training instead)" if resumable else ""
    say(f"the {what} under this name were moved to {earlier}{hint}")
