"""Translate pictures with a trained model, and write a page of results.

    python test.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan
    python test.py --dataroot ./datasets/maps/testA --name maps_cyclegan --model test

Results go to `<results_dir>/<name>/<phase>_<epoch>/index.html`. See options/ for all the options.
"""

import os

from tqdm import tqdm

from data import create_dataset
from models import create_model
from options.test_options import TestOptions
from util.html import HTML
from util.randomness import seed_everything
from util.util import one_line_errors
from util.visualizer import result_name, save_images


def main() -> None:
    options = TestOptions()
    opt = options.parse(save=False)
    opt.num_threads = 0
    opt.batch_size = 1
    opt.serial_batches = True  # A and B in the order of their names
    opt.no_flip = True
    seed_everything(opt.seed, opt.deterministic)
    dataset = create_dataset(opt)
    model = create_model(opt)
    model.setup(opt)
    options.save(opt)
    if opt.eval:
        model.eval()

    folder = f"{opt.phase}_{opt.epoch}"
    if opt.load_iter > 0:
        folder = f"{opt.phase}_iter{opt.load_iter}"
    web_dir = os.path.join(opt.results_dir, opt.name, folder)
    title = f"Experiment = {opt.name}, Phase = {opt.phase}, Epoch = {opt.epoch}"
    webpage = HTML(web_dir, title)
    count = int(min(opt.num_test, len(dataset)))
    hint = " (--num_test all takes them all)" if count < len(dataset) else ""
    print(f"translating {count} of {len(dataset)} pictures{hint}")

    taken: set[str] = set()
    for i, data in zip(tqdm(range(count), unit="img", disable=None), dataset, strict=False):
        model.set_input(data)
        model.test()
        visuals = model.get_current_visuals()
        paths = model.get_image_paths()
        if i % 5 == 0:
            tqdm.write(f"processing ({i:04d})-th image... {paths}")
        name = result_name(dataset.dataset.relative_path(paths[0]), taken)
        save_images(
            webpage,
            visuals,
            paths,
            aspect_ratio=opt.aspect_ratio,
            width=opt.display_winsize,
            name=name,
        )
    webpage.save()
    print(f"results: {os.path.join(web_dir, 'index.html')}")


if __name__ == "__main__":
    with one_line_errors():
        main()
