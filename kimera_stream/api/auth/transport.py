"""Where a token comes from, and which web pages may connect."""

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from kimera_stream.infrastructure.settings import is_loopback
from kimera_stream.protocol.errors import UnauthorizedError
from kimera_stream.protocol.messages import TOKEN_SUBPROTOCOL_PREFIX

_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def extract_token(
    headers: Mapping[str, str] | None = None,
    subprotocols: Sequence[str] = (),
    connect: str | None = None,
) -> str | None:
    """The token of a request, None where it brings none.

    Args:
        headers: Request headers by lower-case name (Starlette's ``Headers`` will do).
        subprotocols: WebSocket subprotocols offered; ``kimera.token.<token>`` is one of them.
        connect: ``token`` of the command ``connect``; goes before the other two, the header before the subprotocol.

    Raises:
        UnauthorizedError: an ``Authorization`` header that is not ``Bearer TOKEN``, or more than one token as subprotocol.
    """
    if connect is not None:
        return connect
    header = None if headers is None else headers.get("authorization")
    if header is not None:
        scheme, _, token = header.strip().partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or " " in token:
            raise UnauthorizedError("authorization: expected `Authorization: Bearer TOKEN`", field="authorization")
        return token
    return split_subprotocols(subprotocols)[1]


def split_subprotocols(offered: Sequence[str]) -> tuple[list[str], str | None]:
    """The subprotocols that may be chosen from (and echoed), and the token hidden among those offered.

    Raises:
        UnauthorizedError: more than one token is offered.
    """
    tokens = [
        name.removeprefix(TOKEN_SUBPROTOCOL_PREFIX) for name in offered if name.startswith(TOKEN_SUBPROTOCOL_PREFIX)
    ]
    if len(tokens) > 1:
        raise UnauthorizedError("sec-websocket-protocol: expected one token at most", field="token")
    spoken = [name for name in offered if not name.startswith(TOKEN_SUBPROTOCOL_PREFIX)]
    return spoken, (tokens[0] or None) if tokens else None


def origin_allowed(origin: str | None, host: str | None, allowed_origins: Sequence[str] = ()) -> bool:
    """Whether a page of ``origin`` may connect to the server it calls ``host``.

    Browsers name the origin of the page; other clients name none and are judged by their token alone. Pages that this server
    itself serves may connect, and those of the list; ``*`` in the list admits every page.

    Args:
        origin: ``Origin`` header.
        host: ``Host`` header.
        allowed_origins: Further origins, as ``https://app.example.com``.
    """
    if origin is None or "*" in allowed_origins:
        return True
    wanted = _origin(origin)
    if wanted is None:
        return origin.strip().lower() == "null" and "null" in allowed_origins
    if any(_origin(allowed) == wanted for allowed in allowed_origins):
        return True
    scheme, name, port = wanted
    # A proxy may speak TLS for us, so the scheme is the page's; the port has to be the one that was called.
    return host is not None and _host(host, _DEFAULT_PORTS.get(scheme)) == (name, port)


def host_allowed(host: str | None, bound: str) -> bool:
    """Whether a request that calls the server ``host`` can be meant for one that listens on ``bound``.

    A server on a loopback address is called by a loopback name. Another name there means that a page resolved its own name
    to this machine (DNS rebinding) and would pass for a page of ours. On other addresses any name is possible.
    """
    if not is_loopback(bound):
        return True
    called = None if host is None else _host(host, None)
    return called is not None and is_loopback(called[0])


def _origin(origin: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port in comparable form; None where it is no origin."""
    try:
        parts = urlsplit(origin.strip().lower())
        port = parts.port
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, port if port is not None else _DEFAULT_PORTS.get(parts.scheme)


def _host(host: str, default_port: int | None) -> tuple[str, int | None] | None:
    try:
        parts = urlsplit(f"//{host.strip().lower()}")
        port = parts.port
    except ValueError:
        return None
    # A user name or a path in a Host header is somebody trying something.
    if not parts.hostname or "@" in parts.netloc or parts.path or parts.query or parts.fragment:
        return None
    return parts.hostname, port if port is not None else default_port
