"""Channel names: parsing and kinds (section 2 of the contract)."""

import re
from typing import Literal

from kimera_stream.protocol.errors import BadChannelError, BadRequestError
from kimera_stream.protocol.log import ENTITY_CHANNEL_PREFIXES, LATEST_CHANNELS, LOG_CHANNELS

ChannelKind = Literal["log", "latest"]
ID_PATTERN = re.compile(r"[A-Za-z0-9_.~\-]{1,128}")
"""Ids are URL-safe (RFC 3986 unreserved) strings of 1-128 characters."""
OF_AN_ID = "1-128 URL-safe characters (A-Z a-z 0-9 - _ . ~)"
"""The same, for messages."""


def is_id(value: str) -> bool:
    """Whether ``value`` can be the id of a geoid, session, agent or watch."""
    return ID_PATTERN.fullmatch(value) is not None


def check_id(value: str, field: str, *, what: str = "") -> None:
    """Refuse what cannot be an id.

    Args:
        field: Its path in the request.
        what: ``a name of``, where it is called so; for the message.

    Raises:
        BadRequestError: it is empty, too long, or has other characters.
    """
    if not is_id(value):
        raise BadRequestError(f"{field}: expected {f'{what} ' if what else ''}{OF_AN_ID}", field=field)


def channel_kind(name: str, *, max_bytes: int = 255) -> ChannelKind:
    """The kind of the channel ``name``.

    Raises:
        BadChannelError: there is no such channel.
    """
    if name in LOG_CHANNELS:
        return "log"
    if name in LATEST_CHANNELS:
        return "latest"
    if len(name.encode()) > max_bytes:
        raise BadChannelError(f"channel: a channel name has at most {max_bytes} bytes", field="channel")
    for prefix in ENTITY_CHANNEL_PREFIXES:
        if name.startswith(prefix):
            if is_id(name[len(prefix) :]):
                return "log"
            raise BadChannelError(f"channel: {prefix}<id> needs an id of {OF_AN_ID}", field="channel")
    raise BadChannelError(
        "channel: expected one of geoids, contradictions, scars, field, stats, "
        "geoid:<id>, session:<id>, agent:<id>, watch:<id>",
        field="channel",
    )
