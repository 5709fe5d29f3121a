from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from nestling.config import DataConfig
from nestling.data.images import ImageFiles, PixelArray
from nestling.data.pixels import DataError
from nestling.data.sources import Source, open_source


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(shade: int, *, size: tuple[int, int] = (10, 10)) -> Image.Image:
    return Image.new("RGB", size, (shade, 255 - shade, 7))


def png(shade: int) -> bytes:
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return file.getvalue()


def fill(root: Path, classes: Sequence[str], *, count: int = 3) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(10 * number + index).save(root / name / f"{index}.png")


def write_parquet(path: Path, columns: dict[str, Sequence[Any]], features: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table, path
    )


def write_small_parquet(path: Path, *, labels: Sequence[Any] = (0, 1, 0, 1), label: Any = None) -> None:
    label = label or datasets.ClassLabel(names=["cat", "dog"])
    cells = [{"bytes": png(index), "path": None} for index in range(len(labels))]
    write_parquet(path, {"image": cells, "label": labels}, {"image": datasets.Image(), "label": label})


def opened(path: Path, **config: Any) -> Source:
    return open_source(DataConfig(source=str(path), **config))


def shades(source: Source) -> list[int]:
    images = source.train.images
    return [np.asarray(images.open(index))[0, 0, 0] for index in range(len(images))]


def test_digits_are_the_1797_scans_in_full_range() -> None:
    source = open_source(DataConfig())
    assert isinstance(source.train.images, PixelArray)
    assert source.train.images.pixels.shape == (1797, 8, 8, 3)
    assert (source.train.images.pixels.min(), source.train.images.pixels.max()) == (0, 255)
    assert (source.classes[7], source.side, source.test) == ("7", 32, None)


def test_a_folder_with_train_and_test_gives_both_splits(tmp_path: Path) -> None:
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "test", ["cat", "dog"], count=2)
    source = opened(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert shades(source) == [0, 1, 2, 10, 11, 12]
    assert source.test is not None
    assert source.test.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_with_val_tests_on_it(tmp_path: Path) -> None:
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "val", ["dog"])
    source = opened(tmp_path)
    assert source.test is not None
    assert source.test.labels.tolist() == [1, 1, 1]


def test_a_folder_of_class_folders_has_no_test_split(tmp_path: Path) -> None:
    fill(tmp_path, ["b", "a", ".hidden", "__MACOSX"])
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"")
    source = opened(tmp_path)
    assert source.classes == ("a", "b")
    assert source.test is None
    assert len(source.train) == 6
    assert isinstance(source.train.images, ImageFiles)


def test_splits_with_names_of_their_own_are_found(tmp_path: Path) -> None:
    fill(tmp_path / "fit", ["cat", "dog"])
    fill(tmp_path / "judge", ["cat", "dog"])
    assert opened(tmp_path, train_split="fit", test_split="judge").test is not None
    assert opened(tmp_path, train_split="fit", test_split=None).test is None


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "eel").mkdir()
    with pytest.raises(DataError, match=r"class folder .*/eel has no images \(it is empty\)"):
        opened(tmp_path)


def test_a_class_folder_of_other_files_is_named_with_one_of_them(tmp_path: Path) -> None:
    fill(tmp_path, ["cat", "dog"])
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "a.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"/eel has no images \(only a\.heic and the like\); wanted .*\.jpg"):
        opened(tmp_path)


def test_a_test_class_that_was_never_trained_on_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "test", ["cow"])
    with pytest.raises(DataError, match=r"test/cow is a class that the training images lack; .* cat, dog"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_split": "fit"}, "train_split = 'fit' is not a folder of .*; there: train, val"),
        ({"test_split": "judge"}, "test_split = 'judge' is not among the splits of .*: train, val"),
        ({"test_split": "train"}, "test_split and data.train_split are both 'train'"),
    ],
)
def test_a_split_that_cannot_be_used_is_named(tmp_path: Path, config: dict[str, str], message: str) -> None:
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "val", ["cat", "dog"])
    with pytest.raises(DataError, match=message):
        opened(tmp_path, **config)


def test_a_folder_without_class_folders_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no class folders; wanted are .*CLASS/IMAGE\.jpg"):
        opened(tmp_path)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, ["cat"])
    with pytest.raises(DataError, match="has one class, 'cat'; at least two are needed"):
        opened(tmp_path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("image,label")
    with pytest.raises(DataError, match=r"data\.csv.* is a file.*; give a folder of class folders or"):
        opened(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("cifar10", "uoft-cs/cifar10"), ("MNIST", "ylecun/mnist")]
)
def test_an_unknown_source_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(DataError, match=f"no data source '{name}': .*did you mean '{near}'"):
        open_source(DataConfig(source=name))


def test_a_mistyped_path_is_refused_with_its_sibling(tmp_path: Path) -> None:
    fill(tmp_path / "flowers", ["rose", "tulip"])
    with pytest.raises(DataError, match=r"did you mean '.*/flowers'"):
        opened(tmp_path / "flower")


def test_parquet_files_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "p" / "train-00000-of-00001.parquet")
    write_small_parquet(tmp_path / "p" / "test-00000-of-00001.parquet", labels=[1, 1])
    source = opened(tmp_path / "p")
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 1, 0, 1]
    assert shades(source) == [0, 1, 2, 3]
    assert source.test is not None
    assert source.test.labels.tolist() == [1, 1]


def test_a_parquet_file_is_a_training_split(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "all.parquet")
    source = opened(tmp_path / "all.parquet")
    assert shades(source) == [0, 1, 2, 3]
    assert source.test is None


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "all.parquet")
    table = datasets.Dataset.from_parquet(str(tmp_path / "all.parquet"))
    datasets.DatasetDict({"train": table.select([3, 0]), "test": table}).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert source.train.labels.tolist() == [1, 0]
    assert shades(source) == [3, 0]


def test_the_image_column_is_found_by_its_type_and_raw_bytes_will_do(tmp_path: Path) -> None:
    columns: dict[str, Sequence[Any]] = {"id": [7, 8], "picture": [png(5), png(6)], "kind": ["b", "a"]}
    features = {
        name: datasets.Value(t) for name, t in zip(columns, ["int64", "binary", "string"], strict=True)
    }
    write_parquet(tmp_path / "all.parquet", columns, features)
    source = opened(tmp_path / "all.parquet", label_column="kind")
    assert shades(source) == [5, 6]
    assert (source.classes, source.train.labels.tolist()) == (("a", "b"), [1, 0])


def test_whole_numbers_as_labels_become_classes_in_their_order(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "all.parquet", labels=[10, 9, -2, 9], label=datasets.Value("int32"))
    source = opened(tmp_path / "all.parquet")
    assert (source.classes, source.train.labels.tolist()) == (("-2", "9", "10"), [2, 1, 0, 1])


def test_class_numbers_of_the_test_split_are_matched_by_name(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "p" / "train.parquet")
    write_small_parquet(
        tmp_path / "w" / "w.parquet", labels=[0, 0, 1], label=datasets.ClassLabel(names=["dog", "cat"])
    )
    splits = {
        "train": datasets.Dataset.from_parquet(str(tmp_path / "p" / "train.parquet")),
        "test": datasets.Dataset.from_parquet(str(tmp_path / "w" / "w.parquet")),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert source.test is not None
    assert source.test.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"label_column": "fine"},
            r"no column 'fine' \(data\.label_column\); its columns are image \(Image\)",
        ),
        (
            {"image_column": "img"},
            r"no column 'img' \(data\.image_column\); its columns are image \(Image\)",
        ),
        ({"image_column": "label"}, r"column 'label' .* holds no images; its columns are"),
        ({"label_column": "image"}, r"column 'image' .* holds neither classes, whole numbers nor words"),
        ({"train_split": "fit"}, r"train_split = 'fit' is not among the splits of .*: train"),
    ],
)
def test_a_column_or_split_that_is_not_there_is_named(
    tmp_path: Path, config: dict[str, str], message: str
) -> None:
    write_small_parquet(tmp_path / "p" / "train.parquet")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "p", **config)


def test_two_image_columns_ask_for_a_choice(tmp_path: Path) -> None:
    features = {"left": datasets.Image(), "right": datasets.Image(), "label": datasets.Value("int64")}
    cells = [{"bytes": png(1), "path": None}] * 2
    write_parquet(tmp_path / "all.parquet", {"left": cells, "right": cells, "label": [0, 1]}, features)
    with pytest.raises(DataError, match=r"columns left, right all hold images; set data\.image_column"):
        opened(tmp_path / "all.parquet")
    assert opened(tmp_path / "all.parquet", image_column="right").train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None, 0], "train row 2, column 'label': the label is missing"),
        ([0, 1, 1, -1], "train row 3, column 'label': label -1 is outside the 2 classes"),
        ([0, 0, 0, 0], "no training image shows dog"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, labels: list[int], message: str) -> None:
    write_small_parquet(tmp_path / "all.parquet", labels=labels)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "all.parquet")


@pytest.mark.parametrize(("train", "test"), [([], [0, 1]), ([0, 1], [])])
def test_a_split_without_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: list[int], test: list[int]
) -> None:
    write_small_parquet(tmp_path / "all.parquet")
    table = datasets.Dataset.from_parquet(str(tmp_path / "all.parquet"))
    splits = {"train": table.select(train), "test": table.select(test)}
    monkeypatch.setattr(datasets, "load_dataset", lambda _name: splits)
    with pytest.raises(DataError, match="no training images" if test else "an empty test split"):
        open_source(DataConfig(source="some/set"))


def test_a_test_label_that_training_lacks_is_named(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "p" / "train.parquet", label=datasets.Value("int64"))
    write_small_parquet(tmp_path / "p" / "test.parquet", labels=[1, 5], label=datasets.Value("int64"))
    with pytest.raises(DataError, match="test row 1: label '5' is not one of the training classes"):
        opened(tmp_path / "p")


def test_a_damaged_or_empty_cell_is_named_by_row_and_column(tmp_path: Path) -> None:
    cells = [{"bytes": png(1), "path": None}, {"bytes": b"no image", "path": None}, None]
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    write_parquet(tmp_path / "all.parquet", {"image": cells, "label": [0, 1, 1]}, features)
    images = opened(tmp_path / "all.parquet").train.images.select(np.array([2, 1]))
    with pytest.raises(DataError, match="train row 1, column 'image' cannot be read as an image"):
        images.open(1)
    with pytest.raises(DataError, match="train row 2, column 'image' is empty"):
        images.open(0)


def test_a_damaged_parquet_file_is_an_error_that_names_the_source(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "all.parquet")
    whole = (tmp_path / "all.parquet").read_bytes()
    (tmp_path / "all.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"all\.parquet cannot be loaded: .*is every \.parquet file whole"):
        opened(tmp_path / "all.parquet")


def test_the_hub_is_asked_for_a_name_and_silence_about_it_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def unreachable(name: str) -> None:
        asked.append(name)
        assert datasets.are_progress_bars_disabled()
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cifar10 cannot be loaded: Couldn't reach .*give a local path"):
        open_source(DataConfig(source="uoft-cs/cifar10"))
    assert asked == ["uoft-cs/cifar10"]
    assert not datasets.are_progress_bars_disabled()
