"""Questions between nodes, carried by one topic per node: an ask goes to the asked node's, its answer to the asker's."""

import uuid
from collections.abc import Callable
from typing import Final

import anyio
import msgspec
import structlog
from anyio.abc import TaskGroup

from kimera_stream.infrastructure.bus.interface import Answerer, Follower, Message
from kimera_stream.protocol import errors
from kimera_stream.protocol.errors import OperationalError, OverloadedError, UnavailableError

log = structlog.get_logger(__name__)

ERRORS: Final = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, OperationalError) and kind is not OperationalError
}


class Ask(msgspec.Struct, tag="ask", array_like=True):
    """``within``: seconds that the asker waits."""

    id: str
    asker: str
    what: str
    within: float
    payload: bytes


class Reply(msgspec.Struct, tag="reply", array_like=True):
    id: str
    payload: bytes


class Refusal(msgspec.Struct, tag="refusal", array_like=True):
    id: str
    code: str
    message: str
    field: str | None = None
    retry_after: float | None = None


OVERHEAD: Final = 512
"""Bytes of a message besides its payload at most."""
DECODER = msgspec.msgpack.Decoder(Ask | Reply | Refusal)
ENCODER = msgspec.msgpack.Encoder()


def inbox(node: str) -> str:
    """Topic with questions to and answers for ``node``."""
    return f"inbox:{node}"


class Waiting:
    """An asked question."""

    __slots__ = ("answer", "answered")

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.answer: Reply | Refusal | None = None


class Questions:
    """Asks and answers for one node.

    Args:
        node: This node.
        publish: Says something on a topic.
        limit: Questions answered at once.
        message_bytes: Longest message.
    """

    def __init__(self, node: str, publish: Callable[[str, bytes], None], *, limit: int, message_bytes: int) -> None:
        self._node = node
        self._publish = publish
        self._limit = limit
        self._message_bytes = message_bytes
        self._answerers: dict[str, Answerer] = {}
        self._waiting: dict[str, Waiting] = {}
        self._under_way = 0

    def answer_with(self, what: str, answerer: Answerer) -> None:
        self._answerers[what] = answerer

    async def ask(self, node: str, what: str, payload: bytes, *, within: float) -> bytes:
        """See ``Bus.ask``; the contact is the caller's to check."""
        ask = Ask(uuid.uuid4().hex, self._node, what, within, payload)
        message = ENCODER.encode(ask)
        if len(message) > self._message_bytes:
            raise UnavailableError(f"a question of {len(message)} bytes is too large for the bus")
        waiting = self._waiting[ask.id] = Waiting()
        try:
            self._publish(inbox(node), message)
            with anyio.move_on_after(within):
                await waiting.answered.wait()
        finally:
            del self._waiting[ask.id]
        answer = waiting.answer
        if answer is None:
            raise UnavailableError(f"{node} did not answer within {within:g} s", retry_after=1.0)
        if isinstance(answer, Refusal):
            kind = ERRORS.get(answer.code, UnavailableError)  # type: ignore[call-overload]
            raise kind(answer.message, field=answer.field, retry_after=answer.retry_after)
        return answer.payload

    async def serve(self, follower: Follower) -> None:
        """Hear this node's inbox until cancelled. What is lost there is asked again by who needs it."""
        async with anyio.create_task_group() as group:
            while True:
                for item in await follower.receive():
                    if isinstance(item, Message):
                        self._heard(item.payload, group)

    def _heard(self, payload: bytes, group: TaskGroup) -> None:
        try:
            message = DECODER.decode(payload)
        except msgspec.MsgspecError as error:  # another version of this program, or a foreign hand in Redis
            log.warning("a message in the inbox of this node is not readable", error=str(error))
            return
        if not isinstance(message, Ask):
            if (waiting := self._waiting.get(message.id)) is not None:
                waiting.answer = message
                waiting.answered.set()
        elif self._under_way >= self._limit:
            self._refuse(message, OverloadedError(f"{self._node} has too many questions to answer", retry_after=1.0))
        else:
            self._under_way += 1
            group.start_soon(self._answer, message, name=f"bus:answer:{message.what}")

    async def _answer(self, ask: Ask) -> None:
        try:
            with anyio.move_on_after(ask.within):  # nobody waits for it any longer
                self._publish(inbox(ask.asker), ENCODER.encode(await self._reply(ask)))
        except OperationalError as error:
            self._refuse(ask, error)
        except Exception:  # one question's defect must not end the answers to all others
            log.exception("answering another node failed", what=ask.what)
            self._refuse(ask, errors.InternalError("an unexpected error; it was logged"))
        finally:
            self._under_way -= 1

    async def _reply(self, ask: Ask) -> Reply:
        answerer = self._answerers.get(ask.what)
        if answerer is None:
            raise UnavailableError(f"{self._node} does not answer questions of the kind {ask.what}", retry_after=1.0)
        payload = await answerer(ask.payload)
        if len(payload) + OVERHEAD > self._message_bytes:
            raise UnavailableError(f"an answer of {len(payload)} bytes is too large for the bus")
        return Reply(ask.id, payload)

    def _refuse(self, ask: Ask, error: OperationalError) -> None:
        refusal = Refusal(ask.id, error.code, error.message, error.field, error.retry_after)
        self._publish(inbox(ask.asker), ENCODER.encode(refusal))
