"""Translate images with a trained model, and write a page of results.

    python test.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan
    python test.py --dataroot ./datasets/maps/testA --name maps_cyclegan --model test
    python test.py --dataroot ./photos --name maps_cyclegan --model test --only_outputs
    torchrun --nproc_per_node=4 test.py ...    (four GPUs, each with a share of the images)

Results go to `<results_dir>/<name>/<phase>_<epoch>/index.html`; with `--only_outputs`, there is no
page, and the folder gets the images under the names of the inputs. See options/ for all options.
"""

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import create_dataset, equal_batches
from data.base_dataset import reader
from data.image_folder import folder_of, list_pictures
from models.base_model import BaseModel
from models.inference.folder import FolderTranslation
from models.inference.image_threads import batch_limits, encoding_threads
from models.inference.testing import model_for_testing
from models.inference.tiles import TileOptions
from models.inference.translator import Translator
from models.speed.inspection import independent_of_batch
from models.speed.iterations import says_recordable
from options.test_options import TestOptions
from util import distributed
from util.background import BackgroundWork
from util.display import wandb_logger
from util.errors import UserError, one_line_errors, unwind_on_sigterm, warn
from util.files import make_writable, mark_as_results
from util.html import HTML
from util.picture_files import UNREADABLE
from util.result_names import ResultNames, results_folder
from util.run.saved_options import experiment_folder
from util.visualizer import write_visuals

Row = tuple[int, str, list[str], list[str]]  # of a page: number, name, files and their labels


def main() -> None:
    options = TestOptions()
    opt = options.parse(save=False)
    opt.serial_batches = True  # A and B in the order of their names
    opt.no_flip = True
    paths = list_pictures(opt.dataroot) if opt.only_outputs else []
    dataset = None if opt.only_outputs else create_dataset(opt, batch_size=1)
    count = len(paths) if dataset is None else len(dataset)
    options.decide_compile(opt, int(min(opt.num_test, count)))
    model = model_for_testing(opt, in_threads=True)

    web_dir = results_folder(opt)
    make_writable(web_dir, "--results_dir")
    if opt.only_outputs and web_dir.samefile(folder_of(opt.dataroot)):
        raise UserError(
            f"--dataroot {opt.dataroot} is where results are written, which would replace its "
            "images: choose another --results_dir"
        )
    if distributed.is_main():
        for note in options.notes(opt, web_dir):
            warn(note)
    options.save(opt)
    if dataset is None:
        translate_files(opt, model, paths, web_dir)
    else:
        try:
            # closed after an error too, or worker processes would be left behind
            with contextlib.closing(dataset):
                write_page(
                    opt, model, dataset, web_dir, f"Phase = {opt.phase}, Epoch = {opt.epoch}"
                )
        except BrokenPipeError:  # as after `| head`
            raise
        except OSError as e:
            file = e.filename2 or e.filename  # the target of a copy
            of_dataset = file and not Path(file).is_relative_to(web_dir)
            what = f"can't read {file}" if of_dataset else f"can't write to {web_dir}"
            raise UserError(f"{what}: {e.strerror or e}") from e


def write_page(opt, model, dataset, web_dir: Path, what: str) -> None:
    """Translate a dataset, and write a page with inputs and outputs.

    After Ctrl-C a new page has those that are done.
    """
    use_wandb = opt.use_wandb and distributed.is_main()
    if use_wandb:
        wandb_logger.start_run(opt, experiment_folder(opt))
    webpage = HTML(web_dir, f"Experiment = {opt.name}, {what}")
    count = int(min(opt.num_test, len(dataset)))
    hint = " (--num_test all takes them all)" if count < len(dataset) else ""
    print(f"translating {count} of {len(dataset)} images{hint}")
    batchable = model.shows_batches and all(map(independent_of_batch, model.networks().values()))
    if opt.batch_size > 1 and not batchable:
        print("batch size 1: the results of this model depend on the batch")
    size, largest = opt.batch_size if batchable else 1, math.inf
    # a model of somebody's own may show one image of a batch
    as_computed = type(model).compute_visuals is BaseModel.compute_visuals
    if batchable and as_computed and says_recordable(type(model)):
        size, largest = batch_limits(opt, model.networks().values())
    own = distributed.shard(range(count))
    if len(own) < count:
        dataset.take(own)
    names = ResultNames(dataset.dataset, own, count)
    rows: list[Row] = []
    bar = tqdm(total=len(own), unit="img", disable=None)
    interrupted = False
    with bar, BackgroundWork(encoding_threads(opt, model.networks().values())) as encoders:
        batches = equal_batches(dataset, size, len(own), largest)
        try:
            for row in translated(opt, model, batches, names, webpage.get_image_dir(), encoders):
                rows.append(row)
                bar.update()
        except KeyboardInterrupt:
            # a page of an earlier run may have more
            if not rows or distributed.world_size() > 1 or (web_dir / "index.html").exists():
                raise
            interrupted = True
    shown = [row for part in distributed.gather_object(rows) for row in part]
    webpage.add_text(describe(opt, model, len(shown), len(dataset), count - len(shown)))
    for _, name, files, labels in sorted(shown):
        webpage.add_header(name)
        webpage.add_images(files, labels, files, width=opt.display_winsize)
    if distributed.is_main():
        webpage.save()
    print(f"results: {web_dir / 'index.html'}")
    for _, name, files, labels in sorted(shown) if use_wandb else ():
        paths = [webpage.get_image_dir() / file for file in files]
        wandb_logger.log_result(name, dict(zip(labels, paths, strict=True)))
    if interrupted:
        raise KeyboardInterrupt


def translated(
    opt, model, batches, names: ResultNames, folder: Path, encoders: BackgroundWork
) -> Iterator[Row]:
    """Translate batches, and write their images to `folder` in the background."""
    done = 0
    for data in batches:
        model.set_input(data)
        model.test()
        visuals = model.get_current_visuals()
        paths = model.get_image_paths()
        if not paths:
            raise UserError(
                f"--model {opt.model} does not say which images it translates: set "
                "self.image_paths in set_input, such as input['A_paths']"
            )
        for i, path in enumerate(paths):
            if done % 5 == 0:
                tqdm.write(f"processing ({done:04d})-th image... {[path]}")
            done += 1
            number, name = names.next(path)
            files = [os.fsencode(f"{Path(name).name}_{label}.png") for label in visuals]
            if max(map(len, files), default=0) > 255:  # the limit of file systems, in bytes
                warn(f"{path} is left out: the names of its results would be too long")
                continue
            own = {k: picture_of(v, i, len(paths)) for k, v in visuals.items()}
            files = write_visuals(folder, own, path, name, opt.aspect_ratio, encoders)
            yield number, name, files, list(visuals)


def describe(opt, model, shown: int, total: int, unread: int) -> str:
    """The description on a page of results: direction, data, weights and date."""
    files = [model.weights_file(model.load_suffix(), name) for name in model.networks()]
    names = [path.name for path in files]
    saved = max((path.stat().st_mtime for path in files if path.exists()), default=None)
    date = "%Y-%m-%d %H:%M"
    age = time.strftime(f" (saved {date})", time.localtime(saved)) if saved else ""
    skipped = f"; {unread} left out" if unread else ""
    return (
        f"Direction {opt.direction}. {shown} of {total} images ({opt.phase}) of {opt.dataroot}"
        f"{skipped}. Weights {', '.join(names)} in {model.save_dir}{age}. "
        f"Made {time.strftime(date)}."
    )


def picture_of(visual: Any, i: int, batch: int) -> Any:
    """The i-th image of a batch, as a batch of one; UserError if there is none."""
    if batch == 1:
        return visual
    if not isinstance(visual, torch.Tensor) or len(visual) != batch:
        raise UserError(
            f"--batch_size {batch}: this model shows one image of a batch; say --batch_size 1, "
            "or set shows_batches = False in its class"
        )
    return visual[i : i + 1]


def translate_files(opt, model, paths: list[str], out: Path) -> None:
    """Translate a folder, keeping the images' names; exits with code 1 if any image failed.

    With `--skip_broken`, images that can't be read do not count as failures.
    """
    weights = model.weights_file(model.load_suffix(), model.model_names[0])
    value_range = tuple(opt.value_range) if opt.value_range else None
    options = vars(opt)
    work = FolderTranslation(
        Translator(model.netG, model.device, options, weights, value_range, opt.precision),
        opt.output_format,
        *batch_limits(opt, [model.netG]),
        encoding_threads(opt, [model.netG]),
        TileOptions.from_options(opt),
        None if opt.preprocess == "none" else reader(opt, opt.input_nc),
        not opt.ignore_orientation,
    )
    jobs = work.jobs(paths, folder_of(opt.dataroot), out)
    if opt.skip_existing:
        # unlike `Path.exists`, not an error for a name that is too long
        jobs = [job for job in jobs if not os.path.exists(job.target)]
    existing = f" ({len(paths) - len(jobs)} already exist)" if opt.skip_existing else ""
    jobs = jobs[: int(min(opt.num_test, opt.max_dataset_size, len(jobs)))]
    mark_as_results(out)
    # use rank 0's list on all ranks: a later one would skip what others have just written
    jobs = distributed.broadcast_object(jobs)
    print(f"translating {len(jobs)} of {len(paths)} images{existing}")
    parts = distributed.all_gather_object(work.run(distributed.shard(jobs)))
    reasons = dict(pair for part in parts for pair in part)
    failed = [(job.source, reasons[job.source]) for job in jobs if job.source in reasons]
    print(f"results: {out}")
    if failed:
        if distributed.is_main():
            print(f"{len(failed)} of {len(jobs)} images failed:", file=sys.stderr)
            print(*(f"  {reason}" for _, reason in failed), sep="\n", file=sys.stderr, flush=True)
        # torchrun ends all processes when one fails: wait until all are done
        distributed.barrier()
        # failing to compute or write is an error even with --skip_broken
        if not (opt.skip_broken and all(r.startswith(UNREADABLE) for _, r in failed)):
            sys.exit(1)


if __name__ == "__main__":
    if not distributed.launched():  # one that waits for other processes could not react
        unwind_on_sigterm()
    with distributed.process_group(), one_line_errors():
        main()
