"""Search spaces in TOML: a row for each stage, a column for each choice.

```toml
family = "mobilenet"
resolution = [24, 32]
stages = [
  { width = [16, 24], depth = [1, 2], kernel = [3, 5], stride = 2, per_block = ["kernel"] },
]
[stem]
width = [8, 16]
```

A value that is not a list is a constant. A column of row 1 is the choice `s1.width`; one that `per_block`
lists is decided block by block, as `s1.b2.kernel`, which counts only where the stage is that deep. Every
other key is a choice of its own, `stem.width`. Columns may have dots too: `conv_dw.precision` is the choice
`s1.conv_dw.precision`, or `s1.b2.conv_dw.precision`. A space that did not come from rows is written as a list
of `choices`.
"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestling.space.arch import Choice, Need, Value
from nestling.space.search_space import SearchSpace, SpaceError

_TOLD = ("family", "title", "source", "published", "stages", "choices")
_NEVER_PER_BLOCK = ("depth", "stride", "width", "block")


def load_space(path: Path) -> SearchSpace:
    """The search space in the TOML file `path`.

    Raises:
        SpaceError: no such file, not TOML, or a row, column or value that cannot be used; it is named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise SpaceError(f"no space file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path} is not TOML: {error}") from None
    try:
        return _space(content)
    except SpaceError as error:
        raise SpaceError(f"{path}: {error}") from None


def save_space(space: SearchSpace, path: Path) -> None:
    """Writes `space` to `path`, from where `load_space` reads the same space.

    Raises:
        OSError: the file could not be written; the one that was there still is.
    """
    content = space_toml(space)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def space_toml(space: SearchSpace) -> str:
    """`space` as a file that `load_space` reads, its choices spelled out one by one."""
    lines = [f"family = {_toml(space.family)}", "", "choices = ["]
    for choice in space.choices:
        needs = ", ".join(f"{{ choice = {_toml(n.choice)}, at_least = {n.at_least} }}" for n in choice.needs)
        tail = f", needs = [{needs}]" if needs else ""
        values = ", ".join(_toml(value) for value in choice.values)
        lines.append(f"  {{ name = {_toml(choice.name)}, values = [{values}]{tail} }},")
    return "\n".join([*lines, "]", ""])


def _space(content: Mapping[str, Any]) -> SearchSpace:
    family = content.get("family")
    if not isinstance(family, str):
        raise SpaceError('family is missing; write, for instance, family = "mobilenet"')
    choices: list[Choice] = []
    for name, value in content.items():
        if name not in _TOLD:
            choices += _globals(name, value)
    for number, row in enumerate(_rows(content, "stages"), start=1):
        choices += _stage(f"s{number}", row)
    for row in _rows(content, "choices"):
        choices.append(_spelled_out(row))
    return SearchSpace(family, tuple(choices))


def _rows(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    rows = content.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SpaceError(f"{name} must be a list of tables, a row each, not {rows!r}")
    return rows


def _globals(name: str, value: Any) -> list[Choice]:
    if isinstance(value, dict):
        return [choice for key, inner in value.items() for choice in _globals(f"{name}.{key}", inner)]
    return [Choice(name, _values(name, value))]


def _stage(stage: str, row: Mapping[str, Any]) -> list[Choice]:
    per_block = row.get("per_block", [])
    columns = {
        choice.name.removeprefix(f"{stage}."): choice.values
        for column, value in row.items()
        if column != "per_block"
        for choice in _globals(f"{stage}.{column}", value)
    }
    known = isinstance(per_block, list) and all(isinstance(c, str) and c in columns for c in per_block)
    if not known or len(set(per_block)) < len(per_block):
        raise SpaceError(
            f"{stage}.per_block is {per_block!r}; it must list columns of its row, each once: {list(columns)}"
        )
    refused = [column for column in per_block if column in _NEVER_PER_BLOCK]
    if refused:
        raise SpaceError(f"{stage}.per_block lists {refused[0]!r}, which a block cannot decide alone")
    depths = columns.get("depth", (1,))
    if not all(_is_whole(depth) and int(depth) >= 1 for depth in depths):
        raise SpaceError(f"{stage}.depth is {list(depths)}; a depth is a whole number of blocks, at least 1")
    choices = [Choice(f"{stage}.{column}", columns[column]) for column in columns if column not in per_block]
    for block in range(1, int(depths[-1]) + 1):
        needs = (Need(f"{stage}.depth", block),) if block > int(depths[0]) else ()
        choices += [Choice(f"{stage}.b{block}.{column}", columns[column], needs) for column in per_block]
    return choices


def _spelled_out(row: Mapping[str, Any]) -> Choice:
    unknown = set(row) - {"name", "values", "needs"}
    if unknown or not isinstance(row.get("name"), str) or not isinstance(row.get("values"), list):
        raise SpaceError(f"a choice has name, values and perhaps needs, not {dict(row)!r}")
    needs = []
    listed = row.get("needs", [])
    for need in listed if isinstance(listed, list) else [listed]:
        if (
            not isinstance(need, dict)
            or set(need) != {"choice", "at_least"}
            or not isinstance(need["choice"], str)
            or not _is_whole(need["at_least"])
        ):
            raise SpaceError(f"{row['name']}: a need is {{ choice = NAME, at_least = NUMBER }}, not {need!r}")
        needs.append(Need(need["choice"], need["at_least"]))
    return Choice(row["name"], _plain(row["name"], row["values"]), tuple(needs))


def _values(name: str, value: Any) -> tuple[Value, ...]:
    values = _plain(name, value if isinstance(value, list) else [value])
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and list(numbers) != sorted(numbers):
        raise SpaceError(f"{name} is {list(values)}; write numbers from cheapest to dearest, ascending")
    return values


def _plain(name: str, values: list[Any]) -> tuple[Value, ...]:
    if not values:
        raise SpaceError(f"{name} has no value; give it at least one")
    for value in values:
        if not isinstance(value, int | float | str) or value != value:
            raise SpaceError(f"{name} has the value {value!r}; a value is a number, a word or a truth value")
    if len(set(values)) < len(values):
        raise SpaceError(f"{name} lists a value twice: {values}")
    return tuple(values)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
