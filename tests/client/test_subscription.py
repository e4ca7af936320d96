"""The subscription's promise, against a model of a server: in order, exactly once, or a gap that is told."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.client.subscription import Gap, Subscription
from kimera_stream.protocol.messages import Event, SubscribeBody, Subscribed
from kimera_stream.protocol.objects import Position


class Model:
    """A server with one log channel, whose wire can be read up to any message before it breaks."""

    def __init__(self, capacity: int) -> None:
        self.epoch = 1
        self.head = 0
        self.wire: list[Any] = []
        self.sub = Subscription(
            "geoids", since=None, rewind=None, filter=None, capacity=capacity, catch_up=self.catch_up
        )
        self.got: list[tuple[str, int, int]] = []
        self.live = False
        self.subscribe()

    def event(self, offset: int) -> Event:
        return Event(channel="geoids", epoch=str(self.epoch), offset=offset, type="geoid.created", ts=0, data=None)

    def subscribe(self) -> None:
        body = self.sub.body()
        since = body.since
        recovered = since is not None and since["epoch"] == str(self.epoch) and since["offset"] <= self.head
        start = since["offset"] if recovered and since else self.head
        reply = Subscribed(
            channel="geoids",
            epoch=str(self.epoch),
            offset=start,
            was_recovering=since is not None,
            recovered=recovered,
        )
        self.wire = [(body, reply), *(self.event(offset) for offset in range(start + 1, self.head + 1))]
        self.live = True

    async def catch_up(self, sub: Subscription) -> None:
        self.subscribe()
        self.read(len(self.wire))

    def publish(self) -> None:
        self.head += 1
        if self.live:
            self.wire.append(self.event(self.head))

    def read(self, count: int) -> None:
        for item in self.wire[:count]:
            if isinstance(item, Event):
                self.sub.deliver(item)
            else:
                body, reply = item
                self.sub.started(body, reply)
        del self.wire[:count]

    def lose(self) -> None:
        """The connection breaks: what was on the wire is gone. The client comes back."""
        self.subscribe()

    def heartbeat(self) -> None:
        if not self.wire:
            self.sub.reached(str(self.epoch), self.head)

    def repeat(self) -> None:
        """A server that sends something twice is forgiven."""
        if self.live and self.head and not any(not isinstance(item, Event) for item in self.wire):
            self.wire.append(self.event(self.head))

    def new_epoch(self) -> None:
        self.epoch += 1
        self.head = 0
        self.subscribe()


STEPS = st.lists(
    st.sampled_from(
        [("publish",)] * 6
        + [("read", count) for count in (1, 2, 5)]
        + [("take",)] * 3
        + [("lose",), ("heartbeat",), ("repeat",), ("new_epoch",)]
    ),
    max_size=60,
)


async def take(model: Model) -> None:
    """What the consumer gets without waiting."""
    with anyio.move_on_after(0):
        item = await anext(model.sub)
        if isinstance(item, Event):
            model.got.append(("event", int(item.epoch), item.offset))
        elif isinstance(item, Gap):
            model.got.append(("gap", int(item.start.epoch), item.start.offset))


@given(STEPS, st.integers(1, 4))
def test_nothing_is_lost_repeated_or_out_of_order(steps: list[tuple[Any, ...]], capacity: int) -> None:
    async def play() -> Model:
        model = Model(capacity)
        model.read(1)
        for name, *arguments in steps:
            if name == "take":
                await take(model)
            else:
                getattr(model, name)(*arguments)
        # At the end everything settles: all is read and taken.
        for _ in range(len(steps) * 3 + 10):
            model.read(len(model.wire))
            await take(model)
        return model

    model = anyio.run(play)
    last = (1, 0)
    for kind, epoch, offset in model.got:
        if kind == "gap":
            assert epoch > last[0]  # the same log is never given up
        else:
            assert (epoch, offset) == (last[0], last[1] + 1)
        last = (epoch, offset)
    assert last == (model.epoch, model.head)


@pytest.mark.anyio
async def test_the_position_is_that_of_the_last_item_taken() -> None:
    async def never(_: Subscription) -> None:
        pytest.fail("there is nothing to catch up with")

    callback: Callable[[Subscription], Awaitable[None]] = never
    sub = Subscription("geoids", since=Position("e", 3), rewind=None, filter=None, capacity=9, catch_up=callback)
    body = sub.body()
    assert body == SubscribeBody(channel="geoids", since={"epoch": "e", "offset": 3})
    sub.started(body, Subscribed(channel="geoids", epoch="e", offset=3, was_recovering=True, recovered=True))
    for offset in (4, 5):
        sub.deliver(Event(channel="geoids", epoch="e", offset=offset, type="t", ts=0, data=None))
    assert sub.position == Position("e", 3)
    assert (await sub.next_event()).offset == 4
    assert sub.position == Position("e", 4)
    sub.end(None)
    assert (await sub.next_event()).offset == 5
    with pytest.raises(EOFError):
        await sub.next_event()
