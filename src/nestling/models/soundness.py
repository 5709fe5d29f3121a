"""Refusing a space whose subnets could not be lent weights, or would be lent the wrong ones."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from nestling.models.building import Build, own_tables
from nestling.models.layouts import FindLayout, find_layout
from nestling.models.lending import LendingError, lend, lend_buffers, plan_cuts
from nestling.models.looking import Look, cost_of, differing_settings, look_at
from nestling.models.probing import RESOLUTION
from nestling.space import Arch, Choice, SearchSpace, SpaceError, Value

_DRAWN = 3
_TRIED_PER_DRAWN = 4


def check(
    space: SearchSpace,
    build: Build,
    *,
    layout: FindLayout = find_layout,
    resolution: int = RESOLUTION,
    seed: int = 0,
) -> None:
    """Refuses a space that would lend wrongly; silent where nothing was found.

    Every choice is tried in the smallest arch in which it counts, each value against the next. Every value is
    built once among the others of its rank, and `seed` draws archs on top: each must fit into the largest
    network, and five of all are run without numbers.

    Args:
        space: the choices.
        build: makes the plain network of an arch.
        layout: how the axes of an arch's network are made of parts.
        resolution: side of the images in pixels, where the space has no `resolution`.
        seed: of the archs drawn.

    Raises:
        SpaceError: a network cannot be built, does not fit into the largest one or does not run; a table that
            is not the same whenever it is made; a choice that changes nothing, there or anywhere; values
            that are not cheapest first; one arch with two networks. Choices and values are named, and what
            would do.
    """
    look = functools.partial(_look_or_blame, space, build)
    rng = random.Random(seed)
    largest, smallest = look(space.largest), look(space.smallest)
    drawn = [look(space.sample(rng)) for _ in range(_DRAWN)]
    for other in (largest, smallest):
        _check_repeats(build, other)
    _check_choices(space, build, smallest, resolution=resolution)
    for other in drawn:
        counting = [c for c in space.open_choices if _rules(c) and not space.is_idle(c, other.arch)]
        for choice in rng.sample(counting, min(_TRIED_PER_DRAWN, len(counting))):
            _check_choice(space, build, choice, base=other, resolution=resolution)
    ranks = max((len(c.values) for c in space.open_choices if _rules(c)), default=1)
    middle = [
        look(space.canonical({c.name: c.values[min(rank, len(c.values) - 1)] for c in space.choices}))
        for rank in range(1, ranks - 1)
    ]
    for other in (smallest, *drawn, *middle):
        _check_fit(space, build, largest, other, layout=layout)
    for other in (largest, smallest, *drawn):
        cost_of(other, resolution)


def _look_or_blame(space: SearchSpace, build: Build, arch: Arch) -> Look:
    """The network of `arch`.

    Raises:
        SpaceError: it cannot be built; the decisions that are to blame are named.
    """
    try:
        return look_at(build, arch)
    except SpaceError as error:
        raise _blamed(space, arch, error, lambda closer: look_at(build, closer)) from error


def _blamed(
    space: SearchSpace, arch: Arch, error: SpaceError, attempt: Callable[[Arch], object]
) -> SpaceError:
    """`error` of `attempt(arch)`, told of as few decisions as bring it about beside the largest values."""
    for choice in space.open_choices:
        closer = space.canonical({**arch, choice.name: choice.values[-1]})
        if closer != arch:
            try:
                attempt(closer)
            except SpaceError as still:
                arch, error = closer, still
    guilty = [f"{c.name} = {arch[c.name]!r}" for c in space.choices if arch[c.name] != space.largest[c.name]]
    if not guilty:
        return error
    cause = error.__cause__ or error
    return SpaceError(
        f"{', '.join(guilty)}, where all else is as large as can be: {_said(cause)}; "
        f"take {'the value' if len(guilty) == 1 else 'one of these values'} out of the space"
    )


def _check_repeats(build: Build, look: Look) -> None:
    """Refuses a `build` whose network, or a table in it, does not follow from the arch alone."""
    again = look_at(build, look.arch)
    if not look.is_like(again):
        differ = [n for n in {**look.shapes, **again.shapes} if look.shapes.get(n) != again.shapes.get(n)]
        places = ", ".join((differ or differing_settings(look, again))[:3]) or "the order of its layers"
        raise SpaceError(
            f"two builds of {look.arch.to_json()} differ in {places}; the network must follow from the arch "
            "alone, not from chance or from what was built before"
        )
    tables = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tables.append(own_tables(build, look.arch, look.network))
    for name, table in tables[0].items():
        if not _equal(table, tables[1].get(name)):
            raise SpaceError(
                f"{name} is not kept in the network's state and has other numbers whenever it is made: no "
                "subnet would have those of the largest network; make it a parameter or a persistent buffer"
            )


def _check_choices(space: SearchSpace, build: Build, smallest: Look, *, resolution: int) -> None:
    """Checks each open choice in the smallest arch in which it counts."""
    bases = {smallest.arch: smallest}
    for choice in space.open_choices:
        arch = smallest_with(space, choice)
        if _rules(choice):
            if arch not in bases:
                bases[arch] = _look_or_blame(space, build, arch)
            _check_choice(space, build, choice, base=bases[arch], resolution=resolution)


def _check_choice(space: SearchSpace, build: Build, choice: Choice, *, base: Look, resolution: int) -> None:
    """Refuses a choice that changes nothing where it counts, or whose values are out of order."""
    looks = [_with(space, build, base, choice, value) for value in choice.values]
    for low, high in itertools.pairwise(looks):
        cheap, dear = low.arch[choice.name], high.arch[choice.name]
        if _compute_alike(build, low, high, resolution=resolution):
            raise SpaceError(
                f"{choice.name} lists {list(choice.values)}, but {cheap!r} and {dear!r} give the same network"
                + _remedy(space, build, choice, base=base, values=(cheap, dear), resolution=resolution)
            )
        if high.params < low.params:
            small, large = cost_of(low, resolution), cost_of(high, resolution)
            if large.macs < small.macs:
                raise SpaceError(
                    f"{choice.name} lists {list(choice.values)}, but {dear!r} costs less than {cheap!r}: "
                    f"{large.macs:,} multiply-accumulates and {large.params:,} parameters, not "
                    f"{small.macs:,} and {small.params:,}; list the values from cheapest to dearest"
                )


def _remedy(
    space: SearchSpace,
    build: Build,
    choice: Choice,
    *,
    base: Look,
    values: tuple[Value, Value],
    resolution: int,
) -> str:
    """What to do about a choice whose `values` give one network in `base`: the end of a sentence."""

    def counts_in(arch: Arch) -> bool:
        pair = [look_at(build, space.canonical({**arch, choice.name: value})) for value in values]
        return not _compute_alike(build, pair[0], pair[1], resolution=resolution)

    for other in space.open_choices:
        now = base.arch[other.name]
        for value in other.values:
            if other is choice or not (_is_whole(value) and _is_whole(now) and value > now):
                continue
            arch = space.canonical({**base.arch, other.name: value})
            if not space.is_idle(choice, arch) and counts_in(arch):
                return (
                    f" where {other.name} is {now}; one network must have one name, so give the choice "
                    f'needs = [{{ choice = "{other.name}", at_least = {value} }}]'
                )
    if counts_in(space.largest):
        return (
            f" in the arch {base.arch.to_json()}, though not in the largest; one network must have one name, "
            "so give the choice `needs`, or make it constant"
        )
    return "; make it constant, or let the family's `build` read it"


def smallest_with(space: SearchSpace, choice: Choice) -> Arch:
    """The smallest arch in which `choice` counts.

    Raises:
        SpaceError: there is none.
    """
    decisions = dict(space.smallest)
    pending = list(choice.needs)
    while pending:
        need = pending.pop()
        other = space.by_name[need.choice]
        enough = [v for v in other.values if isinstance(v, int | float) and v >= need.at_least]
        if not enough:
            raise SpaceError(
                f"{choice.name} needs {need.choice} of at least {need.at_least}, whose values are "
                f"{list(other.values)}: it never counts; make it constant, or the need smaller"
            )
        if decisions[other.name] not in enough:
            decisions[other.name] = enough[0]
        pending += other.needs
    return space.canonical(decisions)


def _with(space: SearchSpace, build: Build, base: Look, choice: Choice, value: Value) -> Look:
    arch = space.canonical({**base.arch, choice.name: value})
    return base if arch == base.arch else _look_or_blame(space, build, arch)


def _rules(choice: Choice) -> bool:
    """Whether the choice must change the network: a resolution changes images, a precision numbers."""
    return choice.name != "resolution" and choice.name.rpartition(".")[2] != "precision"


def _compute_alike(build: Build, first: Look, second: Look, *, resolution: int) -> bool:
    """Whether nothing tells one network from the other: neither layers nor work nor tables."""
    if not first.is_like(second) or cost_of(first, resolution) != cost_of(second, resolution):
        return False
    one, other = (own_tables(build, look.arch, look.network) for look in (first, second))
    return all(_equal(table, other.get(name)) for name, table in one.items())


def _check_fit(space: SearchSpace, build: Build, largest: Look, look: Look, *, layout: FindLayout) -> None:
    """Refuses a network that cannot borrow from the largest one; the decisions to blame are named."""

    def borrow(borrower: Look) -> None:
        try:
            _borrow(largest, borrower, layout=layout)
        except LendingError as error:
            raise SpaceError(f"the network of {borrower.arch.to_json()} does not fit: {error}") from error

    try:
        borrow(look)
    except SpaceError as error:
        raise _blamed(space, look.arch, error, lambda arch: borrow(look_at(build, arch))) from error


def _borrow(largest: Look, borrower: Look, *, layout: FindLayout) -> None:
    """Cuts every tensor as a supernet would.

    Raises:
        LendingError: one cannot be cut.
    """
    large, small = (
        dict(network.named_parameters(remove_duplicate=False))
        | dict(network.named_buffers(remove_duplicate=False))
        for network in (largest.network, borrower.network)
    )
    layouts = (layout(largest.network, largest.arch), layout(borrower.network, borrower.arch))
    cuts = plan_cuts(large, small, layouts=layouts)
    lend(large, dict(borrower.network.named_parameters(remove_duplicate=False)), cuts=cuts)
    lend_buffers(large, borrower.network, cuts=cuts)


def _equal(table: Tensor, other: Tensor | None) -> bool:
    return other is not None and table.shape == other.shape and bool(torch.equal(table, other))


def _is_whole(value: Value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
