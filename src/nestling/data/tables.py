"""Tables of images: Parquet files and datasets of the Hugging Face hub, read through `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from PIL import Image

from nestling.config import DataConfig
from nestling.data.images import Indices
from nestling.data.pixels import DataError, decode
from nestling.data.sources import SAVED_BY_DATASETS, Labelled, Source, pick_test_split

_LABEL_TYPES = ("int", "uint", "string", "large_string", "bool")


@dataclass(frozen=True, slots=True, eq=False)
class TableRows:
    """Pictures in one column of a table: row `rows[i]` holds the encoded bytes of picture `i`."""

    table: datasets.Dataset
    column: str
    split: str
    rows: Indices

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int) -> Image.Image:
        """The picture number `index`.

        Raises:
            DataError: its row is empty or holds no sound picture.
        """
        return next(self.open_range(index, index + 1))

    def open_range(self, start: int, stop: int) -> Iterator[Image.Image]:
        """The pictures from `start` up to `stop`, in order."""
        rows = self.rows[start:stop].tolist()
        for row, cell in zip(rows, self.table[rows][self.column], strict=True):
            name = f"{self.split} row {row}, column {self.column!r}"
            yield decode(_bytes(cell, name), name=name)

    def select(self, indices: Indices) -> TableRows:
        """The pictures with these numbers, in this order."""
        return TableRows(self.table, self.column, self.split, self.rows[indices])

    def digest(self) -> str:
        """A hash of the rows' numbers and of 64 rows' bytes."""
        digest = hashlib.sha256(repr((len(self.table), self.split)).encode() + self.rows.tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64)):
            digest.update(self._encoded(int(self.rows[index])))
        return digest.hexdigest()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`encoded`: all bytes in one row; `offsets`: where each picture starts, and the end."""
        cells = [self._encoded(row) for row in self.rows.tolist()]
        offsets = np.cumsum([0, *map(len, cells)], dtype=np.int64)
        return {"encoded": np.frombuffer(b"".join(cells), np.uint8), "offsets": offsets}

    def _encoded(self, row: int) -> bytes:
        return _bytes(self.table[row][self.column], f"{self.split} row {row}, column {self.column!r}")


def open_local(path: Path, config: DataConfig) -> Source:
    """The labelled images in a Parquet file, a folder of them, or a folder that `save_to_disk` wrote.

    Raises:
        DataError: unreadable, or without the wanted split, column or labels.
    """
    with _quietly(config.source, hint="is every .parquet file whole?"):
        if path.is_file():
            loaded = datasets.load_dataset("parquet", data_files={config.train_split: str(path.resolve())})
        elif any((path / name).exists() for name in SAVED_BY_DATASETS):
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path.resolve()))
    if isinstance(loaded, datasets.Dataset):
        loaded = {config.train_split: loaded}
    return _source(loaded, config)


def open_hub(config: DataConfig) -> Source:
    """The labelled images of the hub's dataset `config.source`, downloaded once.

    Raises:
        DataError: no such dataset, no network, or without the wanted split, column or labels.
    """
    hint = "nor is it a folder here; without a network, give a local path or set HF_HOME to a filled cache"
    with _quietly(config.source, hint=hint):
        loaded = datasets.load_dataset(config.source)
    return _source(loaded, config)


def _source(splits: Mapping[str, datasets.Dataset], config: DataConfig) -> Source:
    if config.train_split not in splits:
        raise DataError(
            f"data.train_split = {config.train_split!r} is not among the splits of {config.source}: "
            f"{', '.join(splits)}"
        )
    test_split = pick_test_split(splits.keys(), config)
    table = splits[config.train_split]
    column = _image_column(table, config)
    classes, names = _labels(table, config.train_split, config)
    train = Labelled(_rows(table, column, config.train_split), _numbers(names, classes, config.train_split))
    if test_split is None:
        return Source(classes, train, test=None)
    table = splits[test_split]
    if column not in table.features:
        raise DataError(
            f"split {test_split!r} of {config.source} has no column {column!r}; {_columns(table)}"
        )
    _, names = _labels(table, test_split, config)
    test = Labelled(_rows(table, column, test_split), _numbers(names, classes, test_split))
    return Source(classes, train, test)


def _image_column(table: datasets.Dataset, config: DataConfig) -> str:
    wanted, listed = config.image_column, _columns(table)
    fitting = [name for name, feature in table.features.items() if _holds_images(feature)]
    if wanted is None and len(fitting) != 1:
        found = f"columns {', '.join(fitting)} all hold images" if fitting else "no column holds images"
        raise DataError(f"{config.source}: {found}; set data.image_column; {listed}")
    if wanted is not None and wanted not in table.features:
        raise DataError(f"{config.source} has no column {wanted!r} (data.image_column); {listed}")
    if wanted is not None and wanted not in fitting:
        raise DataError(f"column {wanted!r} of {config.source} (data.image_column) holds no images; {listed}")
    return wanted or fitting[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, Mapping):
        feature = feature.get("bytes")
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _columns(table: datasets.Dataset) -> str:
    listed = (
        f"{name} ({feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__})"
        for name, feature in table.features.items()
    )
    return f"its columns are {', '.join(listed)}"


def _rows(table: datasets.Dataset, column: str, split: str) -> TableRows:
    table = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return TableRows(table, column, split, np.arange(len(table)))


def _bytes(cell: Any, name: str) -> bytes:
    if isinstance(cell, Mapping):
        path = cell.get("path")
        cell = cell.get("bytes")
        if cell is None and path is not None:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"{name} points to {path}, which cannot be read: {error.strerror}") from error
    if not isinstance(cell, bytes):
        raise DataError(f"{name} is empty")
    return cell


def _labels(table: datasets.Dataset, split: str, config: DataConfig) -> tuple[tuple[str, ...], list[str]]:
    """The classes, and each row's class by name."""
    column = config.label_column
    if column not in table.features:
        raise DataError(
            f"split {split!r} of {config.source} has no column {column!r} (data.label_column); "
            f"{_columns(table)}"
        )
    feature = table.features[column]
    values: list[Any] = table[column][:]
    if None in values:
        raise DataError(f"{split} row {values.index(None)}, column {column!r}: the label is missing")
    if isinstance(feature, datasets.ClassLabel):
        classes = tuple(feature.names)
        outside = next((row for row, value in enumerate(values) if not 0 <= value < len(classes)), None)
        if outside is not None:
            raise DataError(
                f"{split} row {outside}, column {column!r}: label {values[outside]} is outside the "
                f"{len(classes)} classes; hidden labels are often -1: choose another split"
            )
        return classes, [classes[value] for value in values]
    if isinstance(feature, datasets.Value) and feature.dtype.startswith(_LABEL_TYPES):
        return tuple(str(value) for value in sorted(set(values))), [str(value) for value in values]
    raise DataError(
        f"column {column!r} of {config.source} (data.label_column) holds neither classes, whole numbers nor "
        f"words; {_columns(table)}"
    )


def _numbers(names: Sequence[str], classes: Sequence[str], split: str) -> Indices:
    number = {name: index for index, name in enumerate(classes)}
    outside = next((row for row, name in enumerate(names) if name not in number), None)
    if outside is not None:
        raise DataError(f"{split} row {outside}: label {names[outside]!r} is not one of the training classes")
    return np.array([number[name] for name in names], np.int64)


@contextmanager
def _quietly(source: str, *, hint: str) -> Iterator[None]:
    """Without progress bars, and with errors of reading as `DataError`."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataError(f"{source} cannot be loaded: {reason}; {hint}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
