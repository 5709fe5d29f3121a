"""HTML that is escaped by construction: text becomes markup only through `tag`."""

from __future__ import annotations

import html
from collections.abc import Mapping
from urllib.parse import quote


class Markup(str):
    """Text that is HTML already; every other `str` is escaped when it is put into a tag."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """The element `name` with its children and attributes; both escaped unless they are `Markup`.

    `class_` is written as class, `data_key` as data-key. Attributes and children that are None are left out.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in {"meta", "input", "br"}:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: str | None) -> Markup:
    """The children one after the other, escaped unless they are `Markup`."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(child, quote=False)
            for child in children
            if child is not None
        )
    )


def section(title: str, *children: str | None) -> Markup:
    """A part of the page under its title."""
    return tag("section", tag("h2", title), *children)


def fact_list(facts: Mapping[str, str]) -> Markup:
    """Names and what is known of them, a line each."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()))


def link(path: str) -> str:
    """The address of `path`, relative to the report, whatever characters it holds."""
    return "./" + quote(path.removeprefix("./"))


def _written(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)
