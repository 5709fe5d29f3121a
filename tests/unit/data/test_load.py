from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nestling.config import DataConfig
from nestling.data import Batch, Data, DataError, EvalImages, load_data
from nestling.data.images import PixelArray

CIFAR10 = Path(os.environ.get("NESTLING_CIFAR10", Path(__file__).parents[4] / "shared" / "data" / "cifar10"))


def pixels(images: EvalImages) -> NDArray[np.uint8]:
    assert isinstance(images.images, PixelArray)
    return images.images.pixels


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(DataConfig(search_images=200), seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, larger than what is kept in memory, of several shapes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for index in range(12):
            shape = (100 + 7 * index, 130, 3) if index % 2 else (120, 100 + 5 * index, 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / name / f"{index}.jpg")
    return root


def on_disk(folder: Path, **config: Any) -> Data:
    settings: dict[str, Any] = {"search_images": 4, "size": 97, "workers": 0} | config
    return load_data(DataConfig(source=str(folder), **settings), seed=3)


def as_whoever_scores_the_file(
    images: list[Image.Image], resolution: int, mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The preprocessing, written down again with nothing but PIL and numpy."""
    prepared = []
    for image in images:
        width, height = image.size
        if min(width, height) != resolution:
            scaled = (width * resolution // min(width, height), height * resolution // min(width, height))
            image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
        square = np.asarray(image.crop((left, top, left + resolution, top + resolution)), np.float32)
        prepared.append((square / 255 - mean.astype(np.float32)) / std.astype(np.float32))
    return np.stack(prepared).astype(np.float32).transpose(0, 3, 1, 2)


def equal(first: Iterator[Batch], second: Iterator[Batch], *, count: int) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in islice(zip(first, second, strict=True), count)
    )


def test_the_three_splits_of_digits_are_disjoint_and_whole(digits: Data) -> None:
    assert isinstance(digits.train.images, PixelArray)
    parts = (digits.train.images.pixels, pixels(digits.search), pixels(digits.test()))
    assert [len(part) for part in parts] == [1238, 200, 359]
    assert len({image.tobytes() for part in parts for image in part}) == 1797  # no scan is there twice


def test_search_and_test_images_hold_the_classes_in_proportion(digits: Data) -> None:
    for part in (digits.search, digits.test()):
        counts = np.bincount(part.labels)
        assert counts.max() - counts.min() <= 2
    assert set(np.bincount(digits.search.take(100).labels)) == {10}


def test_splits_and_fingerprint_are_a_function_of_the_seed(digits: Data) -> None:
    again = load_data(DataConfig(search_images=200), seed=0)
    other = load_data(DataConfig(search_images=200), seed=1)
    assert (again.fingerprint, again.search.key) == (digits.fingerprint, digits.search.key)
    assert np.array_equal(pixels(again.test()), pixels(digits.test()))
    assert other.fingerprint != digits.fingerprint
    assert other.search.key != digits.search.key


def test_digits_are_upscaled_by_pil_and_normalised_by_their_own_colours(digits: Data) -> None:
    assert digits.size == 32
    images = torch.cat([batch.images for batch in islice(_plain(digits), digits.train.steps_per_epoch(64))])
    assert images.mean().item() == pytest.approx(0.0, abs=0.02)
    assert images.std().item() == pytest.approx(1.0, abs=0.02)


def _plain(data: Data) -> Iterator[Batch]:
    return data.train.batches(start_step=0, batch_size=64, augment="none")


def test_an_epoch_shows_each_training_image_at_most_once(digits: Data) -> None:
    steps = digits.train.steps_per_epoch(64)
    assert steps == 1238 // 64
    stream = _plain(digits)
    epochs = [torch.cat([batch.images for batch in islice(stream, steps)]) for _ in range(2)]
    for epoch in epochs:
        assert len({image.numpy().tobytes() for image in epoch}) == steps * 64
    assert not torch.equal(*epochs)


def test_labels_stay_with_their_images(digits: Data) -> None:
    assert isinstance(digits.train.images, PixelArray)
    known = {
        digits_image.tobytes(): label
        for digits_image, label in zip(digits.train.images.pixels, digits.train.labels.tolist(), strict=True)
    }
    batch = next(digits.train.batches(start_step=5, batch_size=64, augment="none"))
    std, mean = (torch.tensor(colours).view(3, 1, 1) for colours in (digits.std, digits.mean))
    shown = ((batch.images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert [known[image.numpy().tobytes()] for image in shown] == batch.labels.tolist()


@pytest.mark.parametrize("augment", ["none", "shift", "standard", "strong"])
def test_a_stream_begun_at_a_step_equals_the_uninterrupted_one(digits: Data, augment: str) -> None:
    whole = digits.train.batches(start_step=0, batch_size=500, augment=augment)  # two steps an epoch
    for _ in islice(whole, 3):
        pass
    assert equal(digits.train.batches(start_step=3, batch_size=500, augment=augment), whole, count=3)


def test_batches_are_typed_and_vary_with_the_step(digits: Data) -> None:
    first, second = islice(digits.train.batches(start_step=0, batch_size=16, augment="standard"), 2)
    assert (first.images.shape, first.images.dtype) == ((16, 3, 32, 32), torch.float32)
    assert (first.labels.shape, first.labels.dtype) == ((16,), torch.int64)
    assert not torch.equal(first.images, second.images)


def test_the_global_random_numbers_are_left_alone(digits: Data, folder: Path) -> None:
    before = torch.get_rng_state()
    next(digits.train.batches(start_step=0, batch_size=16, augment="strong"))
    next(on_disk(folder).train.batches(start_step=0, batch_size=4, augment="strong"))
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_images_than_a_batch_are_one_step(digits: Data) -> None:
    assert digits.train.steps_per_epoch(5000) == 1
    assert len(next(digits.train.batches(start_step=0, batch_size=5000, augment="none")).labels) == 1238


def test_training_and_scoring_normalise_alike_to_the_bit(digits: Data) -> None:
    scored = {image.tobytes() for image in digits.train.calibration(1238).array(32)}
    trained = next(digits.train.batches(start_step=0, batch_size=64, augment="none"))
    assert {image.numpy().tobytes() for image in trained.images} <= scored


def test_calibration_images_are_balanced_and_always_the_same(digits: Data) -> None:
    chosen = digits.train.calibration(100)
    assert set(np.bincount(chosen.labels)) == {10}
    assert chosen.key == digits.train.calibration(100).key
    assert chosen.key != dataclasses.replace(digits.train, seed=1).calibration(100).key


def test_at_and_array_agree_in_order_and_value(digits: Data) -> None:
    batches = list(digits.search.at(24, batch_size=64))
    assert [len(batch.labels) for batch in batches] == [64, 64, 64, 8]
    assert np.array_equal(torch.cat([batch.images for batch in batches]).numpy(), digits.search.array(24))
    assert torch.cat([batch.labels for batch in batches]).tolist() == digits.search.labels.tolist()


def test_a_take_holds_classes_alike_whatever_their_order(digits: Data) -> None:
    by_class = np.argsort(digits.search.labels, kind="stable")
    images = digits.search
    skewed = dataclasses.replace(
        images, images=images.images.select(by_class), labels=images.labels[by_class]
    )
    assert set(np.bincount(skewed.take(50).labels, minlength=10)) == {5}


def test_a_smaller_take_begins_a_larger_one(digits: Data) -> None:
    large, small = digits.search.take(50), digits.search.take(20)
    assert np.array_equal(pixels(large)[:20], pixels(small))
    assert large.take(20).key == small.key


@pytest.mark.parametrize("resolution", [24, 32, 40])
def test_a_saved_split_of_pixels_gives_the_same_bits_to_pil_and_numpy(
    digits: Data, tmp_path: Path, resolution: int
) -> None:
    digits.search.save_split(tmp_path / "search.npz")
    with np.load(tmp_path / "search.npz", allow_pickle=False) as split:
        images = [Image.fromarray(image) for image in split["images"]]
        by_hand = as_whoever_scores_the_file(images, resolution, split["mean"], split["std"])
        assert split["labels"].tolist() == digits.search.labels.tolist()
        assert split["classes"].tolist() == list(digits.classes)
    assert np.array_equal(digits.search.array(resolution), by_hand)
    assert [path.name for path in tmp_path.iterdir()] == ["search.npz"]


def test_a_split_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError("no space left on device")

    (tmp_path / "search.npz").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        digits.search.save_split(tmp_path / "search.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["search.npz"]
    assert (tmp_path / "search.npz").read_bytes() == b"old"


@pytest.mark.parametrize("resolution", [64, 100])
def test_a_saved_split_of_files_gives_the_same_bits_to_pil_and_numpy(
    folder: Path, tmp_path: Path, resolution: int
) -> None:
    search = on_disk(folder).search
    search.save_split(tmp_path / "search.npz")
    with np.load(tmp_path / "search.npz", allow_pickle=False) as split:
        images = [Image.open(path).convert("RGB") for path in split["paths"]]
        by_hand = as_whoever_scores_the_file(images, resolution, split["mean"], split["std"])
    assert np.array_equal(search.array(resolution), by_hand)


def test_the_metadata_gives_back_the_very_numbers(digits: Data) -> None:
    words = digits.search.preprocessing(24)
    assert tuple(map(float, words["mean"].split(","))) == digits.mean
    assert tuple(map(float, words["std"].split(","))) == digits.std
    assert "24" in words["resize"]
    assert all(isinstance(value, str) for value in words.values())


def test_small_images_of_a_folder_are_decoded_once_into_memory(folder: Path) -> None:
    data = on_disk(folder, size=40)
    assert isinstance(data.train.images, PixelArray)
    assert data.train.images.pixels.shape == (24 - 5 - 4, 40, 40, 3)
    assert data.mean != (0.485, 0.456, 0.406)


def test_large_images_stay_on_disk_under_the_colours_of_imagenet(folder: Path) -> None:
    data = on_disk(folder, size=None)
    assert not isinstance(data.train.images, PixelArray)
    assert (data.mean, data.size) == ((0.485, 0.456, 0.406), 120)  # the median of the shorter sides


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_images_on_disk_come_the_same_from_any_step_and_any_number_of_workers(folder: Path) -> None:
    ask: dict[str, Any] = {"batch_size": 6, "augment": "strong"}  # 15 images: two steps an epoch
    whole = on_disk(folder).train.batches(start_step=0, **ask)
    batch = next(whole)
    assert batch.images.shape == (6, 3, 97, 97)
    for _ in islice(whole, 2):
        pass
    assert equal(on_disk(folder, workers=2).train.batches(start_step=3, **ask), whole, count=2)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("augment", ["none", "strong"])
def test_the_parts_of_a_batch_put_together_are_the_whole_one(
    digits: Data, folder: Path, parts: int, augment: str
) -> None:
    for train, size in ((digits.train, 50), (on_disk(folder).train, 7)):
        ask: dict[str, Any] = {"start_step": 2, "batch_size": size, "augment": augment}
        divided = [train.divided(part, of=parts).batches(**ask) for part in range(parts)]
        for whole, *mine in islice(zip(train.batches(**ask), *divided, strict=True), 2):
            assert torch.equal(torch.cat([batch.images for batch in mine]), whole.images)
            assert torch.equal(torch.cat([batch.labels for batch in mine]), whole.labels)
        assert train.divided(0, of=parts).steps_per_epoch(size) == train.steps_per_epoch(size)


def test_of_a_divided_batch_only_ones_own_part_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    train = on_disk(folder).train.divided(1, of=2)
    open_image = type(train.images).open

    def counting(images: Any, index: int) -> Image.Image:
        opened.append(index)
        return open_image(images, index)

    monkeypatch.setattr(type(train.images), "open", counting)
    next(train.batches(start_step=0, batch_size=6, augment="strong"))
    assert len(opened) == 3


def test_a_part_that_is_none_or_has_no_image_is_refused(digits: Data) -> None:
    with pytest.raises(DataError, match="part 2 of 2 of a batch; parts are counted from 0"):
        digits.train.divided(2, of=2)
    with pytest.raises(
        DataError, match="a batch of 3 images cannot be divided by 4; use a larger batch_size"
    ):
        digits.train.divided(0, of=4).batches(start_step=0, batch_size=3, augment="none")


def test_an_image_on_disk_is_cropped_differently_in_each_epoch(folder: Path) -> None:
    train = on_disk(folder, train_images=2).train  # an epoch is one batch of both images
    shown = [
        batch.images[batch.labels.argmin()]
        for batch in islice(train.batches(start_step=0, batch_size=2, augment="shift"), 4)
    ]
    assert len({image.numpy().tobytes() for image in shown}) == 4


def test_without_augmentation_images_on_disk_are_cropped_at_the_centre(folder: Path) -> None:
    data = on_disk(folder)
    scored = {image.tobytes() for image in data.train.calibration(15).array(97)}
    batch = next(data.train.batches(start_step=0, batch_size=8, augment="none"))
    assert {image.numpy().tobytes() for image in batch.images} <= scored


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_stops_training_with_its_name_and_no_traceback(tmp_path: Path, workers: int) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("RGB", (100, 100)).save(tmp_path / name / f"{index}.png")
    data = on_disk(tmp_path, search_images=2, size=100, workers=workers)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"^/\S+/\d\.png cannot be read as an image") as caught:
        next(data.train.batches(start_step=0, batch_size=4, augment="standard"))
    assert "Traceback" not in str(caught.value)


def test_a_damaged_small_image_is_named_at_once(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("RGB", (20, 20)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "dog" / "4.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"dog/4\.png cannot be read as an image"):
        load_data(DataConfig(source=str(tmp_path), search_images=2), seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"search_images": 1500}, r"search_images = 1500 takes 1500 of 1438 .*; it must take 1 to 1428"),
        ({"test_fraction": 0.0}, r"test_fraction = 0\.0 takes 0 of 1797"),
        ({"test_fraction": 1.0}, r"test_fraction = 1\.0 takes 1797 of 1797"),
        ({"train_images": 600}, r"data\.train_images = 600, but there are 438"),
        ({"test_images": 600}, r"data\.test_images = 600, but there are 359"),
    ],
)
def test_more_images_than_there_are_cannot_be_had(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(**config), seed=0)


def test_fewer_training_images_are_spread_evenly_over_the_classes() -> None:
    data = load_data(DataConfig(search_images=100, train_images=50, test_images=30, size=16), seed=0)
    assert set(np.bincount(data.train.labels)) == {5}
    assert set(np.bincount(data.test().labels)) == {3}
    assert data.train.size == 16


def test_numbers_out_of_range_are_refused_before_anything_is_read(digits: Data) -> None:
    with pytest.raises(DataError, match="batch_size must be at least 1, not 0"):
        digits.train.batches(start_step=0, batch_size=0, augment="none")
    with pytest.raises(DataError, match="start_step must be at least 0, not -1"):
        digits.train.batches(start_step=-1, batch_size=8, augment="none")
    with pytest.raises(DataError, match="no augmentation 'mixup'"):
        digits.train.batches(start_step=0, batch_size=8, augment="mixup")
    with pytest.raises(DataError, match="resolution must be at least 1, not 0"):
        digits.search.at(0, batch_size=8)
    with pytest.raises(DataError, match="201 images asked for, there are 200"):
        digits.search.take(201)
    with pytest.raises(DataError, match="1239 training images asked for; ask for 1 to 1238"):
        digits.train.calibration(1239)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="set NESTLING_CIFAR10 to a folder with CIFAR-10 as Parquet")
def test_cifar10_is_read_from_parquet_in_part(tmp_path: Path) -> None:
    data = load_data(
        DataConfig(source=str(CIFAR10), search_images=100, train_images=200, test_images=50), seed=0
    )
    assert (data.size, len(data.classes), data.classes[3]) == (32, 10, "cat")
    assert set(np.bincount(data.train.labels)) == {20}
    assert len(data.test()) == 50
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.03)
    data.test().save_split(tmp_path / "test.npz")
    assert (tmp_path / "test.npz").stat().st_size < 50 * 32 * 32 * 3 + 5000
