"""The cache of decoded images gives the pixels that decoding gives, within its memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from data import create_dataset
from data.cache import WORKER_START_METHOD, CachedImage, PictureCache
from options.train_options import TrainOptions
from util import memory

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a system that forks"
)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, 3) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path):
    """Unaligned and aligned images of several sizes, one of them grey."""
    for i in range(5):
        for folder in ("trainA", "trainB", "train"):
            (tmp_path / folder).mkdir(exist_ok=True)
        noise(40 + 4 * i, 44, seed=i).save(tmp_path / "trainA" / f"{i}.png")
        channels = 1 if i == 2 else 3
        noise(48, 40 + 4 * i, channels, seed=10 + i).save(tmp_path / "trainB" / f"{i}.png")
        noise(80 + 8 * i, 44, seed=20 + i).save(tmp_path / "train" / f"{i}.png")
    return tmp_path


def epochs(root, *words: str, count: int = 3):
    """All tensors of some epochs, and the dataset."""
    flags = ["--dataroot", str(root), "--seed", "5", "--gpu_ids", "-1", "--load_size", "36"]
    opt = TrainOptions([*flags, "--crop_size", "32", *words]).parse(save=False)
    dataset = create_dataset(opt)
    try:
        tensors = []
        for epoch in range(1, count + 1):
            dataset.set_epoch(epoch)
            tensors += [t.clone() for batch in dataset for t in (batch["A"], batch["B"])]
        return tensors, dataset.dataset
    finally:
        dataset.close()


def test_a_cache_is_gone_before_the_next_one_is_sized(pictures, monkeypatch):
    flags = ["--decay_at_crop_size", "--n_epochs", "1"]
    words = f"--dataroot {pictures} --gpu_ids -1 --load_size 36 --crop_size 32 --num_threads 0"
    opt = TrainOptions([*words.split(), "--model", "cut", *flags]).parse(False)
    dataset = create_dataset(opt)
    list(dataset)
    old, alive = weakref.ref(dataset.dataset.cache), []
    monkeypatch.setattr("data.cache.free_memory", lambda: alive.append(old() is not None) or 2**30)
    dataset.set_epoch(2)
    assert alive
    assert not any(alive)
    assert dataset.dataset.cache is not None


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    "flags",
    [
        "--model cycle_gan",
        "--model cycle_gan --input_nc 1 --lambda_identity 0 --preprocess scale_width_and_crop",
        "--model cycle_gan --preprocess crop --no_flip",
        "--model cycle_gan --preprocess none",
        "--model pix2pix",
        "--model pix2pix --direction BtoA --preprocess scale_width",
        "--model pix2pix --input_nc 1 --preprocess crop",
        "--model colorization",
    ],
)
def test_same_draws_and_pixels(pictures, flags, workers):
    words = [*flags.split(), "--num_threads", workers]
    plain, without = epochs(pictures, *words, "--cache_images", "off")
    cached, dataset = epochs(pictures, *words, "--cache_images", "ram")
    assert without.cache is None
    # what the workers put in is seen here: an entry for each image or half
    assert len(dataset.cache) == (5 if "colorization" in flags else 10)
    assert len(plain) == len(cached) == 30
    for ours, wanted in zip(cached, plain, strict=True):
        assert torch.equal(ours, wanted)


def test_a_picture_is_decoded_once(pictures, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda p, *a: opened.append(str(p)) or original(p, *a))
    flags = ["--model", "pix2pix", "--num_threads", "0", "--skip_broken"]  # without quick_check
    epochs(pictures, *flags)
    assert len(opened) == len(set(opened)) == 5
    opened.clear()
    epochs(pictures, *flags, "--cache_images", "off")
    assert len(opened) == 15


@pytest.mark.parametrize(("processes", "count"), [(1, 2), (2, 1)])
def test_what_does_not_fit_is_read_each_time(processes, count, pictures, monkeypatch):
    """Two images of 36 x 36 fit into 90% of 10 kB that are free, and one into half of that."""
    monkeypatch.setattr("data.cache.free_memory", lambda: 10_000)
    monkeypatch.setattr("data.cache.distributed.local_world_size", lambda: processes)
    plain, _ = epochs(pictures, "--cache_images", "off", "--num_threads", "0")
    cached, dataset = epochs(pictures, "--cache_images", "ram", "--num_threads", "0")
    assert len(dataset.cache) == 9_000 // processes // (36 * 36 * 3) == count
    assert dataset.cache.used == count * 36 * 36 * 3
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_the_page_cache_of_a_container_is_free(tmp_path):
    texts = {"max": "1000", "current": "900", "stat": "active_file 5\ninactive_file 300\n"}
    for name, text in texts.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._left(str(tmp_path), "memory.max", "memory.current") == [400]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left(str(tmp_path), "memory.max", "memory.current") == []


@pytest.mark.parametrize(("load_size", "room"), [("36", 1), ("576", 10)])
def test_the_room_is_said_in_whole_megabytes(pictures, load_size, room, capsys):
    """Ten images of 36 x 36 take 0.04 MB, of 576 x 576 9.95 MB."""
    epochs(pictures, "--load_size", load_size, "--num_threads", "0", count=0)
    assert f"cached: up to {room} MB (--cache_images)" in capsys.readouterr().out


def test_modes_sizes_and_names():
    cache = PictureCache(10_000, 3)
    first = CachedImage(noise(7, 5), (70, 50))
    cache.put("a", first)
    cache.put(
        "a", CachedImage(noise(7, 5, seed=1), (1, 1))
    )  # a second one of that name: the first stays
    cache.put("grey", CachedImage(noise(6, 4, 1), (6, 4)))
    cache.put("deep", CachedImage(Image.new("I;16", (3, 3)), (3, 3)))  # not of 8 bits
    found, grey = cache.get("a"), cache.get("grey")
    assert found is not None
    assert grey is not None
    assert np.array_equal(np.asarray(found.image), np.asarray(first.image))
    assert found.original_size == (70, 50)
    assert grey.image.mode == "L"
    assert cache.get("deep") is None
    assert len(cache) == 2
    cache.put("b", CachedImage(noise(2, 2), (2, 2)))
    cache.put("c", CachedImage(noise(2, 2), (2, 2)))  # a fourth: more than were announced
    assert len(cache) == 3
    assert cache.get("c") is None


def test_a_picture_from_the_cache_can_be_drawn_on():
    """What a dataset does with it does not reach the one in memory."""
    cache = PictureCache(10_000, 2)
    cache.put("a", CachedImage(Image.new("L", (4, 4), 9), (4, 4)))
    found = cache.get("a")
    assert found is not None
    found.image.putpixel((0, 0), 200)
    again = cache.get("a")
    assert again is not None
    assert again.image.getpixel((0, 0)) == 9


def test_processes_at_once(tmp_path):
    """Four processes that fill and read one cache: each finds whole images only."""
    cache = PictureCache(200 * 16 * 16 * 3, 200)
    context = multiprocessing.get_context("fork")

    def work(start: int, wrong) -> None:
        for i in range(200):
            number = (start + i) % 200
            value = number % 256
            kept = cache.get(str(number))
            if kept is None:
                cache.put(
                    str(number), CachedImage(Image.new("RGB", (16, 16), (value,) * 3), (16, 16))
                )
            elif not (np.asarray(kept.image) == value).all():
                wrong.value += 1

    wrong = context.Value("i", 0)
    processes = [context.Process(target=work, args=(50 * k, wrong)) for k in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert wrong.value == 0
    assert len(cache) == 200


def test_a_process_that_dies_with_the_lock_stops_nobody():
    cache = PictureCache(10**6, 10)
    kept = CachedImage(noise(4, 4), (4, 4))
    cache.put("a", kept)
    context = multiprocessing.get_context("fork")

    def die() -> None:
        cache._lock.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    def go_on() -> None:
        cache.put("b", kept)
        assert [cache.get(name) == kept for name in "ab"] == [True, True]

    dying, other = (context.Process(target=work, daemon=True) for work in (die, go_on))
    for process in (dying, other):
        process.start()
        process.join(20)
    assert (dying.exitcode, other.exitcode) == (-signal.SIGKILL, 0)


@pytest.mark.skipif(WORKER_START_METHOD != "fork", reason="needs a system that forks workers")
def test_workers_share_it_however_python_starts_processes(pictures):
    """From Python 3.14 on that is not `fork` by itself."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        _, dataset = epochs(pictures, "--num_threads", "2", "--serial_batches", count=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(dataset.cache) == 10


@pytest.mark.parametrize("words", [["--value_range", "0", "255"]])
def test_says_why_it_is_off(pictures, words, capsys):
    _, dataset = epochs(pictures, "--cache_images", "ram", "--num_threads", "0", *words, count=1)
    assert dataset.cache is None
    assert "--cache_images is off: with --value_range" in capsys.readouterr().out


def test_the_lock_leaves_no_file_open():
    cache = PictureCache(100, 1)
    file = cache._lock.file
    del cache
    assert file.closed
