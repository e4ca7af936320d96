"""One tick's bytes: filter once, frame once, join once per selection, and one write per connection."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from kimera_stream.protocol import frames
from kimera_stream.protocol.codec import CODECS, EventEncoder
from kimera_stream.streaming.egress import FanOut
from kimera_stream.streaming.metrics import HubMetrics
from kimera_stream.streaming.outlet import Outlet
from kimera_stream.streaming.records import Record
from kimera_stream.streaming.selections import Channel, Selection, Value

LARGE_BATCH: Final = 262_144
"""A tick's bytes for one connection above this are not pushed: the subscribers read them in chunks, each at its own pace."""

Batches = dict[Selection, list[bytes]]
"""The frames of one tick by selection, in order."""


class Joiner:
    """Args: fan_out: how the same bytes are written to many handles."""

    def __init__(self, encoder: EventEncoder, metrics: HubMetrics, fan_out: FanOut) -> None:
        self._encoder = encoder
        self._metrics = metrics
        self._fan_out = fan_out

    def select(self, record: Record, channel: Channel, batches: Batches) -> None:
        """Add the record's frames to the selections of ``channel`` that it passes and that someone listens to."""
        name = channel.name
        for group in channel.matching(lambda: record.view(name, self._encoder)):
            for selection in group.selections.values():
                if selection.listened:
                    frame = record.frame(name, selection.encoding, self._encoder)
                    frames_of = batches.get(selection)
                    if frames_of is None:
                        batches[selection] = [frame]
                    else:
                        frames_of.append(frame)

    def select_value(self, value: Value, channel: Channel, batches: Batches) -> None:
        """The same for a value of a latest channel, which becomes the newest of the groups that it passes."""
        for group in channel.matching(self.view_of(channel.name, value)):
            number = 1 if group.value is None else group.value.number + 1
            group.value = Value(number, value.type, value.ts, value.data, value.offset)
            for selection in group.selections.values():
                if selection.listened:
                    batches.setdefault(selection, []).append(self.value_frame(selection, value))

    def view_of(self, channel: str, value: Value) -> Callable[[], Mapping[str, Any]]:
        """Makes the event object of a value, as filters see it."""
        return lambda: self._encoder.view(
            channel, offset=value.offset, type=value.type, ts=value.ts, data=msgspec.json.decode(value.data)
        )

    def value_frame(self, selection: Selection, value: Value) -> bytes:
        """The frame of a latest channel's value."""
        payload = self._encoder.value_payload(
            selection.channel.name,
            selection.encoding,
            offset=value.offset,
            type=value.type,
            ts=value.ts,
            data=value.data,
        )
        return frames.frame(CODECS[selection.encoding].opcode, payload)

    def write(self, batches: Batches, mixed_version: int, now: float) -> tuple[list[Selection], list[Outlet]]:
        """One write per connection.

        Args:
            mixed_version: See ``Selection.targets``.

        Returns:
            The selections whose batch is too large to push, and the connections for which the batches of all their log channels
            together are: nothing of these was written to them.
        """
        oversized: list[Selection] = []
        overfull: list[Outlet] = []
        written: list[tuple[Selection, bytes]] = []
        parts: dict[Outlet, list[int]] = {}
        for selection, selected in batches.items():
            data = selected[0] if len(selected) == 1 else b"".join(selected)
            if len(data) > LARGE_BATCH and selection.channel.kind == "log":
                oversized.append(selection)
                continue
            selection.pushed_at = now
            solo, shared = selection.targets(mixed_version)
            if solo:
                self._fan_out(solo, data)
            for outlet in shared:
                parts.setdefault(outlet, []).append(len(written))
            written.append((selection, data))
            self._metrics.delivered(len(selected), len(data), len(solo) + len(shared))
        # Connections with the same set of selections get the same bytes, joined once.
        alike: dict[tuple[int, ...], list[Outlet]] = {}
        for outlet, indices in parts.items():
            alike.setdefault(tuple(indices), []).append(outlet)
        for combination, outlets in alike.items():
            datas = [written[i][1] for i in combination]
            if sum(map(len, datas)) > LARGE_BATCH:
                overfull += outlets
                datas = [written[i][1] for i in combination if written[i][0].channel.kind == "latest"]
            if datas:
                self._fan_out([outlet.egress for outlet in outlets], b"".join(datas))
        return oversized, overfull
