"""A model of the session under random conversations: every command gets exactly one reply, and the books always balance."""

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.errors import BadChannelError, OverloadedError, UnauthorizedError, UnavailableError
from kimera_stream.protocol.messages import Error, Expiring, Pong, Reply, Unsubscribed
from kimera_stream.streaming.effects import Authenticate, Begin, Close, Execute, Leave, Open, Send
from kimera_stream.streaming.session import Session, SessionLimits, State

CHANNELS = ["geoids", "scars", "field", "geoid:a"]
UNIX = 2_000_000_000
LIMITS = SessionLimits(connect_timeout=10, subscriptions=2, in_flight=4, commands_per_second=10, commands_burst=20)


class Conversation(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.session = Session(CODECS["json"], LIMITS, now=0.0, unix=lambda: UNIX + self.now)
        self.next_id = 1
        self.unanswered: dict[int, int] = {}
        self.authenticating: list[int] = []
        self.beginning: Begin | None = None
        self.opening: list[Open] = []
        self.executing: list[int] = []
        self.open: set[str] = set()
        self.closed: Close | None = None
        self.draining = False
        self.expires: float | None = None

    def take(self, effects: list[Any]) -> None:
        """As ``Connection`` does: what comes of an effect goes after those that are waiting."""
        for effect in effects:
            assert self.closed is None, "nothing follows a close"
            match effect:
                case Send(message):
                    self.sent(message)
                case Authenticate(id, _):
                    self.authenticating.append(id)
                case Begin():
                    assert self.beginning is None
                    self.beginning = effect
                case Open(_, wanted):
                    assert wanted.channel not in self.open
                    assert wanted.channel not in [o.wanted.channel for o in self.opening]
                    self.opening.append(effect)
                case Leave(id, channel):
                    self.open.remove(channel)
                    effects.extend(self.session.done(id, Unsubscribed(id=id, channel=channel)))
                case Execute(command):
                    self.executing.append(command.id)
                case Close():
                    self.closed = effect

    def sent(self, message: Any) -> None:
        if isinstance(message, Reply):
            assert isinstance(message, Error) or message.id is not None
            if message.id is not None:
                assert self.unanswered[message.id] > 0, "one reply per command"
                self.unanswered[message.id] -= 1
        else:
            assert isinstance(message, Expiring)

    def say(self, op: str, id: int | None = None, **fields: Any) -> None:
        if id is None:
            id, self.next_id = self.next_id, self.next_id + 1
        if self.closed is None:
            self.unanswered[id] = self.unanswered.get(id, 0) + 1
        data = msgspec.json.encode({"op": op, "id": id, **fields}).decode()
        self.take(self.session.receive(data, self.now))

    @initialize(subs=st.lists(st.sampled_from(CHANNELS), max_size=4), early=st.booleans())
    def connect(self, subs: list[str], early: bool) -> None:
        self.say("connect", subs=[{"channel": c} for c in subs])
        if early:
            self.say("ping")

    @rule(channel=st.sampled_from(CHANNELS), op=st.sampled_from(["subscribe", "unsubscribe"]))
    def change(self, channel: str, op: str) -> None:
        self.say(op, channel=channel)

    @rule(op=st.sampled_from(["ping", "refresh", "nonsense", "connect"]))
    def command(self, op: str) -> None:
        self.say(op, **({"token": "t"} if op == "refresh" else {}))

    @precondition(lambda self: self.executing)
    @rule()
    def reuse_an_id(self) -> None:
        self.say("ping", self.executing[0])

    @precondition(lambda self: self.authenticating)
    @rule(outcome=st.sampled_from(["ann", "ann", "expiring", "down", "down", "bad"]))
    def authenticated(self, outcome: str) -> None:
        id = self.authenticating.pop(0)
        result: Any = {
            "ann": Principal("ann", ALL_ROLES),
            "expiring": Principal("ann", ALL_ROLES, int(UNIX + self.now + 60)),
            "down": UnavailableError("down"),
            "bad": UnauthorizedError("bad"),
        }[outcome]
        was_open = self.closed is None
        self.take(self.session.authenticated(id, result, self.now))
        if outcome == "down" and was_open and self.session.state is State.WAITING:
            self.say("connect")

    @precondition(lambda self: self.beginning)
    @rule(fail=st.booleans())
    def began(self, fail: bool) -> None:
        begin, self.beginning = self.beginning, None
        assert begin is not None
        wanted = [sub.channel for sub in begin.subs or () if not isinstance(sub, Error)]
        failed = wanted[:1] if fail else []
        if self.closed is None:
            self.open |= set(wanted) - set(failed)
            self.unanswered[begin.id] -= 1
        self.take(self.session.began(begin.id, failed))

    @precondition(lambda self: self.opening)
    @rule(which=st.integers(0, 3), fail=st.booleans())
    def opened(self, which: int, fail: bool) -> None:
        effect = self.opening.pop(which % len(self.opening))
        channel = effect.wanted.channel
        if self.closed is None and not fail:
            self.open.add(channel)
            self.unanswered[effect.id] -= 1
        error = BadChannelError("channel: no") if fail else None
        self.take(self.session.opened(effect.id, channel, error))

    @precondition(lambda self: self.executing)
    @rule(which=st.integers(0, 3), fail=st.booleans())
    def done(self, which: int, fail: bool) -> None:
        id = self.executing.pop(which % len(self.executing))
        self.take(self.session.done(id, OverloadedError("busy") if fail else Pong(id=id, epoch="e", offset=0)))

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        deadline = self.session.next_deadline
        if deadline is not None and deadline <= self.now:
            self.take(self.session.timer(self.now))

    @rule()
    @precondition(lambda self: not self.draining)
    def drain(self) -> None:
        if self.now > 5:
            self.draining = True
            self.take(self.session.drain())

    @invariant()
    def books_balance(self) -> None:
        if self.closed is not None:
            assert self.session.state is State.CLOSING
            assert self.session.next_deadline is None
            return
        assert self.session.in_flight == sum(self.unanswered.values())
        assert self.session.in_flight <= LIMITS.in_flight
        assert len(self.session.channels) <= LIMITS.subscriptions
        assert self.open <= set(self.session.channels)
        assert self.session._in_flight_bytes >= 0
        if not self.session.in_flight:
            assert self.session._in_flight_bytes == 0
            assert not self.draining, "a drained session closes"


Conversation.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestConversation = Conversation.TestCase
