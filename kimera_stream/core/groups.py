"""Which statements are compared with which: all with all, or only those of one session, one agent, one principal."""

from typing import Literal, TypeAlias

from kimera_stream.core.interfaces import StoredGeoid

Within: TypeAlias = Literal["all", "session", "agent", "principal"]


def group_of(stored: StoredGeoid, within: Within) -> str | None:
    """The group of a statement; None for those that name none, which are a group of their own."""
    if within == "session":
        return stored.geoid.session_id
    if within == "agent":
        return stored.geoid.originator_agent_id
    return stored.principal if within == "principal" else None
