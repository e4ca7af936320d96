"""/openapi.json, /asyncapi.json and /docs."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from kimera_stream.api.http.asyncapi import asyncapi_document
from kimera_stream.api.http.content import JSON
from kimera_stream.api.http.docs_page import STYLE_HASH, render_docs
from kimera_stream.api.http.openapi import openapi_document
from kimera_stream.api.http.operations import Answer, Call, Content, Operation

_CACHED: Final = {"cache-control": "no-cache"}


class Documents:
    """The documents of a table of operations, their own included. Built at the first request."""

    def __init__(self, operations: Sequence[Operation], version: str) -> None:
        self._version = version
        self.operations: tuple[Operation, ...] = (*operations, *self._own())

    @cached_property
    def openapi(self) -> dict[str, Any]:
        return openapi_document(self.operations, version=self._version)

    def asyncapi(self, host: str, *, secure: bool) -> dict[str, Any]:
        return asyncapi_document(version=self._version, host=host, secure=secure)

    @cached_property
    def _page(self) -> str:
        return render_docs(self.openapi, self.asyncapi("localhost", secure=False))

    async def _get_openapi(self, call: Call) -> ASGIApp:
        return Response(msgspec.json.encode(self.openapi), headers=_CACHED, media_type=JSON)

    async def _get_asyncapi(self, call: Call) -> ASGIApp:
        url = call.request.url
        document = self.asyncapi(url.netloc or "localhost", secure=url.scheme == "https")
        return Response(msgspec.json.encode(document), headers=_CACHED, media_type=JSON)

    async def _get_docs(self, call: Call) -> ASGIApp:
        policy = (
            f"default-src 'none'; style-src '{STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {**_CACHED, "content-security-policy": policy, "referrer-policy": "no-referrer"}
        return Response(self._page, headers=headers, media_type="text/html")

    def _own(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="GET",
                path="/openapi.json",
                name="getOpenApi",
                summary="This document",
                handler=self._get_openapi,
                tag="documents",
                access="open",
                answers={200: Answer("OpenAPI 3.1", (Content(dict[str, Any]),))},
                needs_services=False,
            ),
            Operation(
                method="GET",
                path="/asyncapi.json",
                name="getAsyncApi",
                summary="The messages of the WebSocket and of the event stream",
                handler=self._get_asyncapi,
                tag="documents",
                access="open",
                answers={200: Answer("AsyncAPI 3.0", (Content(dict[str, Any]),))},
                needs_services=False,
            ),
            Operation(
                method="GET",
                path="/docs",
                name="getDocs",
                summary="Both documents as one page",
                handler=self._get_docs,
                tag="documents",
                access="open",
                answers={200: Answer("The page", (Content(None, "text/html"),))},
                needs_services=False,
            ),
        )
