"""A witness can fail: it tells of each answer that is not to be given while a disk is full."""

from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from tests.oracle.deployments import Deployment
from tests.oracle.model import Ledger
from tests.oracle.processes import free_port
from tests.oracle.wire import Gone
from tests.oracle.witness import Witness

pytestmark = pytest.mark.anyio


class Said:
    """In place of ``Web``: always the same answer, or none."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self._answer = status, body

    async def ask(self, method: str, path: str, **_: Any) -> tuple[int, dict[str, Any]]:
        if not self._answer[0]:
            raise Gone(1006, "ReadError")
        return self._answer


PUBLISHED = {
    "geoid": {"id": "one", "offset": 7, "version": 1},
    "offset": 7,
    "contradictions": [],
    "duplicate": False,
}


def witness(tmp_path: Path, *, writable: bool = False) -> Witness:
    return Witness("a full disk", Deployment("sqlite", tmp_path), Ledger(), Random(1), writable)


@pytest.mark.parametrize(
    ("status", "body", "writable", "wrong", "outcome"),
    [
        (201, PUBLISHED, True, "", "acked"),
        (201, PUBLISHED, False, "acknowledged at 7", "acked"),
        (503, {"code": "unavailable"}, False, "", "unknown"),
        (503, {"code": "overloaded"}, False, "", "refused"),
        (500, {"code": "internal"}, True, "answered with 500 internal", "unknown"),
        (0, {}, True, "no answer", "unknown"),
    ],
)
async def test_a_write_is_told_the_truth(
    status: int, body: dict[str, Any], writable: bool, wrong: str, outcome: str, tmp_path: Path
) -> None:
    seen = witness(tmp_path, writable=writable)
    await seen._write(Said(status, body))  # type: ignore[arg-type]
    assert len(seen.wrong) == bool(wrong)
    assert wrong in "".join(seen.wrong)
    assert [op.outcome for op in seen.ledger.ops] == [outcome]


@pytest.mark.parametrize(("status", "wrongs"), [(200, 0), (503, 3), (0, 3)])
async def test_what_is_stored_is_read(status: int, wrongs: int, tmp_path: Path) -> None:
    seen = witness(tmp_path)
    await seen._read(Said(status, {"code": "unavailable"}))  # type: ignore[arg-type]
    assert len(seen.wrong) == wrongs


class Ended:
    """In place of ``Postgres``."""

    def __init__(self, said: str) -> None:
        self.said = said
        self.running = not said


@pytest.mark.parametrize(("said", "wrongs"), [("PANIC:  could not write to log file", 0), ("", 1)])
async def test_a_replay_is_waited_for_as_long_as_the_database_is_there(
    said: str, wrongs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reads(_: Witness) -> bool:
        return True

    monkeypatch.setattr(Witness, "_database_reads", reads)
    monkeypatch.setattr("tests.oracle.witness.READ", 1_000.0 if said else 0.1)
    seen = witness(tmp_path)
    seen.deployment.postgres = Ended(said)  # type: ignore[assignment]
    with anyio.fail_after(30):
        await seen._replay(f"http://127.0.0.1:{free_port()}", "epoch", 1)
    assert len(seen.wrong) == wrongs


async def test_what_is_answered_afterwards_may_be_acknowledged(tmp_path: Path) -> None:
    seen = witness(tmp_path)
    seen.over = True
    await seen._write(Said(201, PUBLISHED))  # type: ignore[arg-type]
    assert seen.wrong == []
