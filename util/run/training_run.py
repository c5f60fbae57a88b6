"""One training run: what has to be saved to go on exactly, when to stop, and who may train."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from util import distributed, randomness
from util.errors import UserError, first_line, warn

from . import checkpoint
from .checkpoint import FoundSet, Position
from .finite import FiniteGuard
from .stopping import ExperimentLock, StopRequest

# Options on which it depends how much processes exchange, and when. With different ones they would
# misunderstand each other, or each wait for something else.
ALIKE = (
    "batch_size accumulate model netG netD ngf ndf n_layers_D norm gan_mode lambda_gp "
    "lambda_identity print_freq display_freq save_latest_freq save_epoch_freq val_freq max_hours "
    "on_nan lr_policy"
).split()


class TrainingRun:
    """Saves and restores a run, holds its lock, and knows whether it should stop.

    Use it in a `with` block around the training loop. Of several processes only the first one
    writes files. The others send it what is their own, and get that back from the one that reads.
    """

    def __init__(self, opt: argparse.Namespace, model: Any, dataset: Any):
        self.opt, self.model, self.dataset = opt, model, dataset
        self.folder = Path(opt.checkpoints_dir) / opt.name
        self.id = ""
        self.lock = ExperimentLock(self.folder)
        self.stop = StopRequest(opt.max_hours)
        self.guard = FiniteGuard(model, opt.on_nan)
        self.failed: list[str] = []  # what went wrong in the last save

    def __enter__(self) -> TrainingRun:
        if distributed.is_main():
            self.lock.acquire()
        self.stop.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.guard.close()
        self.dataset.close()
        self.lock.release()
        self.stop.uninstall()

    # ------------------------------------------------------------------------------------- resuming
    def resume(self) -> Position:
        """Take up what the experiment has, as `--continue_train` asks, and say from where."""
        self._check_alike()
        found = self._found() if distributed.is_source() else None
        self.model.share_weights()
        if not distributed.is_main():
            # before anything is drawn in training, after networks were drawn alike
            self._draw_apart(0)
        self.id, suffix = distributed.broadcast_object(
            (self.id, found.suffix if found else ""), src=distributed.source_rank()
        )
        state = self._own_part(found.state if found else None)
        if state is None:
            distributed.save_run_id(self.id)
            return self._from_epoch_count()
        try:
            self._restore(state)
        except Exception as e:  # the files are whole, but not what this program writes
            path = checkpoint.state_path(self.folder, suffix)
            raise UserError(
                f"{path} does not fit this training ({type(e).__name__}: {first_line(e)}): give "
                "the options that it was saved with, or delete it to go on from weights alone"
            ) from e
        distributed.save_run_id(self.id)
        position = Position(**{k: state[k] for k in ("epoch", "epoch_iter", "total_iters")})
        print(
            f"resuming from '{suffix}': epoch {position.epoch}, {position.epoch_iter} images "
            f"into it, {position.total_iters} in all"
        )
        return position

    def _check_alike(self) -> None:
        """Raise UserError where this process would exchange something else than the first one."""
        opt = self.opt
        own = {"pictures": len(self.dataset), "epochs": opt.n_epochs + opt.n_epochs_decay}
        own |= {f"--{name}": getattr(opt, name, None) for name in ALIKE}
        wanted = distributed.broadcast_object(own)
        for name in own:
            if own[name] != wanted[name]:
                raise UserError(
                    f"{name}: {own[name]} here, {wanted[name]} in the first process: all machines "
                    "need the same pictures and the same options"
                )

    def _found(self) -> FoundSet | None:
        """What there is to go on from, and say so where that is not a whole set."""
        opt = self.opt
        self.id = checkpoint.new_run(self.folder)
        if not opt.continue_train:
            _set_aside(self.folder)
            return None
        found: FoundSet | None = self.model.resumed
        if checkpoint.tokens(self.folder) != (found.there if found else {}):
            # another training had the lock until a moment ago, and saved as it stopped
            self.model.load_saved(opt)
            found = self.model.resumed
        if found is None:
            print(f"--continue_train: nothing is saved in {self.folder} yet, so this starts anew")
            return None
        for reason in found.skipped:
            warn(f"a save is not whole and is passed over: {reason}")
        if found.state is None:
            print(
                f"resuming from the weights '{found.suffix}' alone: optimizers, image pools, "
                "random state and position were not saved with them; this is epoch "
                f"{opt.epoch_count} (--epoch_count)"
            )
        return found

    def _own_part(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The training state as it is to be in this process, from that which the first has read."""
        size = distributed.world_size()
        if size == 1 and (state is None or state.get("processes", 1) == 1):
            return state
        parts: list[Any] = [None] * size
        common = None
        if state is not None:
            common = {k: v for k, v in state.items() if k not in ("ranks", "random")}
            own = [{"random": state["random"], "model": state["model"]}, *state.get("ranks", [])]
            if len(own) == size:
                parts = own
            else:
                models = self.model.reshard_state([part["model"] for part in own], size)
                parts = [{"model": model} for model in models]
            keys = self.model.PER_RANK_STATE
            parts = [
                {**part, "model": {k: part["model"][k] for k in keys if k in part["model"]}}
                for part in parts
            ]
        common, part = (
            distributed.broadcast_object(common, src=distributed.source_rank()),
            distributed.scatter_object(parts, src=distributed.source_rank()),
        )
        if common is None:
            return None
        return {**common, **part, "model": {**common["model"], **part["model"]}}

    def _draw_apart(self, images: int) -> None:
        """Seed what this process draws in training so that no other one draws the same."""
        own = randomness.derived_seed(self.opt.seed, distributed.rank(), images)
        randomness.seed_everything(own, self.opt.deterministic)

    def _from_epoch_count(self) -> Position:
        self.model.fast_forward_schedules()
        return Position(epoch=self.opt.epoch_count)

    def _restore(self, state: dict[str, Any]) -> None:
        opt, saved = self.opt, state["options"]
        if opt.epoch_count not in (1, saved["epoch_count"], state["epoch"]):
            warn(
                f"--epoch_count {opt.epoch_count} does not count here: the saved state says that "
                f"this is epoch {state['epoch']}"
            )
        size = len(self.dataset)
        if (saved_size := state.get("epoch_size", size)) != size:
            warn(
                f"there are {size} pictures in an epoch now, {saved_size} when this was saved: the "
                "order is another one from here on"
            )
        # the schedule was made with it
        opt.epoch_count = saved["epoch_count"]
        opt.seed = self.dataset.seed = state["seed"]
        self.model.load_training_state(state["model"], saved)
        if "random" in state:
            randomness.set_state(state["random"])
        else:
            print(
                f"number of processes: {state.get('processes', 1)} when this was saved, "
                f"{distributed.world_size()} now; image pools are resharded, and what is "
                "drawn at random is different from here on"
            )
            self._draw_apart(state["total_iters"])
        # to go back to an earlier save starts another branch, which later resumes must find first
        if opt.load_iter == 0 and opt.epoch == "latest":
            self.id = state["run"]

    # --------------------------------------------------------------------------------------- saving
    def save(self, *suffixes: str, position: Position) -> None:
        """Save the networks and the state under each suffix.

        A write that fails leaves the older save as it is and is only reported; the next save tries
        again. Raises UserError where losses or gradients have stopped to be finite.
        """
        self.guard.check()
        state = self._state(position)
        if not distributed.is_main():
            return
        self.failed = []
        for suffix in suffixes:
            start = time.perf_counter()
            try:
                checkpoint.save_set(self.folder, suffix, self.model.network_states(), state)
            except (OSError, RuntimeError, MemoryError) as e:
                reason = getattr(e, "strerror", None) or first_line(e)
                failed = f"saving '{suffix}' in {self.folder} failed: {reason}"
                self.failed.append(failed)
                warn(f"{failed}; the older save is as it was, the next one tries again")
                continue
            if self.opt.verbose:
                print(f"saved '{suffix}' in {time.perf_counter() - start:.2f} s")
        try:
            checkpoint.prune_states(self.folder, self.opt.keep_states)
        except OSError as e:
            warn(f"an old training state can't be deleted: {e}")

    def _state(self, position: Position) -> dict[str, Any]:
        plain = (str, int, float, bool, type(None), list)
        options = {k: v for k, v in vars(self.opt).items() if isinstance(v, plain)}
        state = {
            "run": self.id,
            **vars(position),
            "epoch_size": len(self.dataset),
            "seed": self.opt.seed,
            "random": randomness.get_state(),
            "model": self.model.training_state(),
            "options": options,
        }
        if distributed.world_size() > 1:
            model = {k: state["model"][k] for k in self.model.PER_RANK_STATE}
            ranks = distributed.gather_object({"random": state["random"], "model": model})
            state |= {"processes": distributed.world_size(), "ranks": ranks[1:]}
        return state

    def finish(self) -> None:
        """At the very end: raises UserError where the last save failed.

        Waits for all processes: while one is saving, torchrun would take the end of another amiss.
        """
        distributed.async_max.wait()
        self.failed = distributed.broadcast_object(self.failed)
        distributed.barrier()
        if self.failed:
            raise UserError(
                f"the training is over, but {'; '.join(self.failed)}; --continue_train goes on "
                "from the older save"
            )


def _set_aside(folder: Path) -> None:
    """Move the weights and states of an earlier training under this name to a folder of their own.

    Beside those of the new one, `10_net_G.pth` of the old would pass for its tenth epoch.
    """
    weights = list(folder.glob("*_net_*.pth"))
    if not weights:
        return
    age = int(max(path.stat().st_mtime for path in weights))
    while (aside := folder / f"earlier.{age}").exists():
        age += 1
    aside.mkdir()
    best = folder / "best_scores.json"
    options = folder / "train_opt.txt"
    if options.exists():
        shutil.copy2(options, aside)
    for path in [*weights, *folder.glob("*_train_state.pth"), *([best] if best.exists() else [])]:
        os.replace(path, aside / path.name)
    print(
        f"the weights of an earlier training under this name were moved to {aside} "
        "(--continue_train goes on with a training instead)"
    )


__all__ = ["Position", "TrainingRun"]
