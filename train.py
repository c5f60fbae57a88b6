"""Train a model.

    python train.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan
    python train.py --dataroot ./datasets/facades --name facades_pix2pix --model pix2pix
    torchrun --nproc_per_node=4 train.py ...    (on four GPUs, see docs/distributed.md)

Weights, losses and pages go to `<checkpoints_dir>/<name>`. The same command with --continue_train
resumes a run that was stopped or killed. See options/ for all options.
"""

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

import argparse
import functools
import sys
from collections.abc import Callable

from data import CustomDatasetDataLoader, create_dataset
from models import BaseModel, create_model
from models.adversarial import min_size
from models.speed.layout import contiguous_gradients
from models.speed.trial import compiling_costs
from options.train_options import TrainOptions
from util import distributed
from util.distributed import launch
from util.errors import one_line_errors, say
from util.run.position import Position
from util.run.training_run import TrainingRun
from util.scores.validation import Validation
from util.util import crossed
from util.visualizer import Visualizer


def main() -> None:
    options = TrainOptions()
    launch.one_process_per_gpu(options)
    opt = options.parse(save=False)
    opt.min_size = min_size(opt)  # of images that are not resized: --preprocess none
    dataset = create_dataset(opt)
    print(f"The number of training images = {len(dataset)}")
    images = len(dataset) * (opt.n_epochs + opt.n_epochs_decay)
    options.decide_compile(opt, images, lambda: compiling_costs(opt, create_model, dataset.first))
    model = create_model(opt)
    validation = Validation(opt, model, create_dataset)

    with TrainingRun(opt, model, dataset) as run:
        if type(model).data_dependent_initialize is not BaseModel.data_dependent_initialize:
            model.data_dependent_initialize(dataset.first())
        model.setup(opt)
        contiguous_gradients(model.networks().values())
        at = run.resume()  # the position: epoch, images seen in it and in total
        validation.resume(at)
        last_epoch = opt.n_epochs + opt.n_epochs_decay
        if at.epoch > last_epoch:
            print(
                f"nothing to do: epoch {last_epoch} of {last_epoch} is done; raise --n_epochs or "
                "--n_epochs_decay to train longer"
            )
            return
        print(options.message)
        with Visualizer(opt, len(dataset), at) as visualizer:
            begin = functools.partial(run.begin, visualizer.open, options.message)
            stopped = train(opt, dataset, model, visualizer, validation, run, at, begin)
        run.finish()
        if stopped:
            print(f"stopped: {run.stop.reason}; resume with --continue_train")
            sys.exit(run.stop.exit_code)
        validation.print_best()
        page = "" if opt.no_html else f"; losses and images: {run.folder / 'web' / 'index.html'}"
        print(f"trained: the weights are in {run.folder}{page}")


def train(
    opt: argparse.Namespace,
    dataset: CustomDatasetDataLoader,
    model: BaseModel,
    visualizer: Visualizer,
    validation: Validation,
    run: TrainingRun,
    at: Position,
    begin: Callable[[], object],
) -> bool:
    """Train from `at` to the last epoch; returns whether a signal or --max_hours stopped it.

    `begin` is called after every iteration; only its first call has an effect.
    """
    last_epoch = opt.n_epochs + opt.n_epochs_decay
    images_per_iteration = opt.batch_size * distributed.world_size()

    for epoch in range(at.epoch, last_epoch + 1):
        begun = at.total_iters
        dataset.set_epoch(epoch, start=at.epoch_iter)

        for data in run.batches(visualizer.batches(dataset), at):
            before = at.total_iters
            run.guard.start()
            model.set_input(data)
            model.optimize_parameters()
            at.advance(images_per_iteration, len(dataset))
            run.guard.finish(f"epoch {epoch}, iters {at.epoch_iter}", data)
            begin()
            model.track_metric()

            # frequencies are in images, whatever the batch size
            save = not opt.no_html and crossed(opt.update_html_freq, before, at.total_iters)
            if save or at.due(opt.display_freq, before, len(dataset)):
                model.compute_visuals()
                visualizer.display_current_results(model.get_current_visuals(), epoch, save)
            if at.due(opt.print_freq, before, len(dataset)):
                run.guard.check()
                visualizer.log_losses(model.get_current_losses(), model.learning_rate())
            if crossed(opt.save_latest_freq, before, at.total_iters):
                say(f"saving the latest model (epoch {epoch}, total_iters {at.total_iters})")
                run.save(f"iter_{at.total_iters}" if opt.save_by_iter else "latest", position=at)
            if run.stop.on_any_rank():
                run.save("latest", position=at)
                return True

        begin()  # an epoch resumed at its end runs no iteration
        should_stop = functools.partial(run.stop.is_urgent, begun < at.total_iters)
        if validation.end_epoch(at, visualizer, should_stop):  # stopped: to be repeated on resume
            run.save("latest", position=at)
            return run.stop.on_any_rank()
        model.update_learning_rate()
        at.next_epoch()
        # before the next iteration too: data loading workers exit a minute after a signal
        stopped = run.stop.on_any_rank() and begun < at.total_iters and epoch < last_epoch
        if epoch % opt.save_epoch_freq == 0 or epoch == last_epoch:
            say(f"saving the model at the end of epoch {epoch}, iters {at.total_iters}")
            run.save("latest", str(epoch), position=at)
        elif stopped:
            run.save("latest", position=at)
        visualizer.end_epoch(epoch)
        if stopped:
            return True
    return False


if __name__ == "__main__":
    with distributed.process_group(), one_line_errors():
        main()
