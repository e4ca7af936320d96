"""The files under ``deploy/`` name what exists."""

import re
from pathlib import Path

import pytest

from kimera_stream.infrastructure.settings import Settings, check_environment, load_settings
from kimera_stream.infrastructure.settings_loading import variables

COMPOSE = (Path(__file__).parents[2] / "deploy" / "compose.yaml").read_text()


def given(anchor: str) -> dict[str, str]:
    """The settings that a block of the compose file gives, as a container would see them."""
    block = COMPOSE.split(f"&{anchor}\n", 1)[1].split("\n\n", 1)[0]
    found = dict(re.findall(r"^  (KIMERA_\w+): (.+)$", block, re.MULTILINE))
    return {name: re.sub(r"\$\{[^}]*\}", "secret", value.strip('"')) for name, value in found.items()}


def test_the_compose_file_gives_settings_that_exist() -> None:
    names = set(re.findall(r"^\s+(KIMERA_\w+):", COMPOSE, re.MULTILINE))
    assert len(names) > 5
    assert names <= set(variables())


@pytest.mark.parametrize("role", ["edge", "engine"])
def test_what_the_compose_file_gives_is_fit_to_start(role: str) -> None:
    environ = given("settings") | (given("edge-settings") if role == "edge" else {"KIMERA_ROLE": role})
    settings: Settings = load_settings(environ, None)
    assert settings.role == role
    assert settings.bus.url.get_secret_value().startswith("redis://redis:")
    assert check_environment(settings) == []
