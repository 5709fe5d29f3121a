"""Kept: resized images, kept for the next time they are asked for, up to so many bytes in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from nestling.data.images import Images, PixelArray, fit_all

AT_MOST = 2 * 1024**3
"""Bytes for all splits and resolutions of a process. A search of once-for-all's 25 resolutions over pictures
on disk would otherwise keep some 2.4 GB for each thousand of them."""


@dataclass(slots=True)
class _Resized:
    """Pictures at one side, and when they were last used, counted in uses of all."""

    array: NDArray[np.uint8]
    used: int


@dataclass(slots=True, eq=False)
class Kept:
    """Pictures by whose they are and by their side; where room is needed, those longest unused go.

    Those of an owner that nobody has any more go with it.

    Attributes:
        at_most: bytes that are kept.
    """

    at_most: int = AT_MOST
    _of: WeakKeyDictionary[object, dict[int, _Resized]] = field(
        default_factory=WeakKeyDictionary, repr=False, init=False
    )
    _uses: int = field(default=0, repr=False, init=False)

    @property
    def held(self) -> int:
        """How many bytes are kept now."""
        return sum(resized.array.nbytes for sides in self._of.values() for resized in sides.values())

    def fitted(self, images: Images, side: int, *, whose: object) -> NDArray[np.uint8] | None:
        """All `images` at `side`, `(N, side, side, 3)`; None where they alone are too many to be kept.

        Args:
            images: always the same for the same `whose`.
            side: in px.
            whose: of a type that compares by identity; held weakly.

        Raises:
            DataError: a damaged picture.
        """
        if isinstance(images, PixelArray) and images.pixels.shape[1] == side:
            return images.pixels  # there anyway
        size = len(images) * side * side * 3
        if size > self.at_most:
            return None
        self._uses += 1
        sides = self._of.setdefault(whose, {})
        if side in sides:
            sides[side].used = self._uses
        else:
            self._make_room(size)
            sides[side] = _Resized(fit_all(images, side), self._uses)
        return sides[side].array

    def _make_room(self, size: int) -> None:
        """Lets go of what was longest unused until `size` bytes more may be kept."""
        while self.held + size > self.at_most:
            every = (
                (resized.used, sides, side) for sides in self._of.values() for side, resized in sides.items()
            )
            _, sides, side = min(every, key=lambda one: one[0])
            del sides[side]
