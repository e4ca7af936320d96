"""What becomes of work that fails: tried again for a while where the cause may pass, singled out where it is the work's own.

A statement on which the server meets a defect must not take those along that happen to be in its batch: the batch is halved until
the statement is alone. If nothing gets through any more it is not the statements: then the error goes to the supervisor.
"""

import random
import time
from collections.abc import Callable, Hashable
from typing import Any

import anyio
import structlog

from kimera_stream.core.interfaces import OutcomeUnknownError
from kimera_stream.engines.intake import Ticket
from kimera_stream.infrastructure.tasks import Backoff
from kimera_stream.protocol.errors import InternalError, OperationalError, UnavailableError

log = structlog.get_logger(__name__)

IN_A_ROW = 20
"""Different statements that fail one after the other, with nothing getting through, before the defect is not theirs."""


def may_pass(error: OperationalError) -> bool:
    """Whether the same work is worth another try after ``error``. Not where it may have been done: it would be done twice."""
    return isinstance(error, UnavailableError) and not isinstance(error, OutcomeUnknownError)


class DefectError(InternalError):
    """The server met a defect over this one piece of work, and nothing else is at fault."""


class NotBegunError(InternalError):
    """The server has failed while this waited behind what it worked on: it was not looked at, and is not at fault."""


def defect() -> DefectError:
    """What the sender of such work hears."""
    return DefectError(
        "the server met a defect in processing this statement: it was not stored; what came with a key is set aside, "
        "and the operator can have it tried again (kimera-stream dead-letters)"
    )


class Fault(Exception):  # noqa: N818 - carries a defect from where it is met to where it is dealt with
    """A defect met over work before anything of it was committed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(repr(error))
        self.error = error


class Patience:
    """For how long accepted work is tried again, and in which rhythm.

    Args:
        within: Seconds from its admission.
        monotonic: The clock of ``Ticket.admitted_at``.
    """

    def __init__(
        self,
        within: float,
        *,
        backoff: Backoff | None = None,
        rng: random.Random | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._within = within
        self._backoff = backoff or Backoff(base=0.05, factor=2.0, maximum=1.0)
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._monotonic = monotonic

    def lasts(self, ticket: Ticket[Any]) -> bool:
        """Whether its sender still waits for another try."""
        return self._monotonic() - ticket.admitted_at < self._within

    async def pause(self, tries: int) -> None:
        """Wait after so many failures in a row."""
        await anyio.sleep(self._backoff.delay(tries, self._rng))


class Faults:
    """Tells statements that cannot be processed from a defect that lets nothing through.

    Args:
        stage: Where they fail, for log and metrics.
        count: Counts one at a stage.
    """

    def __init__(self, stage: str, count: Callable[[str], None]) -> None:
        self._stage = stage
        self._count = count
        self._in_a_row = 0
        self._last: Hashable = None

    def passed(self) -> None:
        """Something got through."""
        self._in_a_row = 0

    def blame(self, statement: Hashable, error: Exception) -> None:
        """``error`` was raised over this one statement.

        Raises:
            Exception: the error itself, where it is not the statements' fault.
        """
        if statement != self._last:
            self._in_a_row += 1
            self._last = statement
        if self._in_a_row > IN_A_ROW:
            self._in_a_row = 0
            raise error
        self._count(self._stage)
        log.error("a statement cannot be processed", stage=self._stage, error=type(error).__name__, exc_info=error)
