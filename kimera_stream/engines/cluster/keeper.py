"""Which slices this node owns: heartbeats, leases, and giving and taking as nodes come and go.

    beat ──> coverage ──> share of this engine ──┬─ mine, free or expired: take and begin
                                                 ├─ mine, another's:       prepare, offer, and wait to be handed it
                                                 ├─ of an engine that has not been heard of for half a lease: prepare what would be mine
                                                 └─ held and not mine:     hand over to whom it belongs, once that one is ready

Every node works out the same shares by itself (rendezvous hashing over the engines that were heard of within the lease), so there is
nobody to agree with. What an engine believes to hold is only a belief: each commit checks it in the database.
"""

import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace

import anyio
import structlog

from kimera_stream.core.coverage import ClusterStore, Coverage, Node, SliceState
from kimera_stream.core.slices import shares
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

BEATS_PER_LEASE = 4
"""A lease outlives three beats that fail."""
LONGEST_BEAT = 1.0
"""Seconds between beats at most: within that a share that was given back is taken."""
SUSPECT = 0.5
"""Part of its lease that an engine may be silent for before others get ready for its slices: two beats and more. After a gap as long in
this node's own beats the others have as long to be heard of: most likely they could not reach the database either."""
JUST_AFTER = 0.01
"""Seconds after an engine becomes suspect, or its lease ends, at which that is looked for."""
LEAVING = 3.0
"""Seconds that a stop may take to give everything back."""


class CoverageKeeper:
    """Belongs to the event loop. An edge's keeper only beats.

    Args:
        node: This run of this node.
        slices: How many there are.
        lease: Seconds for which a slice stays this node's without a beat.
        gain: Awaited with slices that are this engine's from now on.
        lose: Awaited with slices before they are released, and with slices that are found to be gone.
        changed: Called whenever this node has taken or released slices: others may want to look at once.
        in_contact: Whether work can get here. Where it has not been able to for a lease, others get this engine's slices, unless
            none of them is any better off.
        monotonic: Seconds.
    """

    def __init__(
        self,
        store: ClusterStore,
        node: Node,
        *,
        slices: int,
        lease: float,
        gain: Callable[[Mapping[int, SliceState]], Awaitable[None]],
        lose: Callable[[Sequence[int]], Awaitable[None]],
        changed: Callable[[], None] = lambda: None,
        in_contact: Callable[[], bool] = lambda: True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._node = node
        self._slices = slices
        self._lease = lease
        self._gain = gain
        self._lose = lose
        self._changed = changed
        self._in_contact = in_contact
        self._monotonic = monotonic
        self._contact_at = monotonic()
        self._beat_at: float | None = None
        self._after_a_gap = False
        self._spares_until = -math.inf
        """Slices whose lease has run out are left to their owners until then."""
        self._prepare: Callable[[Collection[int]], Collection[int]] = lambda numbers: numbers
        self._filled: Callable[[], Collection[int]] = lambda: self._leases
        self._unfilled: set[int] = set()
        """Slices held here of which the database says that they are not filled."""
        self._leases: dict[int, int] = {}
        self._look = anyio.Event()
        self._retiring = False
        self._retired = anyio.Event()
        self._stopping = False
        self.coverage: Coverage | None = None
        """As the last beat found it."""

    @property
    def node(self) -> Node:
        return self._node

    @property
    def leases(self) -> Mapping[int, int]:
        """Slices that this node holds, as far as it knows (number -> generation)."""
        return self._leases

    @property
    def owned(self) -> frozenset[int]:
        return frozenset(self._leases)

    def prepare_with(
        self, prepare: Callable[[Collection[int]], Collection[int]], filled: Callable[[], Collection[int]] | None = None
    ) -> None:
        """Ask ``prepare`` from now on for slices that others still own: it is told which are wanted, all of them each time, and
        says which are ready. ``filled`` tells which of those held here are. Until then nothing needs preparing."""
        self._prepare = prepare
        if filled is not None:
            self._filled = filled

    def nudge(self) -> None:
        """Something has changed: beat now."""
        self._look.set()

    def lost(self, numbers: Sequence[int]) -> None:
        """A commit was refused because these slices are another engine's."""
        self.nudge()

    async def run(self) -> None:
        """Beat until cancelled. What cannot be renewed goes to others; what is held goes on meanwhile."""
        every = min(self._lease / BEATS_PER_LEASE, LONGEST_BEAT)
        away = False
        while True:
            self._look = anyio.Event()
            wait = every
            try:
                wait = min(every, self._next_turn(await self.step()))
                if away:
                    log.info("the database answers again")
                away = False
            except UnavailableError as error:
                if not away:
                    log.warning("leases are not renewed: the database refuses", reason=error.message)
                away = True
            with anyio.move_on_after(wait):
                await self._look.wait()

    async def step(self) -> Coverage:
        """One beat, and what follows from it.

        Raises:
            UnavailableError: the database cannot be asked; what was taken or given until then stands.
        """
        before, retiring = self._node.reachable, self._retiring
        self._node = replace(self._node, reachable=self._is_reachable() and not retiring)
        coverage = self.coverage = await self._store.beat(self._node, lease=self._lease)
        self._spare_after_a_gap()
        if self._node.reachable != before:
            self._changed()  # the shares are others now
        if not self._node.is_engine or self._stopping:
            return coverage
        await self._drop_lost(coverage)
        engines = [node for node in coverage.nodes if node.is_engine]
        fit = [node for node in engines if node.reachable] or engines
        given = shares([node.id for node in fit], self._slices)
        share = given.get(self._node.id, frozenset())
        await self._settle(coverage, share)
        await self._hand_over(coverage, given)
        wanted = [each for each in coverage.slices if each.number in share and each.number not in self._leases]
        spares = self._monotonic() < self._spares_until
        await self._take([each.number for each in wanted if each.owner is None or not (each.covered or spares)])
        await self._tell_filled()
        others = [each for each in wanted if each.covered]
        ready = self._prepare([*(each.number for each in others), *self._soon_here(coverage, fit)])
        await self._offer([each for each in others if each.number in ready])
        if retiring and (not self._leases or self._node.id in given):
            self._retired.set()
        return coverage

    def _is_reachable(self) -> bool:
        now = self._monotonic()
        if self._in_contact():
            self._contact_at = now
        return now - self._contact_at < self._lease

    def _spare_after_a_gap(self) -> None:
        """Taken from engines that live, slices would be filled here and, handed back, there once more. One gap after the other is this
        node's own: it must not keep those of a dead engine from being taken."""
        now = self._monotonic()
        gap = self._beat_at is not None and now - self._beat_at > self._lease * SUSPECT
        if gap and not self._after_a_gap:
            self._spares_until = now + self._lease * SUSPECT
        self._beat_at, self._after_a_gap = now, gap

    def _soon_here(self, coverage: Coverage, fit: Sequence[Node]) -> list[int]:
        """Slices of engines that have been silent for so long that they may have died, which would be this node's then."""
        silent = {each.owner for each in coverage.slices if each.covered and each.left < self._suspect_below}
        silent.discard(self._node.id)
        if not silent:
            return []
        share = shares([node.id for node in fit if node.id not in silent], self._slices).get(self._node.id, frozenset())
        return [
            each.number
            for each in coverage.slices
            if each.covered and each.owner in silent and each.number in share and each.number not in self._leases
        ]

    @property
    def _suspect_below(self) -> float:
        return self._lease * (1 - SUSPECT)

    def _next_turn(self, coverage: Coverage) -> float:
        """Seconds until another engine becomes suspect or loses its slices, if it is not heard of."""
        left = [each.left for each in coverage.slices if each.covered and each.owner != self._node.id]
        turns = [each - self._suspect_below if each >= self._suspect_below else each for each in left]
        return min(turns, default=math.inf) + JUST_AFTER

    async def _tell_filled(self) -> None:
        """Record which of the slices held here have come to be filled; or no longer are, after a crash of whoever fills them."""
        here, told = self._filled(), self._unfilled
        done = {number: lease for number, lease in self._leases.items() if number in told and number in here}
        undone = {number: lease for number, lease in self._leases.items() if number not in told and number not in here}
        if done:
            await self._store.filled(self._node.id, done)
            self._unfilled.difference_update(done)
        if undone:
            await self._store.unfilled(self._node.id, undone)
            self._unfilled.update(undone)
        if done or undone:
            self._changed()

    async def _offer(self, ready: Sequence[SliceState]) -> None:
        """Tell the owners that what is to be handed over is ready here."""
        offered = [each.number for each in ready if each.number not in self._leases and each.heir != self._node.id]
        if offered:
            await self._store.offer(self._node.id, offered)
            self._changed()

    async def _settle(self, coverage: Coverage, share: Collection[int]) -> None:
        """Slices that are this node's in the database alone: taken or released by a step whose end it did not hear."""
        strays = {
            each.number: each
            for each in coverage.slices
            if each.owner == self._node.id and each.number not in self._leases
        }
        await self._begin({number: state for number, state in strays.items() if number in share})
        left = {number: state.generation for number, state in strays.items() if number not in share}
        if left:
            await self._store.release(self._node.id, left)
            self._changed()

    async def _drop_lost(self, coverage: Coverage) -> None:
        states = {each.number: each for each in coverage.slices}
        gone = [
            number
            for number, generation in self._leases.items()
            if (state := states.get(number)) is None or state.owner != self._node.id or state.generation != generation
        ]
        if gone:
            log.warning("slices lost", slices=sorted(gone))
            await self._begin_to_lose(gone)

    async def _begin_to_lose(self, numbers: Sequence[int]) -> dict[int, int]:
        """Nothing is begun with these slices any more; returns their leases."""
        leases = {number: self._leases.pop(number) for number in sorted(numbers)}
        self._unfilled.difference_update(numbers)
        await self._lose(list(leases))
        return leases

    async def _hand_over(self, coverage: Coverage, given: Mapping[str, Collection[int]]) -> None:
        """Until the heir is ready its slice stays here: it is covered all the time."""
        heirs = {each.number: each.heir for each in coverage.slices}
        for node_id, numbers in given.items():
            ready = [number for number in numbers if number in self._leases and heirs.get(number) == node_id]
            if ready and node_id != self._node.id:
                leases = await self._begin_to_lose(ready)
                await self._store.hand_over(self._node.id, leases, node_id, lease=self._lease)
                log.info("slices handed over", slices=sorted(leases), to=node_id)
                self._changed()

    async def _take(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        await self._begin(await self._store.take(self._node.id, numbers, lease=self._lease))

    async def _begin(self, taken: Mapping[int, SliceState]) -> None:
        if not taken:
            return
        self._leases.update({number: state.generation for number, state in taken.items()})
        self._unfilled.update(number for number, state in taken.items() if state.heir == self._node.id)
        log.info("slices taken", slices=sorted(taken))
        await self._gain(taken)
        self._changed()

    async def retire(self) -> None:
        """Have others get ready for what is here and hand it over to them; ends when nothing is left here, or nobody else is there
        to take it. Meanwhile ``run`` has to go on."""
        self._retiring = True
        self.nudge()
        await self._retired.wait()

    async def leave(self) -> None:
        """Give everything back, within a deadline: what cannot be expires."""
        self._stopping = True
        with anyio.move_on_after(LEAVING, shield=True):
            if self._leases:
                await self._begin_to_lose(list(self._leases))
            try:
                await self._store.leave(self._node.id)
            except UnavailableError as error:
                log.warning("leases expire by themselves: the database refuses", reason=error.message)
            self._changed()
