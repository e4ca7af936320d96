"""WebSocket close codes of the public contract."""

from enum import IntEnum


class CloseCode(IntEnum):
    """4000-4499: reconnect and resume. 4500-4999: do not reconnect. The rest are the RFC's."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_PAYLOAD = 1007
    POLICY_VIOLATION = 1008
    TOO_BIG = 1009
    INTERNAL = 1011

    SHUTDOWN = 4000
    SLOW_CONSUMER = 4001
    POSITION_LOST = 4002
    TOKEN_EXPIRED = 4003
    NO_PONG = 4004
    REBALANCE = 4005

    UNAUTHORIZED = 4500
    PROTOCOL_VIOLATION = 4501
    FORBIDDEN = 4502
    CONNECTION_LIMIT = 4503
    CONNECT_TIMEOUT = 4504
    ORIGIN_REFUSED = 4505

    @property
    def reason(self) -> str:
        """The close reason that goes with the code: one short word."""
        return self.name.lower()

    @property
    def reconnect(self) -> bool:
        """Whether a client should reconnect and resume."""
        return self < 4500 and self not in _FINAL


_FINAL = frozenset(
    {
        CloseCode.NORMAL,
        CloseCode.PROTOCOL_ERROR,
        CloseCode.UNSUPPORTED_DATA,
        CloseCode.INVALID_PAYLOAD,
        CloseCode.POLICY_VIOLATION,
        CloseCode.TOO_BIG,
    }
)
