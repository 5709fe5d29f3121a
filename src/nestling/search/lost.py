"""Candidates whose process was lost: how often that was, and whether the one that keeps watch outlived it.

Where it did, the candidate is suspected of having killed its process. Where it did not, all were ended at
once, mostly by a person or a machine that meant the command: such losses, unseen ones, count apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nestling.owners import told
from nestling.search import tables

RETRIES = 3
"""How often an arch is begun again whose process was lost; after that it is recorded as failed."""
UNSEEN = 10
"""How often an arch may be lost unseen before it is recorded as failed.

More than `RETRIES`, after which a worker should evaluate it: then only what ends all at once counts here.
"""
LOST = "the process that evaluated it was lost"
"""What the reason of an arch that failed in this way begins with."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What speaks against a candidate: how often it was `begun`, `unseen` losses apart, and how often those.

    Attributes:
        begun: how often.
        unseen: likewise.
        reason: why it has failed; empty where it is tried again.
    """

    begun: int
    unseen: int
    reason: str


def losses_of(connection: sa.Connection, row: sa.Row[Any], *, watch: str) -> Losses:
    """What speaks against the candidate `row` now that its process is lost.

    Args:
        connection: to the database.
        row: of the table of candidates.
        watch: who keeps watch now.
    """
    table = tables.losses
    known = connection.execute(sa.select(table).where(_one(row.study_id, row.position))).first()
    is_seen = known is not None and known.watch == watch
    unseen = (0 if known is None else int(known.unseen)) + (not is_seen)
    begun = int(row.begun) - (not is_seen)
    if begun <= RETRIES and unseen < UNSEEN:
        return Losses(begun, unseen, "")
    often = f"{begun} times" if begun > RETRIES else f"{unseen} times, each time with the whole search"
    reason = f"{LOST} {often}, last {told(row.owner)}: it was killed, or its machine was"
    return Losses(begun, unseen, reason)


def note_losses(connection: sa.Connection, study: int, position: int, *, watch: str, unseen: int) -> None:
    """Keeps who watches a candidate, and how often it was lost unseen."""
    connection.execute(sa.delete(tables.losses).where(_one(study, position)))
    values = {"study_id": study, "position": position, "watch": watch, "unseen": unseen}
    connection.execute(sa.insert(tables.losses).values(**values))


def note_watch(connection: sa.Connection, study: int, position: int, *, watch: str) -> None:
    """Keeps who watches a candidate that is begun."""
    known = sa.update(tables.losses).where(_one(study, position)).values(watch=watch)
    if not connection.execute(known).rowcount:
        note_losses(connection, study, position, watch=watch, unseen=0)


def count_suspects(connection: sa.Connection, study: int) -> int:
    """How many candidates were lost unseen more than `RETRIES` times, and are not done."""
    table, losses = tables.candidates, tables.losses
    both = sa.and_(table.c.study_id == losses.c.study_id, table.c.position == losses.c.position)
    asked = (
        sa.select(sa.func.count())
        .select_from(table.join(losses, both))
        .where(table.c.study_id == study, table.c.state != "done", losses.c.unseen > RETRIES)
    )
    return int(connection.execute(asked).scalar_one())


def _one(study: int, position: int) -> sa.ColumnElement[bool]:
    table = tables.losses
    return sa.and_(table.c.study_id == study, table.c.position == position)
