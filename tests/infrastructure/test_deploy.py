"""The files under ``deploy/`` name what exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # of the model libraries' own needs

from kimera_stream.infrastructure.settings import Settings, check_environment, load_settings
from kimera_stream.infrastructure.settings_loading import variables

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "kimera-stream"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def environment_of(name: str) -> dict[str, str]:
    """As a container of the service would see it: what the image sets, then what the compose file sets."""
    image = dict(re.findall(r"(KIMERA_\w+)=(\S+)", re.sub(r"^RUN.*$", "", DOCKERFILE, flags=re.MULTILINE)))
    given = image | SERVICES[name]["environment"]
    return {variable: re.sub(r"\$\{[^}]*\}", "secret", value) for variable, value in given.items()}


def test_the_compose_file_has_what_the_manual_says() -> None:
    assert OURS == ["edge-1", "edge-2", "engine"]
    assert SERVICES["engine"]["deploy"]["replicas"] == 2
    assert set(SERVICES) - set(OURS) == {"postgres", "redis"}


@pytest.mark.parametrize("name", OURS)
def test_the_compose_file_gives_settings_that_exist_and_are_fit_to_start(name: str) -> None:
    environ = environment_of(name)
    assert all(isinstance(value, str) for value in environ.values()), "a number in YAML is no text"
    assert environ.keys() <= set(variables())
    settings: Settings = load_settings(environ, None)
    assert settings.role == ("engine" if name == "engine" else "edge")
    assert check_environment(settings) == []
    # What they name is there: hosts are services, files are mounted, ports are those that are published and looked at.
    assert re.search(r"//(?:.*@)?(\w+):", settings.bus.url.get_secret_value())[1] in SERVICES  # type: ignore[index]
    assert re.search(r"@(\w+):", settings.database.url.get_secret_value())[1] in SERVICES  # type: ignore[index]
    assert {"postgres", "redis"} == SERVICES[name]["depends_on"].keys()
    mounts = [volume.split(":")[1] for volume in SERVICES[name].get("volumes", [])]
    keys = settings.security.api_keys_file
    assert keys is None or str(keys.parent) in mounts
    assert all(port.split(":")[-1] == str(settings.api.port) for port in SERVICES[name].get("ports", []))
    assert f"127.0.0.1:{settings.api.port}/readyz" in DOCKERFILE
    assert f"EXPOSE {settings.api.port}" in DOCKERFILE
    grace = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert settings.api.shutdown_deadline < grace, "the rest is not killed while it stops"


def test_volumes_that_are_named_are_declared() -> None:
    named = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {name for name in named if not name.startswith(".")} == COMPOSE["volumes"].keys()
    assert {name for service in SERVICES.values() for name in service.get("secrets", [])} == set()


def test_what_the_image_copies_and_runs_exists() -> None:
    root = DEPLOY.parent
    for source in re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE):
        assert (root / source).exists(), source
    pinned = (root / "constraints.txt").read_text()
    assert re.search(r"^torch==", pinned, re.MULTILINE), "it is installed from the constraints alone"
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[1])  # type: ignore[index]
    assert f"{entry[0]} = " in (root / "pyproject.toml").read_text()
    for ignored in (".gitignore", ".dockerignore"):
        assert "deploy/keys" in (root / ignored).read_text(), "keys belong to nobody else"
