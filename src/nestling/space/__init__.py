"""What can be built: choices, archs (one value for each choice) and search spaces. Imports no torch."""

from nestling.space.arch import Arch, Choice, Need, Value, is_idle
from nestling.space.files import load_space, save_space, space_toml
from nestling.space.search_space import SearchSpace, SpaceError

__all__ = [
    "Arch",
    "Choice",
    "Need",
    "SearchSpace",
    "SpaceError",
    "Value",
    "is_idle",
    "load_space",
    "save_space",
    "space_toml",
]
