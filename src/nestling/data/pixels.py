"""From encoded bytes to the numbers that a network reads, by PIL and numpy alone.

Whoever scores an exported file repeats these few steps and gets the same bits: decode, convert to RGB, resize
the shorter side (bicubic, only where it differs), crop the centre, divide by 255, subtract the mean and
divide by the standard deviation.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_DEEP_MODES = ("I", "F")
"""PIL's modes of more than 8 bits a channel: `I`, `I;16`, `I;16B`, `F`, ..."""


_MOST_ELONGATED = 50

Colours = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, as fractions of 255."""


class DataError(ValueError):
    """Images that cannot be used; the message names the file, row, column or key, and what would do."""


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on all of `parts`, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def decode(encoded: bytes, *, name: str) -> Image.Image:
    """The RGB image in `encoded`: greyscale, palette and CMYK are converted, transparency is dropped.

    Raises:
        DataError: not an image, a damaged or truncated one, one with more than 8 bits a channel, or a sliver;
            `name` is named.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        if max(image.size) > _MOST_ELONGATED * min(image.size):  # resized, it would fill the memory
            raise DataError(
                f"{name} has {image.width} x {image.height} px; crop it to at most {_MOST_ELONGATED}:1"
            )
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode.partition(";")[0] in _DEEP_MODES:
            raise DataError(
                f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits"
            )
        if "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as by the direct way, which warns
        return image.convert("RGB")
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        LookupError,
        ArithmeticError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:  # PIL's plugins let all of these through on damaged files
        reason = str(error).replace("<_io.BytesIO object", "<bytes") or type(error).__name__
        raise DataError(f"{name} cannot be read as an image: {reason}") from error


def fit(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """`image` with its shorter side resized to `side` and its centre cropped: `(side, side, 3)` uint8."""
    width, height = image.size
    shorter = min(width, height)
    if shorter != side:
        size = (width * side // shorter, height * side // shorter)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image)


def normalise(
    pixels: NDArray[np.uint8], *, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """`pixels` `(N, H, W, 3)` as `(N, 3, H, W)`: `(pixels / 255 - mean) / std`, each step in float32."""
    numbers = pixels.astype(np.float32)
    numbers /= np.float32(255)
    numbers -= np.asarray(mean, np.float32)
    numbers /= np.asarray(std, np.float32)
    return np.ascontiguousarray(numbers.transpose(0, 3, 1, 2))


def measure_colours(pixels: NDArray[np.uint8]) -> Colours:
    """Mean and standard deviation of each channel of `pixels` `(N, H, W, 3)`, as fractions of 255.

    Rounded to four digits, so that the numbers written into a file's metadata are the numbers used.
    """
    total, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(pixels), 1024):
        block = pixels[start : start + 1024].reshape(-1, 3).astype(np.float32)
        total += block.sum(axis=0, dtype=np.float64)
        squares += np.square(block).sum(axis=0, dtype=np.float64)
    count = pixels.size / 3
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1.0))  # one grey level, where all are alike
    return tuple(round(float(v) / 255, 4) for v in mean), tuple(round(float(v) / 255, 4) for v in deviation)
