"""What can be built: choices, archs (one value for each choice) and search spaces. Imports no torch."""

from nestling.space.arch import Arch, Choice, Need, Value
from nestling.space.files import load_space, save_space, space_toml
from nestling.space.search_space import SearchSpace, SpaceError

__all__ = [
    "Arch",
    "Choice",
    "Need",
    "SearchSpace",
    "SpaceError",
    "Value",
    "load_space",
    "save_space",
    "space_toml",
]
