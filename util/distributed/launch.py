"""`--gpu_ids 0,1,2,3` without torchrun: starts the program once for each GPU, as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from util.errors import UserError

from . import devices
from .ranks import launched


def one_process_per_gpu(options: Any) -> None:
    """With several --gpu_ids, run this program once for each GPU and exit with their exit code.

    `--batch_size` is the total batch size. Exits with code 2 if it can't be divided evenly, or a
    GPU does not exist. Does nothing for one GPU, or under torchrun.
    """
    if launched():
        return
    opt = options.gather_options()
    try:
        ids = devices.parse_gpu_ids(opt.gpu_ids)
        if len(ids) < 2:
            return
        devices.check_gpus(opt.gpu_ids, ids)
        if len(set(ids)) < len(ids):
            raise UserError(f"--gpu_ids {opt.gpu_ids} names a GPU twice: name each once")
        if opt.batch_size % len(ids):
            raise UserError(
                f"--batch_size {opt.batch_size} can't be divided evenly among {len(ids)} GPUs: "
                "without torchrun it is the total batch size, so choose a multiple of "
                f"{len(ids)}"
            )
    except UserError as e:
        options.parser.error(str(e))
    # these override the same options in argv
    more = [f"--batch_size={opt.batch_size // len(ids)}"]
    if opt.suffix:  # filled in here, where {batch_size} is still the total
        more += [f"--name={options.name_with_suffix(opt)}", "--suffix="]
    sys.exit(launch(len(ids), [*sys.argv, *more]))


def launch(processes: int, argv: Sequence[str]) -> int:
    """Run a Python program, `argv[0]` with its arguments, in several processes on this machine.

    Returns the exit code: 0, or that of the process that failed first. Ctrl-C and SIGTERM go to all
    of them; they save and stop together.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch would log a traceback for an error that the program has reported in one line
    logging.disable(logging.CRITICAL)  # this process does nothing but wait for the others
    # processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *argv)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: process {rank} was killed by {name}, so all were stopped; resume with "
            "--continue_train",
            file=sys.stderr,
        )
        return 128 - failure.exitcode
    except SignalException as e:
        return 128 + int(e.sigval)
    return 0
