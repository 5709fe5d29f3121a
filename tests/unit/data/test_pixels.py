from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nestling.data.pixels import DataError, decode, derive_seed, fit, measure_colours, normalise

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_an_rgb_image_is_decoded_as_it_was() -> None:
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(COLOURS)), name="x")), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_eight_bits_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    image = decode(encoded(Image.fromarray(COLOURS).convert(mode), kind), name="x")
    assert (image.mode, image.size) == ("RGB", (16, 12))


def test_transparency_is_dropped_and_colours_are_kept() -> None:
    image = Image.fromarray(np.dstack([COLOURS, np.zeros((12, 16, 1), np.uint8)]))
    assert np.array_equal(np.asarray(decode(encoded(image), name="x")), COLOURS)


def test_a_palette_with_transparent_entries_becomes_rgb_without_a_warning() -> None:
    image = Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE)
    data = encoded(image, transparency=bytes([0, 128, 255]))
    assert np.array_equal(np.asarray(decode(data, name="x")), np.asarray(image.convert("RGB")))


def test_more_than_eight_bits_are_refused_rather_than_clipped() -> None:
    deep = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257)
    with pytest.raises(DataError, match=r"scan\.png has more than 8 bits a channel"):
        decode(encoded(deep), name="scan.png")


def test_a_sliver_is_refused_before_it_is_resized_to_gigabytes() -> None:
    with pytest.raises(DataError, match=r"x\.png has 1000 x 2 px; crop it to at most 50:1"):
        decode(encoded(Image.new("RGB", (1000, 2))), name="x.png")


@pytest.mark.parametrize("data", [b"", b"no image", encoded(Image.fromarray(COLOURS), "JPEG")[:-300]])
def test_what_is_no_whole_image_is_named(data: bytes) -> None:
    with pytest.raises(DataError, match=r"cat/7\.jpg cannot be read as an image"):
        decode(data, name="cat/7.jpg")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 2000),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_data_error(
    kind: str, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(encoded(Image.fromarray(COLOURS), kind))
    for place, byte in changes:
        data[place % len(data)] = byte
    try:
        assert decode(bytes(data[: max(cut, 20)]), name="x").mode == "RGB"
    except DataError as error:
        assert str(error).startswith("x ")  # noqa: PT017


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_fit_gives_the_asked_square_whatever_the_shape(width: int, height: int, side: int) -> None:
    assert fit(Image.new("RGB", (width, height)), side).shape == (side, side, 3)


def test_fit_leaves_an_image_of_the_right_size_alone() -> None:
    assert np.array_equal(fit(Image.fromarray(COLOURS), 12), COLOURS[:, 2:14])


def test_normalising_equals_the_formula_in_float32() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    fractions = COLOURS[None].astype(np.float32) / np.float32(255)
    by_hand = (fractions - np.array(mean, np.float32)) / np.array(std, np.float32)
    assert by_hand.dtype == np.float32
    assert np.array_equal(normalise(COLOURS[None], mean=mean, std=std), by_hand.transpose(0, 3, 1, 2))


def test_colours_are_measured_as_numpy_does_over_all_blocks() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2500, 4, 4, 3), np.uint8)
    mean, std = measure_colours(pixels)
    assert mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-4)
    assert std == pytest.approx((pixels / 255).std((0, 1, 2)), abs=1e-4)


def test_pictures_of_one_colour_still_have_a_deviation_to_divide_by() -> None:
    assert min(measure_colours(np.full((3, 8, 8, 3), 255, np.uint8))[1]) > 0


def test_a_derived_seed_depends_on_every_part_and_fits_torch() -> None:
    seeds = {derive_seed(a, b, c) for a in (-1, 0, 1) for b in ("order", "crop") for c in range(5)}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**63 for seed in seeds)
