"""What is listened to: channels, and within a channel the selections (filter and encoding) that equal subscribers share."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from kimera_stream.protocol.channels import ChannelKind
from kimera_stream.protocol.filters import Filter, read_key
from kimera_stream.protocol.messages import Encoding
from kimera_stream.streaming.egress import Egress

if TYPE_CHECKING:
    from kimera_stream.streaming.outlet import Outlet, Subscription


class Waiter(Protocol):
    """A reader that pulls: told when its selection has something new, or when the whole hub ends."""

    def wake(self, position: int) -> None:
        """Something passed the selection after ``position``; everything before that did not."""

    def end(self) -> None: ...


@dataclass(slots=True)
class Value:
    """The newest value of a latest channel that passes a filter. ``number`` counts the values seen so far."""

    number: int
    type: str
    ts: int
    data: bytes
    offset: int


class Selection:
    """Subscribers that want the same events in the same encoding.

    ``live`` holds those at the live edge, who get the joined bytes of each tick; the others read by themselves.
    """

    __slots__ = (
        "_shared",
        "_solo",
        "_stamp",
        "channel",
        "encoding",
        "group",
        "live",
        "pushed_at",
        "version",
        "waiters",
    )

    def __init__(self, group: "Group", encoding: Encoding) -> None:
        self.channel = group.channel
        self.group = group
        self.encoding = encoding
        self.live: dict[Subscription, None] = {}
        self.waiters: dict[Waiter, None] = {}
        self.version = 0
        self.pushed_at = 0.0
        self._stamp = (-1, -1)
        self._solo: list[Egress] = []
        self._shared: list[Outlet] = []

    @property
    def key(self) -> tuple[object, ...]:
        return self.channel.name, self.encoding, self.group.filter.key if self.group.filter else None

    @property
    def listened(self) -> bool:
        return bool(self.live or self.waiters)

    def targets(self, mixed_version: int) -> tuple[list[Egress], list["Outlet"]]:
        """The live members, parted: handles of connections that have no other live subscription, and the other outlets.

        Rebuilt only when membership, or how many subscriptions a member has (``mixed_version``), changed.
        """
        stamp = (self.version, mixed_version)
        if self._stamp != stamp:
            outlets = [sub.outlet for sub in self.live]
            self._solo = [outlet.egress for outlet in outlets if outlet.live == 1]
            self._shared = [outlet for outlet in outlets if outlet.live != 1]
            self._stamp = stamp
        return self._solo, self._shared

    def join(self, subscription: "Subscription") -> None:
        self.live[subscription] = None
        self.version += 1

    def leave(self, subscription: "Subscription") -> None:
        if self.live.pop(subscription, self) is not self:
            self.version += 1


class Group:
    """The selections of one filter on one channel: the filter is evaluated once for all of them."""

    __slots__ = ("channel", "filter", "selections", "users", "value")

    def __init__(self, channel: "Channel", filter: Filter | None) -> None:
        self.channel = channel
        self.filter = filter
        self.selections: dict[Encoding, Selection] = {}
        self.users = 0
        self.value: Value | None = None

    def selection(self, encoding: Encoding) -> Selection:
        selection = self.selections.get(encoding)
        if selection is None:
            selection = self.selections[encoding] = Selection(self, encoding)
        return selection


class _Shelf:
    """Groups whose filters guard the same field, found by its value. ``users``: how many; one may name no value at all."""

    __slots__ = ("groups", "read", "users")

    def __init__(self, field: str) -> None:
        self.read = read_key(field)
        self.groups: dict[Hashable, list[Group]] = {}
        self.users = 0


class Channel:
    """One channel with someone on it.

    An event is not tried on every filter: those that hang on one field's value are looked up by it, so ten thousand
    subscribers, each with an agent of their own, cost one look-up per event.
    """

    __slots__ = ("_open", "_shelves", "groups", "kind", "name", "principals", "subscribers")

    def __init__(self, name: str, kind: ChannelKind) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self.groups: dict[object, Group] = {}
        self._open: list[Group] = []
        self._shelves: dict[str, _Shelf] = {}
        self.subscribers = 0
        self.principals: Counter[str] = Counter()

    def group(self, filter: Filter | None) -> Group:
        key = None if filter is None else filter.key
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(self, filter)
            if filter is None or filter.guard is None:
                self._open.append(group)
            else:
                shelf = self._shelves.setdefault(filter.guard.field, _Shelf(filter.guard.field))
                shelf.users += 1
                for value in filter.guard.values:
                    shelf.groups.setdefault(value, []).append(group)
        return group

    def matching(self, view: Callable[[], Mapping[str, Any]]) -> Iterator[Group]:
        """The groups whose filter the event passes. ``view`` makes the event object, and is called only if one is needed."""
        event: Mapping[str, Any] | None = None
        for group in self._open:
            if group.filter is not None:
                event = view() if event is None else event
                if not group.filter.matches(event):
                    continue
            yield group
        if self._shelves:
            event = view() if event is None else event
            for shelf in self._shelves.values():
                for group in shelf.groups.get(shelf.read(event), ()):
                    assert group.filter is not None
                    assert group.filter.guard is not None
                    if group.filter.guard.decides or group.filter.matches(event):
                        yield group

    def _drop(self, group: Group) -> None:
        # They name each other: each channel and filter of its own that somebody was on would wait for the collector of garbage,
        # and with it the connections that the selection served last.
        group.selections = {}
        filter = group.filter
        if self.groups.pop(None if filter is None else filter.key, None) is None:
            return
        if filter is None or filter.guard is None:
            self._open.remove(group)
            return
        shelf = self._shelves[filter.guard.field]
        shelf.users -= 1
        for value in filter.guard.values:
            shelf.groups[value].remove(group)
            if not shelf.groups[value]:
                del shelf.groups[value]
        if not shelf.users:
            del self._shelves[filter.guard.field]

    def enter(self, selection: Selection, principal: str) -> None:
        """Count a subscriber in."""
        selection.group.users += 1
        self.subscribers += 1
        self.principals[principal] += 1

    def exit(self, selection: Selection, principal: str) -> None:
        """Count a subscriber out; a group that nobody uses goes."""
        group = selection.group
        group.users -= 1
        if not group.users:
            self._drop(group)
        self.subscribers -= 1
        self.principals[principal] -= 1
        if not self.principals[principal]:
            del self.principals[principal]

    def selections(self) -> Iterator[Selection]:
        for group in self.groups.values():
            yield from group.selections.values()
