from __future__ import annotations

import pytest

from nestling.space import Choice, SearchSpace


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    """Six archs of a toy network."""
    return SearchSpace("mobilenet", (Choice("hidden", (3, 5, 8)), Choice("depth", (1, 2))))
