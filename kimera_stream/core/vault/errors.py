"""What can be wrong with a vault besides being unavailable."""

from collections.abc import Sequence

from kimera_stream.protocol.errors import InternalError, KimeraError, UnavailableError


class DamagedLogError(InternalError):
    """An entry of the log is not what was committed: a bit flipped, or a row is missing.

    Args:
        offset: The first entry that is damaged.
        what: What is wrong with it.
    """

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(
            f"log entry {offset} is damaged ({what}): run `kimera-stream db check`, then restore a backup",
        )
        self.offset = offset
        self.what = what


class DamagedVaultError(InternalError):
    """An entity is not what was committed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the vault is damaged ({what}): run `kimera-stream db check`, then restore a backup")


class VaultSchemaError(KimeraError):
    """The database's schema is not one this version can work with; the message names the next step."""


class VaultFormatError(KimeraError):
    """An export file cannot be read, or a target is not fit for an import; the message names the next step."""


class LeaseLostError(UnavailableError):
    """A slice is no longer this node's: another one may own it by now. Nothing was written, and the work is the new owner's.

    Attributes:
        numbers: The slices; empty in the caller's copy.
    """

    numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "LeaseLostError":
        """The error for these slices."""
        made = cls("this engine has lost the slice that the work belongs to; another one takes it up", retry_after=1.0)
        made.numbers = tuple(numbers)
        return made
