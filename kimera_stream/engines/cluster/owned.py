"""A slice as the engine that owns it knows it."""

from dataclasses import dataclass

from kimera_stream.core.coverage import SliceState


@dataclass(slots=True, eq=False)
class OwnedSlice:
    """One tenure of a slice, or, in generation 0, what is made ready for one.

    Attributes:
        position: As ``scored``, as far as this engine has brought it.
        unread, last_unread: The first and the last offset that may be of a statement which the verifier has not read; None: there
            is none.
        filled: Whether its geoids are here.
    """

    generation: int = 0
    position: int = 0
    unread: int | None = None
    last_unread: int = 0
    filled: bool = False

    def begin(self, state: SliceState) -> None:
        """It is this engine's from now on, as a former owner has left it; whatever of it is here already stays."""
        self.generation, self.position, self.unread = state.generation, state.scored, state.unread
        self.last_unread = 0 if state.unread is None else state.scored

    def put_off(self, first: int, last: int) -> None:
        """Statements from ``first`` to ``last`` are still to be read."""
        self.last_unread = max(self.last_unread, last)
        if self.unread is None:
            self.unread = first

    def after_reading(self, upto: int) -> int | None:
        """What ``unread`` is once everything up to ``upto`` has been read."""
        return upto + 1 if upto < self.last_unread else None
