"""Kept: resized images, kept for the next time they are asked for, up to so many bytes in all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nestling.data.images import Images, PixelArray, fit_all

AT_MOST = 2 * 1024**3
"""Bytes for all splits and resolutions of a process. A search of once-for-all's 25 resolutions over pictures
on disk would otherwise keep some 2.4 GB for each thousand of them."""


@dataclass(slots=True, eq=False)
class Kept:
    """Pictures by whose they are and by their side; where room is needed, those longest unused go.

    Attributes:
        at_most: bytes that are kept.
    """

    at_most: int = AT_MOST
    _arrays: dict[tuple[object, int], NDArray[np.uint8]] = field(default_factory=dict, repr=False, init=False)

    @property
    def held(self) -> int:
        """How many bytes are kept now."""
        return sum(array.nbytes for array in self._arrays.values())

    def fitted(self, images: Images, side: int, *, whose: object) -> NDArray[np.uint8] | None:
        """All `images` at `side`, `(N, side, side, 3)`; None where they alone are too many to be kept.

        Args:
            images: always the same for the same `whose`.
            side: in px.
            whose: compared by identity; kept as long as the pictures are.

        Raises:
            DataError: a damaged picture.
        """
        if isinstance(images, PixelArray) and images.pixels.shape[1] == side:
            return images.pixels  # there anyway
        size = len(images) * side * side * 3
        if size > self.at_most:
            return None
        array = self._arrays.pop((whose, side), None)
        if array is None:
            while self._arrays and self.held + size > self.at_most:
                del self._arrays[next(iter(self._arrays))]
            array = fit_all(images, side)
        self._arrays[whose, side] = array  # as the last one used
        return array
