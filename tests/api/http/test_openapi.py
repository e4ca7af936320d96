"""The OpenAPI document says what the routes do."""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest
from starlette.routing import Route

from kimera_stream.api.http.documents import Documents
from kimera_stream.api.http.openapi import ERROR_TEXTS
from kimera_stream.api.http.routes import OPERATIONS, http_routes
from kimera_stream.protocol.errors import ERRORS_BY_CODE

CONTRACT = {
    "/v1/geoids": {"get", "post"},
    "/v1/geoids/{id}": {"get", "patch", "delete"},
    "/v1/geoids/{id}/contradictions": {"get"},
    "/v1/contradictions": {"get"},
    "/v1/contradictions/{id}": {"get"},
    "/v1/contradictions/{id}/resolve": {"post"},
    "/v1/scars": {"get"},
    "/v1/score": {"post"},
    "/v1/search": {"post"},
    "/v1/events": {"get"},
    "/v1/history": {"get"},
    "/v1/watches": {"get", "post", "delete"},
    "/v1/stats": {"get"},
    "/v1/field": {"get"},
    "/v1/usage": {"get"},
    "/v1/revocations": {"post"},
    "/livez": {"get"},
    "/readyz": {"get"},
    "/health": {"get"},
    "/metrics": {"get"},
    "/openapi.json": {"get"},
    "/asyncapi.json": {"get"},
    "/docs": {"get"},
}


@pytest.fixture
def document() -> dict[str, Any]:
    return Documents(OPERATIONS, "1.2.3").openapi


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def resolve(document: Any, reference: str) -> Any:
    assert reference.startswith("#/"), reference
    for part in reference[2:].split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_contract_the_routes_and_the_document_have_the_same_paths(world, document):
    documented = {path: set(methods) for path, methods in document["paths"].items()}
    routed = {route.path for route in http_routes(world.door) if isinstance(route, Route)}
    assert documented == CONTRACT
    assert routed == set(CONTRACT)


def test_the_document_is_openapi_3_1(document):
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == "1.2.3"
    assert set(document) == {"openapi", "info", "servers", "tags", "paths", "components"}
    msgspec.json.encode(document)


def test_every_reference_leads_somewhere(document):
    for reference in set(references(document)):
        resolve(document, reference)


def test_every_schema_is_a_json_schema(document):
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for _, _, operation in operations(document):
        for parameter in operation.get("parameters", []):
            jsonschema.Draft202012Validator.check_schema(parameter["schema"])


def test_operations_are_complete(document):
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    tags = {tag["name"] for tag in document["tags"]}
    for path, method, operation in operations(document):
        assert operation["summary"], (path, method)
        assert set(operation["tags"]) <= tags
        in_path = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path))
        keys = [(each["name"], each["in"]) for each in operation.get("parameters", [])]
        assert len(keys) == len(set(keys))
        assert any(status.startswith("2") for status in operation["responses"])
        assert all(answer.get("description") or "$ref" in answer for answer in operation["responses"].values())
        assert operation["security"] is not None


def test_every_error_has_a_documented_status(document):
    documented = {int(name.removeprefix("Error")) for name in document["components"]["responses"]}
    assert documented == set(ERROR_TEXTS)
    assert {kind.status for kind in ERRORS_BY_CODE.values()} <= documented
    codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert set(ERRORS_BY_CODE) <= set(codes)


@pytest.mark.anyio
async def test_answers_fit_the_schemas(document, world, make_contradiction):
    world.vault.contradictions = {"c1": make_contradiction("c1", 1)}
    world.hub.latest("field", "field.updated", msgspec.json.encode(world.door.services.field.state()), offset=0)
    calls = [
        ("post", "/v1/geoids", "/v1/geoids", {"text": "a", "id": "x"}),
        ("post", "/v1/geoids", "/v1/geoids", [{"text": "a"}, {"text": 5}]),
        ("get", "/v1/geoids", "/v1/geoids", None),
        ("get", "/v1/geoids/{id}", "/v1/geoids/x", None),
        ("patch", "/v1/geoids/{id}", "/v1/geoids/x", {"metadata": {"n": 1}}),
        ("get", "/v1/geoids/{id}", "/v1/geoids/nobody", None),
        ("get", "/v1/contradictions", "/v1/contradictions", None),
        ("get", "/v1/contradictions/{id}", "/v1/contradictions/c1", None),
        ("post", "/v1/contradictions/{id}/resolve", "/v1/contradictions/c1/resolve", {"decision": "surge"}),
        ("get", "/v1/scars", "/v1/scars", None),
        ("post", "/v1/score", "/v1/score", {"a": {"text": "a"}, "b": {"text": "b"}}),
        ("post", "/v1/search", "/v1/search", {"text": "a"}),
        ("post", "/v1/watches", "/v1/watches", {"watch": "w", "text": "a", "kinds": ["related"]}),
        ("get", "/v1/watches", "/v1/watches", None),
        ("delete", "/v1/watches", "/v1/watches?watch=w", None),
        ("get", "/v1/history", "/v1/history?channel=geoids", None),
        ("get", "/v1/field", "/v1/field", None),
        ("get", "/readyz", "/readyz", None),
        ("get", "/health", "/health", None),
        ("delete", "/v1/geoids/{id}", "/v1/geoids/x", None),
    ]
    async with world.client() as http:
        for method, path, url, body in calls:
            answer = await http.request(method, url, json=body)
            described = document["paths"][path][method]["responses"][str(answer.status_code)]
            if "$ref" in described:
                described = resolve(document, described["$ref"])
            media = answer.headers["content-type"].partition(";")[0]
            schema = {**described["content"][media]["schema"], "components": document["components"]}
            jsonschema.validate(answer.json(), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.anyio
async def test_the_documents_are_served(world):
    async with world.client() as http:
        openapi = await http.get("/openapi.json")
        page = await http.get("/docs")
    assert openapi.json()["info"]["title"] == "Kimera Stream"
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script" not in page.text
    assert "src=" not in page.text
    for path in CONTRACT:
        assert f"<code>{path}</code>" in page.text
    for code in ERRORS_BY_CODE:
        assert f"<code>{code}</code>" in page.text
    anchors = set(re.findall(r'id="([^"]+)"', page.text))
    assert set(re.findall(r'href="#([^"]+)"', page.text)) <= anchors
