"""An encoder behind HTTP, in the form of OpenAI's ``POST /embeddings``."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import httpx
import msgspec
import numpy as np
import stamina
import structlog

from kimera_stream.core.embedding.provider import approximate_tokens
from kimera_stream.core.interfaces import Matrix
from kimera_stream.infrastructure.failover import Failover, WayNumbers
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

ATTEMPTS = 3
BREAKER_THRESHOLD = 5
BREAKER_SECONDS = 15.0
MOST_TOKENS = 1 << 31
"""That one request can have taken: a service that says more has miscounted, and no column of usage would hold many such."""
_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class _Item(msgspec.Struct):
    index: int
    embedding: list[float]


class _Answer(msgspec.Struct):
    data: list[_Item]
    usage: Any = None
    """Services differ here; what cannot be read is as good as not told."""


class _TemporaryStatusError(Exception):
    """The service answered with a status that is worth another try."""


class RemoteProvider:
    """``Provider`` over HTTP, with timeouts, retries with backoff and jitter, and a circuit breaker.

    Args:
        settings: ``embedding`` group: url, api_key, model, dimension, timeout, batch size.
        transport: For tests.
        wait: First pause between attempts, seconds.
        serves: The local model that it stands in for; its vectors are then taken for that model's.
    """

    def __init__(
        self,
        settings: EmbeddingSettings,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        wait: float = 0.1,
        serves: str | None = None,
    ) -> None:
        self._serves = serves
        self._settings = settings
        self._wait = wait
        key = settings.api_key.get_secret_value()
        self._client = httpx.AsyncClient(
            timeout=settings.timeout, transport=transport, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        self._url = settings.url.rstrip("/") + "/embeddings"
        self._failover = Failover(
            "embedding: the embedding service", ["http"], threshold=BREAKER_THRESHOLD, seconds=BREAKER_SECONDS
        )

    @property
    def model(self) -> str:
        if self._serves is not None:
            return self._serves
        return f"{self._settings.model or 'default'}@{httpx.URL(self._settings.url).host or 'unknown'}"

    @property
    def dimension(self) -> int:
        return self._settings.dimension

    @property
    def numbers(self) -> dict[str, WayNumbers]:
        """Health and use of the service, by requests."""
        return self._failover.numbers

    @property
    def counts_exactly(self) -> bool:
        """A service counts what it read in one request: the sum is its own, each text's share of it goes by length."""
        return False

    async def start(self) -> None:
        """Check the address. The service itself may come up later.

        Raises:
            UnavailableError: no usable URL is configured.
        """
        if httpx.URL(self._settings.url).scheme not in ("http", "https"):
            raise UnavailableError("embedding.url: expected http:// or https:// (set KIMERA_EMBEDDING__URL)")

    async def encode(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order.

        Raises:
            UnavailableError: unreachable, refusing, answering nonsense, or the breaker is open.
        """
        return (await self.encode_counted(texts))[0]

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``encode``, and the tokens of each text: of the service's own count, where it tells, a share by length."""
        size = self._settings.batch_size
        rows = np.empty((len(texts), self.dimension), dtype=np.float32)
        counts: list[int] = []
        for start in range(0, len(texts), size):
            part = list(texts[start : start + size])
            rows[start : start + len(part)], used = await self._failover.run(partial(self._asked, part))
            counts += approximate_tokens(part, used)
        return rows, counts

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _asked(self, texts: list[str]) -> tuple[Matrix, int | None]:
        try:
            return self._decoded(await self._post(texts), len(texts))
        except (httpx.HTTPError, _TemporaryStatusError) as error:
            raise UnavailableError(
                f"embedding: the embedding service could not be reached ({type(error).__name__})", retry_after=5.0
            ) from error

    async def _post(self, texts: list[str]) -> bytes:
        body: dict[str, Any] = {"input": texts, "encoding_format": "float"}
        if self._settings.model:
            body["model"] = self._settings.model
        content = msgspec.json.encode(body)
        retried = stamina.AsyncRetryingCaller(
            attempts=ATTEMPTS, timeout=self._settings.timeout * 2, wait_initial=self._wait, wait_max=2.0
        )
        return await retried((httpx.TransportError, _TemporaryStatusError), self._attempt, content)

    async def _attempt(self, content: bytes) -> bytes:
        response = await self._client.post(self._url, content=content, headers={"Content-Type": "application/json"})
        if response.status_code in _RETRIED_STATUS:
            raise _TemporaryStatusError(str(response.status_code))
        if response.status_code != 200:
            raise UnavailableError(
                f"embedding: the embedding service refused with status {response.status_code}; check url, key and model",
                retry_after=30.0,
            )
        return response.content

    def _decoded(self, content: bytes, count: int) -> tuple[Matrix, int | None]:
        """Rows, and the tokens of all texts together where the service tells."""
        try:
            answer = msgspec.json.decode(content, type=_Answer)
        except msgspec.DecodeError as error:
            raise UnavailableError(
                "embedding: the embedding service answered something else than embeddings"
            ) from error
        if sorted(item.index for item in answer.data) != list(range(count)):
            raise UnavailableError(f"embedding: asked for {count} embeddings, got {len(answer.data)}")
        rows = np.empty((count, self.dimension), dtype=np.float64)
        for item in answer.data:
            if len(item.embedding) != self.dimension:
                raise UnavailableError(
                    f"embedding: the service's vectors have {len(item.embedding)} numbers, expected {self.dimension}; "
                    "set KIMERA_EMBEDDING__DIMENSION to the model's"
                )
            rows[item.index] = item.embedding
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms < 1e-12).any():
            raise UnavailableError("embedding: the embedding service answered with vectors that have no direction")
        return np.ascontiguousarray(rows / norms, dtype=np.float32), _tokens_used(answer.usage)


def _tokens_used(usage: Any) -> int | None:
    used = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return used if type(used) is int and 0 <= used <= MOST_TOKENS else None
