"""The session without a socket: messages in, effects out."""

from typing import Any

import msgspec
import pytest

from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.errors import BadChannelError, ForbiddenError, UnauthorizedError, UnavailableError
from kimera_stream.protocol.messages import Error, Expiring, Pong, Refreshed
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming.effects import Authenticate, Begin, Close, Execute, Leave, Open, Send, Wanted
from kimera_stream.streaming.session import Session, SessionLimits, State

ANN = Principal("ann", ALL_ROLES)
UNIX = 2_000_000_000


def session(token: str | None = None, **limits: Any) -> Session:
    return Session(CODECS["json"], SessionLimits(**limits), now=0.0, unix=lambda: UNIX, handshake_token=token)


def say(s: Session, op: str, id: int = 1, now: float = 0.0, **fields: Any) -> list[Any]:
    return s.receive(msgspec.json.encode({"op": op, "id": id, **fields}).decode(), now)


def connected(principal: Principal = ANN, **limits: Any) -> Session:
    s = session(**limits)
    say(s, "connect", 1)
    s.authenticated(1, principal, 0.0)
    s.began(1, [])
    return s


def error_of(effects: list[Any]) -> Error:
    (effect,) = effects
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Error)
    return effect.message


def test_connect_authenticates_then_begins() -> None:
    s = session(token="from the handshake")
    assert say(s, "connect", 7, subs=[{"channel": "geoids", "since": {"epoch": "e", "offset": 3}}]) == [
        Authenticate(7, "from the handshake")
    ]
    wanted = Wanted("geoids", Position("e", 3), None, None)
    assert s.authenticated(7, ANN, 0.0) == [Begin(7, ANN, (wanted,))]
    assert s.began(7, []) == []
    assert s.state is State.CONNECTED
    assert set(s.channels) == {"geoids"}


def test_a_token_in_connect_goes_before_the_handshakes() -> None:
    s = session(token="old")
    assert say(s, "connect", 1, token="new") == [Authenticate(1, "new")]


def test_anything_before_connect_is_a_violation() -> None:
    s = session()
    reply, close = say(s, "ping", 4)
    assert (reply.message.id, reply.message.code) == (4, "bad_request")
    assert close == Close(CloseCode.PROTOCOL_VIOLATION, "protocol_violation")
    assert say(s, "connect", 5) == []


def test_what_cannot_be_read_before_connect_is_only_an_error() -> None:
    s = session()
    assert error_of(s.receive("{", 0.0)).id is None
    assert error_of(say(s, "nonsense", 2)).code == "unknown_op"
    assert say(s, "connect", 3) == [Authenticate(3, None)]


def test_connect_timeout() -> None:
    s = session(connect_timeout=10)
    assert s.next_deadline == 10
    assert s.timer(9.9) == []
    assert s.timer(10.0) == [Close(CloseCode.CONNECT_TIMEOUT, "connect_timeout")]
    assert s.next_deadline is None


def test_a_connected_session_does_not_time_out() -> None:
    assert connected().next_deadline is None


@pytest.mark.parametrize(
    ("error", "code"),
    [(UnauthorizedError("token: no"), CloseCode.UNAUTHORIZED), (ForbiddenError("no"), CloseCode.FORBIDDEN)],
)
def test_refused_authentication_closes(error: Any, code: CloseCode) -> None:
    s = session()
    say(s, "connect", 1)
    reply, close = s.authenticated(1, error, 0.0)
    assert (reply.message.id, reply.message.code) == (1, error.code)
    assert close.code == code


def test_an_authenticator_out_of_order_lets_the_client_try_again() -> None:
    s = session()
    say(s, "connect", 1)
    say(s, "ping", 2)
    replies = s.authenticated(1, UnavailableError("later", retry_after=1), 0.0)
    assert [(r.message.id, r.message.code) for r in replies] == [(1, "unavailable"), (2, "unavailable")]
    assert say(s, "connect", 3) == [Authenticate(3, None)]


def test_a_principal_without_roles_is_refused() -> None:
    s = session()
    say(s, "connect", 1)
    reply, close = s.authenticated(1, Principal("x", frozenset()), 0.0)
    assert (reply.message.code, close.code) == ("forbidden", CloseCode.FORBIDDEN)


def test_commands_that_come_early_wait_for_connect_in_order() -> None:
    s = session()
    say(s, "connect", 1)
    assert say(s, "subscribe", 2, channel="geoids") == []
    assert say(s, "ping", 3) == []
    s.authenticated(1, ANN, 0.0)
    first, second = s.began(1, [])
    assert first == Open(2, Wanted("geoids", None, None, None))
    assert isinstance(second, Execute)


def test_connecting_twice_is_a_conflict() -> None:
    assert error_of(say(connected(), "connect", 2)).code == "conflict"


@pytest.mark.parametrize(
    ("op", "fields", "role"),
    [
        ("publish", {"geoid": {"text": "x"}}, "publish"),
        ("delete", {"geoid_id": "x"}, "publish"),
        ("resolve", {"contradiction_id": "x", "decision": "buffer"}, "resolve"),
        ("subscribe", {"channel": "geoids"}, "subscribe"),
        ("history", {"channel": "geoids", "limit": 1}, "subscribe"),
        ("presence", {"channel": "geoids"}, "subscribe"),
        ("watch", {"watch": "w", "kinds": []}, "subscribe"),
        ("unwatch", {"watch": "w"}, "subscribe"),
        ("ack", {"channel": "geoids", "offset": 1, "name": "n"}, "subscribe"),
    ],
)
def test_each_command_needs_its_role(op: str, fields: dict[str, Any], role: Any) -> None:
    without = connected(Principal("p", ALL_ROLES - {role, "admin"}))
    assert error_of(say(without, op, 2, **fields)).code == "forbidden"
    assert without.in_flight == 0
    for roles in ({role}, {"admin"}):
        (effect,) = say(connected(Principal("p", frozenset(roles))), op, 2, **fields)
        assert isinstance(effect, Execute | Open)


def test_subs_of_connect_need_the_role_too() -> None:
    s = session()
    say(s, "connect", 1, subs=[{"channel": "geoids"}])
    (begin,) = s.authenticated(1, Principal("p", frozenset({"publish"})), 0.0)
    assert [(sub.code, sub.channel) for sub in begin.subs] == [("forbidden", "geoids")]


def test_an_id_in_flight_cannot_be_used_again() -> None:
    s = connected()
    assert isinstance(say(s, "ping", 2)[0], Execute)
    assert error_of(say(s, "ping", 2)).code == "conflict"
    assert s.done(2, Pong(id=2, epoch="e", offset=0)) == [Send(Pong(id=2, epoch="e", offset=0))]
    assert isinstance(say(s, "ping", 2)[0], Execute)


def test_too_many_in_flight_is_overload() -> None:
    s = connected(in_flight=3)
    for id in (2, 3, 4):
        assert isinstance(say(s, "ping", id)[0], Execute)
    error = error_of(say(s, "ping", 5))
    assert (error.code, error.temporary, error.id) == ("overloaded", True, 5)
    s = connected(in_flight_bytes=100)
    assert isinstance(say(s, "publish", 2, geoid={"text": "x" * 40})[0], Execute)
    assert error_of(say(s, "publish", 3, geoid={"text": "x" * 40})).code == "overloaded"
    s.done(2, ForbiddenError("no"))
    assert isinstance(say(s, "publish", 4, geoid={"text": "x" * 40})[0], Execute)


def test_rate_limit() -> None:
    s = connected(commands_per_second=10, commands_burst=5)  # connect took one
    for id in range(2, 6):
        assert isinstance(say(s, "ping", id)[0], Execute)
    error = error_of(say(s, "ping", 6))
    assert (error.id, error.code, error.temporary, error.retry_after) == (6, "rate_limited", True, 0.1)
    assert isinstance(say(s, "ping", 7, now=0.11)[0], Execute)
    assert error_of(say(s, "ping", 8, now=0.11)).code == "rate_limited"


def test_broken_messages_count_towards_the_rate() -> None:
    s = connected(commands_per_second=1, commands_burst=3)
    assert [error_of(s.receive("{", 0.0)).code for _ in range(3)] == ["bad_request", "bad_request", "rate_limited"]


def test_subscriptions_are_limited_and_unique() -> None:
    s = connected(subscriptions=2)
    for id, channel in ((2, "geoids"), (3, "scars")):
        say(s, "subscribe", id, channel=channel)
        s.opened(id, channel)
    assert error_of(say(s, "subscribe", 4, channel="geoids")).code == "already_subscribed"
    assert error_of(say(s, "subscribe", 5, channel="stats")).code == "limit_exceeded"
    assert say(s, "unsubscribe", 6, channel="geoids") == [Leave(6, "geoids")]
    assert error_of(say(s, "unsubscribe", 7, channel="geoids")).code == "not_subscribed"
    assert isinstance(say(s, "subscribe", 8, channel="stats")[0], Open)


def test_a_failed_subscription_gives_its_place_back() -> None:
    s = connected(subscriptions=1)
    say(s, "subscribe", 2, channel="nope")
    assert error_of(s.opened(2, "nope", BadChannelError("channel: no"))).id == 2
    assert isinstance(say(s, "subscribe", 3, channel="geoids")[0], Open)


def test_commands_on_a_channel_that_is_being_opened_wait_for_it() -> None:
    s = connected()
    assert isinstance(say(s, "subscribe", 2, channel="geoids")[0], Open)
    assert say(s, "unsubscribe", 3, channel="geoids") == []
    assert say(s, "subscribe", 4, channel="geoids") == []
    assert s.opened(2, "geoids") == [Leave(3, "geoids"), Open(4, Wanted("geoids", None, None, None))]
    assert say(s, "unsubscribe", 5, channel="geoids") == []
    assert s.opened(4, "geoids") == [Leave(5, "geoids")]


@pytest.mark.parametrize(
    "since",
    [
        {},
        {"epoch": "e"},
        {"offset": 1},
        {"epoch": 1, "offset": 1},
        {"epoch": "e", "offset": "1"},
        {"cursor": 1},
        {"cursor": "c", "epoch": "e"},
    ],
)
def test_a_position_that_is_none(since: dict[str, Any]) -> None:
    error = error_of(say(connected(), "subscribe", 2, channel="geoids", since=since))
    assert error.code == "bad_request"
    assert error.message.startswith("since")


def test_expiry_is_announced_and_enforced_unless_refreshed() -> None:
    s = connected(Principal("ann", ALL_ROLES, UNIX + 100))
    assert s.next_deadline == 70
    assert s.timer(70) == [Send(Expiring(expires=UNIX + 100))]
    assert s.next_deadline == 100
    assert say(s, "refresh", 2, token="new") == [Authenticate(2, "new")]
    assert s.authenticated(2, Principal("ann", ALL_ROLES, UNIX + 500), 80.0) == [
        Send(Refreshed(id=2, expires=UNIX + 500))
    ]
    assert s.timer(100) == []
    assert s.timer(10_000) == [Close(CloseCode.TOKEN_EXPIRED, "token_expired")]


def test_a_refresh_that_fails_changes_nothing() -> None:
    s = connected(Principal("ann", ALL_ROLES, UNIX + 100))
    say(s, "refresh", 2, token="x")
    assert error_of(s.authenticated(2, UnauthorizedError("token: no"), 0.0)).code == "unauthorized"
    say(s, "refresh", 3, token="x")
    assert error_of(s.authenticated(3, Principal("bob", ALL_ROLES), 0.0)).code == "forbidden"
    assert s.state is State.CONNECTED
    assert s.timer(100)[0].code == CloseCode.TOKEN_EXPIRED


def test_a_refresh_cannot_keep_what_its_token_does_not_allow() -> None:
    s = connected(Principal("ann", ALL_ROLES, UNIX + 100))
    say(s, "refresh", 2, token="x")
    assert error_of(s.authenticated(2, Principal("ann", frozenset(), UNIX + 500), 0.0)).code == "forbidden"
    say(s, "subscribe", 3, channel="geoids")
    s.opened(3, "geoids")
    say(s, "refresh", 4, token="x")
    publisher = Principal("ann", frozenset({"publish"}), UNIX + 500)
    assert error_of(s.authenticated(4, publisher, 0.0)).code == "forbidden"
    say(s, "unsubscribe", 5, channel="geoids")
    assert s.timer(99)[0].message.expires == UNIX + 100, "the former token holds, and no longer"
    say(s, "refresh", 6, token="x")
    assert s.authenticated(6, publisher, 0.0) == [Send(Refreshed(id=6, expires=UNIX + 500))]
    assert error_of(say(s, "subscribe", 7, channel="geoids")).code == "forbidden"


def test_drain_waits_for_what_is_in_flight() -> None:
    s = connected()
    say(s, "ping", 2)
    assert s.drain() == []
    assert error_of(say(s, "ping", 3)).code == "unavailable"
    reply, close = s.done(2, Pong(id=2, epoch="e", offset=1))
    assert isinstance(reply, Send)
    assert close == Close(CloseCode.SHUTDOWN, "shutdown")
    assert connected().drain() == [Close(CloseCode.SHUTDOWN, "shutdown")]
    assert session().drain() == [Close(CloseCode.SHUTDOWN, "shutdown")]


def test_a_drain_ends_a_connection_whose_authenticator_is_out_of_order() -> None:
    s = session()
    say(s, "connect", 1)
    say(s, "ping", 2)
    assert s.drain() == []
    *replies, close = s.authenticated(1, UnavailableError("later", retry_after=1), 0.0)
    assert [r.message.id for r in replies] == [1, 2]
    assert close == Close(CloseCode.SHUTDOWN, "shutdown"), "4504 would come next, which tells the client to stay away"


def test_a_connection_that_is_sent_elsewhere_is_answered_first() -> None:
    s = connected()
    say(s, "ping", 2)
    assert s.drain(CloseCode.REBALANCE) == []
    assert "connect again" in error_of(say(s, "ping", 3)).message
    _, close = s.done(2, Pong(id=2, epoch="e", offset=1))
    assert close == Close(CloseCode.REBALANCE, "rebalance")


def test_a_token_that_is_revoked_closes_at_once() -> None:
    s = connected()
    say(s, "ping", 2)
    assert s.revoked() == [Close(CloseCode.TOKEN_EXPIRED, "token_revoked")]
    assert s.revoked() == []


def test_the_wrong_frame_type_closes() -> None:
    assert connected().receive(b"{}", 0.0) == [Close(CloseCode.UNSUPPORTED_DATA, "unsupported_data")]


def test_results_after_the_end_mean_nothing() -> None:
    s = connected()
    say(s, "ping", 2)
    say(s, "subscribe", 3, channel="geoids")
    s.closed()
    assert s.done(2, Pong(id=2, epoch="e", offset=1)) == []
    assert s.opened(3, "geoids") == []
    assert s.timer(1e9) == []
    assert s.drain() == []
    assert say(s, "ping", 4) == []
