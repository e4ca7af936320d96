"""Routes of the dashboard. Everything it needs is in the package: no build step, nothing from other hosts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.errors import NotFoundError

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    # Scripts and styles come from files of this server alone; 'self' covers its WebSocket too.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the dashboard, held in memory."""

    body: bytes
    media_type: str
    etag: str


def load_assets() -> Mapping[str, Asset]:
    """Every file of the dashboard by name."""
    assets = {}
    for file in (files(__package__) / "static").iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            body = file.read_bytes()
            digest = hashlib.blake2b(body, digest_size=12).hexdigest()
            assets[file.name] = Asset(body, media_type, f'"{digest}"')
    return assets


def dashboard_routes(settings: Settings) -> list[Route]:
    """``/`` and the files under ``/dashboard/``; none where the dashboard is switched off."""
    if not settings.api.dashboard:
        return []
    assets = load_assets()

    async def page(request: Request) -> Response:
        return _answer(request, assets["index.html"])

    async def asset(request: Request) -> Response:
        found = assets.get(request.path_params["name"])
        if found is None:
            raise NotFoundError(f"the dashboard has no file {request.path_params['name']!r}")
        return _answer(request, found)

    return [
        Route("/", page, methods=["GET"], name="dashboard"),
        Route("/dashboard/{name}", asset, methods=["GET"], name="dashboard-asset"),
    ]


def _answer(request: Request, asset: Asset) -> Response:
    headers = {**HEADERS, "etag": asset.etag}
    if request.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.media_type, headers=headers)
