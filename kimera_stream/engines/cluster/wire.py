"""What nodes say to each other on the bus, besides log entries (``core.relay``). MessagePack."""

from typing import Any, TypeAlias

import msgspec

from kimera_stream.protocol.errors import ERRORS_BY_CODE, ErrorCode, InternalError, OperationalError
from kimera_stream.protocol.objects import (
    Decision,
    Geoid,
    GeoidBody,
    Scar,
    ScoredGeoid,
    ScoreResult,
    Watch,
    WatchKind,
)

# -- work: from an edge to the engine that owns the partition. ``at``: unix ms by the edge's clock when it was taken in;
# ``after``: the request of the same lane that it may not overtake, as far as that has no answer yet; ``turn``: counts the
# times that it is added. -----


class PublishRequest(msgspec.Struct, frozen=True, kw_only=True, tag="publish", omit_defaults=True):
    """See ``KnowledgeService.publish``."""

    at: int
    after: str | None = None
    turn: int = 0
    principal: str
    session_id: str | None = None
    body: GeoidBody
    key: str | None = None
    priority: int = 5
    merge: bool = False
    must_exist: bool = False


class DeleteRequest(msgspec.Struct, frozen=True, kw_only=True, tag="delete", omit_defaults=True):
    """See ``KnowledgeService.delete``."""

    at: int
    after: str | None = None
    turn: int = 0
    principal: str
    session_id: str | None = None
    geoid_id: str


class ResolveRequest(msgspec.Struct, frozen=True, kw_only=True, tag="resolve", omit_defaults=True):
    """See ``KnowledgeService.resolve``."""

    at: int
    after: str | None = None
    turn: int = 0
    principal: str
    session_id: str | None = None
    contradiction_id: str
    decision: Decision
    reason: str | None = None


Request: TypeAlias = PublishRequest | DeleteRequest | ResolveRequest

# -- answers: from the engine to the edge that waits ----------------------------------------------------------------------


class Early(msgspec.Struct, frozen=True, kw_only=True, tag="early", omit_defaults=True):
    """The work was not begun, because what it may not overtake has not come: it is to be added again, behind that.

    ``turn``: of the copy that is meant.
    """

    request: str
    turn: int


class Committed(msgspec.Struct, frozen=True, kw_only=True, tag="committed", omit_defaults=True):
    """A publish is in the log at ``offset``; it is to be answered once every slice is scored up to there."""

    request: str
    geoid: Geoid
    offset: int
    duplicate: bool = False


class Removed(msgspec.Struct, frozen=True, kw_only=True, tag="removed", omit_defaults=True):
    """A deletion is in the log at ``offset``."""

    request: str
    offset: int


class Settled(msgspec.Struct, frozen=True, kw_only=True, tag="settled", omit_defaults=True):
    """A contradiction is resolved."""

    request: str
    scar: Scar
    offset: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", omit_defaults=True):
    """The work was not done, and why."""

    request: str
    code: ErrorCode
    message: str
    field: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, request: str, error: OperationalError) -> "Refused":
        return cls(
            request=request,
            code=error.code,
            message=error.message,
            field=error.field,
            retry_after=error.retry_after,
        )

    def error(self) -> OperationalError:
        """The error as it was raised there."""
        kind = ERRORS_BY_CODE.get(self.code, InternalError)
        return kind(self.message, field=self.field, retry_after=self.retry_after)


Result: TypeAlias = Committed | Removed | Settled | Refused
Answer: TypeAlias = Result | Early

# -- progress: from an engine to the edges -----------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far slices are scored, by number: everything up to that offset, and committed. ``head``: an offset at or above the
    newest entry in which something that was found is told."""

    scored: dict[int, int]
    head: int


# -- questions -------------------------------------------------------------------------------------------------------------------

SCORE = "score"
SEARCH = "search"
WATCH = "watch"
UNWATCH = "unwatch"


class ScoreQuestion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    a: GeoidBody
    b: GeoidBody
    explain: bool = False


class SearchQuestion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asked of every engine; each answers from its own slices."""

    text: str | None = None
    vector: list[float] | None = None
    relation: WatchKind
    k: int
    filter: dict[str, Any] | None = None


class SearchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """``slices``: those that the hits are from, so that whoever asks knows what is missing."""

    hits: list[ScoredGeoid]
    slices: list[int]


class WatchQuestion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """See ``KnowledgeService.watch``."""

    name: str
    principal: str
    text: str | None = None
    vector: list[float] | None = None
    kinds: list[WatchKind]
    min_score: float | None = None
    filter: dict[str, Any] | None = None


class UnwatchQuestion(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    principal: str


encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_answers = msgspec.msgpack.Decoder(list[Answer]).decode
decode_progress = msgspec.msgpack.Decoder(Progress).decode
decode_score = msgspec.msgpack.Decoder(ScoreQuestion).decode
decode_score_result = msgspec.msgpack.Decoder(ScoreResult).decode
decode_search = msgspec.msgpack.Decoder(SearchQuestion).decode
decode_search_answer = msgspec.msgpack.Decoder(SearchAnswer).decode
decode_watch = msgspec.msgpack.Decoder(WatchQuestion).decode
decode_unwatch = msgspec.msgpack.Decoder(UnwatchQuestion).decode
decode_watch_result = msgspec.msgpack.Decoder(Watch).decode
