"""A slice as the engine that owns it knows it."""

from dataclasses import dataclass

from kimera_stream.core.coverage import SliceState


@dataclass(slots=True, eq=False)
class OwnedSlice:
    """One tenure of a slice.

    Attributes:
        position: As ``scored``, as far as this engine has brought it.
        unread, last_unread: The first and the last offset that may be of a statement which the verifier has not read; None: there
            is none.
        filled: Whether its geoids are here.
    """

    generation: int
    position: int
    unread: int | None = None
    last_unread: int = 0
    filled: bool = False

    @classmethod
    def of(cls, state: SliceState) -> "OwnedSlice":
        """What a former owner has left."""
        return cls(state.generation, state.scored, state.unread, 0 if state.unread is None else state.scored)

    def put_off(self, first: int, last: int) -> None:
        """Statements from ``first`` to ``last`` are still to be read."""
        self.last_unread = max(self.last_unread, last)
        if self.unread is None:
            self.unread = first

    def after_reading(self, upto: int) -> int | None:
        """What ``unread`` is once everything up to ``upto`` has been read."""
        return upto + 1 if upto < self.last_unread else None
