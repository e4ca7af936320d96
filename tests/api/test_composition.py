"""What the composition root gives the cascade."""

from pathlib import Path
from typing import Any

import pytest

from kimera_stream.api.composition import build_services
from kimera_stream.engines import pair_head
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.infrastructure.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.allow_blocking]  # services are put together before anybody is served


async def stand_in(folder: Path, **settings: Any) -> str:
    container = build_services(Settings(paths={"data_dir": folder}, **settings)).build()
    async with container:
        await container.start(CascadeEngine)
        return container.get(CascadeEngine).stand_in


@pytest.mark.parametrize(
    ("embedding", "scoring", "expected"),
    [
        ({}, {}, "kimera-pair-head-1"),
        ({"provider": "hashing"}, {}, "rules-1"),
        ({"provider": "none"}, {}, "rules-1"),
        ({"provider": "http", "url": "http://127.0.0.1:1/v1", "model": "all-MiniLM-L6-v2"}, {}, "rules-1"),
        ({}, {"verifier": "off"}, "rules-1"),
        ({}, {"stages": ["prefilter", "scope"]}, "rules-1"),
    ],
)
async def test_the_pair_head_stands_in_for_a_verifier_on_vectors_of_its_own_encoder_alone(
    embedding: dict[str, Any], scoring: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert await stand_in(tmp_path, embedding=embedding, scoring=scoring) == expected


async def test_a_damaged_pair_head_is_told_of_and_leaves_it_to_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pair_head.safetensors"
    path.write_bytes(b"\0" * 100)
    path.with_suffix(".json").write_text('{"digest": "0"}')
    monkeypatch.setattr(pair_head, "shipped_head", lambda: path)
    assert await stand_in(tmp_path) == "rules-1"
    assert "pair_head.safetensors: its weights are not those" in capsys.readouterr().out
