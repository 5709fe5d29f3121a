"""Source: labelled images as they are found, before anything is chosen or decoded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestling.config import DataConfig
from nestling.data.images import ImageFiles, Images, Indices, PixelArray
from nestling.data.pixels import DataError

_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_TEST_SYNONYMS = ("val", "valid", "validation")
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
"""What `Dataset.save_to_disk` leaves in a folder."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WELL_KNOWN = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "imagenet": "ILSVRC/imagenet-1k",
    "mnist": "ylecun/mnist",
}


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Images and the class number of each."""

    images: Images
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Indices) -> Labelled:
        """The ones with these numbers, in this order."""
        return Labelled(self.images.select(indices), self.labels[indices])


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What was found: `test` is None where the source has no such split; `side` in px if one is natural."""

    classes: tuple[str, ...]
    train: Labelled
    test: Labelled | None
    side: int | None = None


def open_source(config: DataConfig) -> Source:
    """The labelled images that `config.source` names.

    Raises:
        DataError: no such source (the nearest is named), or one without images, with an empty class, without
            the wanted split or column, or with labels that its training split does not know.
    """
    path = Path(config.source).expanduser()
    if config.source == "digits":
        source = _digits()
    elif path.exists():
        source = _open_table(path, config) if _is_table(path) else _open_folder(path, config)
    elif _HUB_NAME.fullmatch(config.source):
        source = _open_table(None, config)
    else:
        raise DataError(_unknown(config.source, path))
    _check(source, config)
    return source


def pick_test_split(names: Collection[str], config: DataConfig) -> str | None:
    """The name among `names` of the split to test on, or None where one must be cut off.

    Raises:
        DataError: the configuration names a split that is not there, or that is trained on.
    """
    if config.test_split == config.train_split:
        raise DataError(
            f"data.test_split and data.train_split are both {config.train_split!r}; name two splits"
        )
    default = DataConfig.model_fields["test_split"].default
    if config.test_split is None or config.test_split in names:
        return config.test_split
    if config.test_split == default:
        return next((name for name in _TEST_SYNONYMS if name in names), None)
    raise DataError(
        f"data.test_split = {config.test_split!r} is not among the splits of {config.source}: "
        f"{', '.join(sorted(names))}"
    )


def _open_table(path: Path | None, config: DataConfig) -> Source:
    from nestling.data import tables  # here, because `datasets` takes seconds to import

    return tables.open_local(path, config) if path else tables.open_hub(config)


def _is_table(path: Path) -> bool:
    """Whether `path` is something for `datasets`: Parquet, or a folder that it saved."""
    if path.is_file():
        return path.suffix == ".parquet"
    return any((path / name).exists() for name in SAVED_BY_DATASETS) or any(
        next(folder.glob("*.parquet"), None) for folder in (path, path / "data", path / "train")
    )


def _digits() -> Source:
    from sklearn.datasets import load_digits

    scans = load_digits()
    grey = np.rint(scans.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    labels = scans.target.astype(np.int64)
    return Source(tuple(map(str, range(10))), Labelled(PixelArray(pixels), labels), test=None, side=32)


def _open_folder(root: Path, config: DataConfig) -> Source:
    if not root.is_dir():
        raise DataError(
            f"data.source = {config.source!r} is a file; give a folder of class folders or a .parquet"
        )
    splits = [folder.name for folder in _subfolders(root)]
    if config.train_split in splits:
        test_split = pick_test_split(splits, config)
        classes = tuple(folder.name for folder in _subfolders(root / config.train_split))
        train = _class_folders(root / config.train_split, classes)
        return Source(classes, train, _class_folders(root / test_split, classes) if test_split else None)
    if config.train_split != DataConfig.model_fields["train_split"].default:
        found = ", ".join(splits) or "none"
        raise DataError(
            f"data.train_split = {config.train_split!r} is not a folder of {root}; there: {found}"
        )
    return Source(tuple(splits), _class_folders(root, tuple(splits)), test=None)


def _subfolders(root: Path) -> list[Path]:
    return sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))
    )


def _class_folders(root: Path, classes: Sequence[str]) -> Labelled:
    paths: list[Path] = []
    labels: list[int] = []
    folders = _subfolders(root)
    if not folders:
        raise DataError(
            f"{root} has no class folders; wanted are {root}/CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg and "
            "test/CLASS/IMAGE.jpg"
        )
    for folder in folders:
        if folder.name not in classes:
            raise DataError(f"{folder} is a class that the training images lack; they have {_some(classes)}")
        entries = sorted(folder.iterdir())
        files = [entry for entry in entries if entry.suffix.lower() in _EXTENSIONS and entry.is_file()]
        if not files:
            found = f"only {entries[0].name} and the like" if entries else "it is empty"
            raise DataError(
                f"class folder {folder} has no images ({found}); wanted are files ending in "
                f"{', '.join(sorted(_EXTENSIONS))}"
            )
        paths += files
        labels += [classes.index(folder.name)] * len(files)
    return Labelled(ImageFiles(root, tuple(paths)), np.array(labels, np.int64))


def _check(source: Source, config: DataConfig) -> None:
    counts = np.bincount(source.train.labels, minlength=len(source.classes))
    if len(source.train) == 0:
        raise DataError(f"{config.source} has no training images")
    if source.test is not None and len(source.test) == 0:
        raise DataError(f"{config.source} has an empty test split; data.test_split chooses another")
    if len(source.classes) < 2:
        raise DataError(f"{config.source} has one class, {source.classes[0]!r}; at least two are needed")
    empty = [name for name, count in zip(source.classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{config.source}: no training image shows {_some(empty)}; drop or fill such classes")


def _some(names: Sequence[str], *, at_most: int = 10) -> str:
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"


def _unknown(name: str, path: Path) -> str:
    message = f"no data source {name!r}: neither 'digits', nor a path that exists, nor a hub name 'org/name'"
    if name.lower() in _WELL_KNOWN:
        return f"{message}; did you mean {_WELL_KNOWN[name.lower()]!r}?"
    siblings = (
        [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    )
    near = difflib.get_close_matches(name, ["digits", *_WELL_KNOWN.values(), *siblings], n=1)
    return f"{message}; did you mean {near[0]!r}?" if near else message
