"""The AsyncAPI document says what the messages are."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from kimera_stream import engines
from kimera_stream.api.http.asyncapi import EVENT_DATA, asyncapi_document
from kimera_stream.protocol import log, messages
from kimera_stream.protocol.close_codes import CloseCode


@pytest.fixture
def document() -> dict[str, Any]:
    return asyncapi_document(version="1.2.3", host="127.0.0.1:8765", secure=False)


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
    for part in reference[2:].split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


def tags(union: Any) -> set[str]:
    return {str(kind.__struct_config__.tag) for kind in typing.get_args(union)}


def test_every_message_of_the_protocol_is_described(document):
    described = set(document["components"]["messages"])
    assert tags(messages.AnyCommand) <= described
    assert tags(messages.AnyServerMessage) - {"event"} <= described
    assert set(typing.get_args(log.EventType)) | {"field.updated", "stats.updated"} == set(EVENT_DATA)
    assert set(EVENT_DATA) <= described


def test_what_is_never_sent_is_told_so(document):
    described = document["components"]["messages"]
    code = "".join(file.read_text() for file in Path(engines.__path__[0]).rglob("*.py"))
    reserved = {name for name in EVENT_DATA if "Reserved" in described[name]["summary"]}
    assert reserved == {name for name in typing.get_args(log.EventType) if f'"{name}"' not in code}


def test_every_command_has_its_reply(document):
    commands = {name: each for name, each in document["operations"].items() if each["action"] == "receive"}
    assert set(commands) == tags(messages.AnyCommand)
    for operation in commands.values():
        replies = [resolve(document, each["$ref"]) for each in operation["reply"]["messages"]]
        assert len(replies) == 2
        assert replies[1]["$ref"].endswith("/error")
    replied = {each["reply"]["messages"][0]["$ref"].rpartition("/")[2] for each in commands.values()}
    pushed = {each["$ref"].rpartition("/")[2] for each in document["operations"]["push"]["messages"]}
    assert replied | pushed | {"error"} == (tags(messages.AnyServerMessage) - {"event"}) | set(EVENT_DATA)


def test_every_reference_leads_somewhere(document):
    for reference in set(references(document)):
        assert reference.startswith("#/")
        resolve(document, reference)


def test_messages_of_operations_belong_to_the_channel(document):
    for operation in document["operations"].values():
        prefix = operation["channel"]["$ref"] + "/messages/"
        for message in operation["messages"]:
            assert message["$ref"].startswith(prefix)


def test_schemas_are_of_draft_07(document):
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft7Validator.check_schema(schema)
        assert "prefixItems" not in str(schema)
    subs = document["components"]["schemas"]["Connected"]["properties"]["subs"]["anyOf"][0]
    assert subs["items"]["discriminator"] == "op"  # a bare name: AsyncAPI knows no mapping


def test_an_event_fits_its_schema(document):
    event = {"op": "event", "channel": "scars", "epoch": "E", "offset": 3, "type": "scar.formed", "ts": 1, "data": {
        "id": "s", "contradiction_id": "c", "geoids": ["a", "b"], "decision": "buffer", "reason": None, "resolved_by": "x",
        "vault": "a", "pre_entropy": 1.0, "post_entropy": 1.0, "delta_entropy": 0.0, "weight": 1.0, "created_at": 1,
        "offset": 3,
    }}  # fmt: skip
    payload = document["components"]["messages"]["scar.formed"]["payload"]
    schema = {**payload, "components": document["components"]}
    jsonschema.validate(event, schema, cls=jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**event, "type": "scar.lost"}, schema, cls=jsonschema.Draft7Validator)


def test_close_codes_and_encodings_are_described(document):
    codes = document["channels"]["stream"]["x-close-codes"]
    assert set(map(int, codes)) == set(map(int, CloseCode))
    assert codes["4001"] == {"reason": "slow_consumer", "reconnect": True}
    for name in messages.SUBPROTOCOLS:
        assert name in document["channels"]["stream"]["description"]


@pytest.mark.anyio
async def test_it_is_served_with_the_address_that_was_called(world):
    async with world.client() as http:
        answer = await http.get("/asyncapi.json")
    document = answer.json()
    assert document["asyncapi"] == "3.0.0"
    assert document["servers"]["websocket"]["host"] == "127.0.0.1:8765"
    assert document["servers"]["websocket"]["protocol"] == "ws"
    assert msgspec.json.decode(answer.content) == document
