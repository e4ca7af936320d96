"""The OpenAPI 3.1 document, out of the same table that the routes are built from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from kimera_stream.api.http.operations import Answer, Content, ListOf, OneOf, Operation
from kimera_stream.api.problems import PROBLEM_JSON, Problem
from kimera_stream.protocol.errors import ERRORS_BY_CODE

REF: Final = "#/components/schemas/{name}"
TAGS: Final = {
    "geoids": "Statements: publish, read, update, delete.",
    "contradictions": "Pairs of statements that cannot both hold, and the scars of resolved ones.",
    "meaning": "Compare, search and watch.",
    "stream": "What happened and what happens. The WebSocket is described in /asyncapi.json.",
    "operations": "For whoever operates the server.",
    "documents": "These documents.",
}
ERROR_TEXTS: Final = {
    400: "Something in the request is not what was expected",
    401: "A valid token is needed",
    403: "The token does not carry the role, the page's origin is refused, or a limit is exceeded",
    404: "There is no such thing",
    405: "The path does not have this method",
    408: "The body did not come",
    409: "It conflicts with the present state",
    413: "The body, or a part of it, is too large",
    415: "The body is of a type that is not understood",
    429: "Too many requests; try again after `Retry-After` seconds",
    500: "The server made a mistake",
    503: "Starting, stopping, overloaded or unavailable; try again after `Retry-After` seconds",
}
ALWAYS: Final = (400, 500)
GUARDED: Final = (401, 403)
WORKING: Final = (429, 503)
_IN_PATH: Final = re.compile(r"\{(\w+)\}")


def schema_of(shape: Any) -> Any:
    """The JSON Schema of a body's shape; struct types by reference."""
    if isinstance(shape, OneOf):
        return {"anyOf": [schema_of(option) for option in shape.options]}
    if isinstance(shape, ListOf):
        return {"type": "array", "items": schema_of(shape.item)}
    if shape is None:
        return {"type": "string"}
    (schema,), _ = msgspec.json.schema_components([shape], ref_template=REF)
    return schema


def leaves(shape: Any) -> Iterable[Any]:
    """The types that a shape is made of."""
    if isinstance(shape, OneOf):
        for option in shape.options:
            yield from leaves(option)
    elif isinstance(shape, ListOf):
        yield from leaves(shape.item)
    elif shape is not None:
        yield shape


def openapi_document(operations: Sequence[Operation], *, version: str) -> dict[str, Any]:
    """The whole document, as builtins."""
    types: dict[Any, None] = {Problem: None}
    for operation in operations:
        for content in _contents(operation):
            types.update(dict.fromkeys(leaves(content.type)))
    _, schemas = msgspec.json.schema_components(list(types), ref_template=REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Kimera Stream",
            "version": version,
            "summary": "A live contradiction detector for streams of statements",
            "description": (
                "JSON in and out, or MessagePack by `Accept` and `Content-Type`. Errors are `application/problem+json` "
                "(RFC 9457) with a `code`: " + ", ".join(f"`{code}`" for code in ERRORS_BY_CODE) + "."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {f"Error{status}": _error_response(status, text) for status, text in ERROR_TEXTS.items()},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A JWT or an API key. Open access needs none (development, on a loopback address).",
                }
            },
        },
    }


def _contents(operation: Operation) -> Iterable[Content]:
    yield from operation.body
    for each in operation.answers.values():
        yield from each.contents


def _operation(operation: Operation) -> dict[str, Any]:
    shown: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary, "tags": [operation.tag]}
    description = operation.description
    if operation.access == "token" and operation.role is not None:
        description = f"{description}\n\nNeeds the role `{operation.role}`.".strip()
    if description:
        shown["description"] = description
    if parameters := _parameters(operation):
        shown["parameters"] = parameters
    if operation.body:
        shown["requestBody"] = {"required": operation.body_required, "content": _media(operation.body)}
    responses: dict[str, Any] = {str(status): _answer(each) for status, each in operation.answers.items()}
    statuses = {*ALWAYS, *operation.fails}
    if operation.access != "open":
        statuses.update(GUARDED)
    if operation.needs_services:
        statuses.update(WORKING)
    for status in sorted(statuses - set(operation.answers)):
        responses[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    shown["responses"] = dict(sorted(responses.items()))
    shown["security"] = {"open": [], "inside": [{}, {"bearer": []}], "token": [{"bearer": []}]}[operation.access]
    return shown


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": operation.path_fields[name],
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.~-]{1,128}$"},
        }
        for name in _IN_PATH.findall(operation.path)
    ]
    _, components = msgspec.json.schema_components([operation.query], ref_template=REF)
    query = components[operation.query.__name__]
    required = query.get("required", [])
    for name, schema in query["properties"].items():
        plain = dict(schema)
        description = plain.pop("description", None)
        for option in plain.get("anyOf", []):
            description = description or option.pop("description", None)
        if "anyOf" in plain:  # what may be left out is never sent as null
            kept = [option for option in plain["anyOf"] if option != {"type": "null"}]
            plain = kept[0] if len(kept) == 1 else {"anyOf": kept}
        if "enum" in plain:
            plain["enum"] = [value for value in plain["enum"] if value is not None]
        if plain.get("default", 0) is None:
            del plain["default"]
        parameter = {"name": name, "in": "query", "required": name in required, "schema": plain}
        if description:
            parameter["description"] = description
        shown.append(parameter)
    shown += [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in operation.header_fields.items()
    ]
    return shown


def _media(contents: Iterable[Content]) -> dict[str, Any]:
    return {
        content.media: {"schema": schema_of(content.type)}
        | ({"x-description": content.description} if content.description else {})
        for content in contents
    }


def _answer(answer: Answer) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": answer.description}
    if answer.contents:
        shown["content"] = _media(answer.contents)
    if answer.headers:
        shown["headers"] = _headers(answer.headers)
    return shown


def _headers(headers: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()}


def _error_response(status: int, text: str) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "description": text,
        "content": {PROBLEM_JSON: {"schema": {"$ref": REF.format(name="Problem")}}},
    }
    if status in (429, 503):
        shown["headers"] = _headers({"Retry-After": "Seconds after which another try is worth it."})
    if status == 401:
        shown["headers"] = _headers({"WWW-Authenticate": "Bearer."})
    return shown
