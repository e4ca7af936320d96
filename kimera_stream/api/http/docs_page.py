"""Both documents as one page of plain HTML: no script, no request to anywhere, legible without either."""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

_STYLE: Final = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--accent:#2563eb}
@media(prefers-color-scheme:dark){:root{--accent:#7aa2f7}}
body{font:15px/1.55 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1.5rem}
h1{margin:.2em 0}h2{margin:2.2em 0 .6em;border-bottom:1px solid var(--line);padding-bottom:.25em}
h3{margin:1.6em 0 .3em;font-size:1.05rem}
a{color:var(--accent)}nav a{margin-right:1rem}
code,pre{font:13px/1.5 ui-monospace,monospace}
code{background:var(--soft);border-radius:4px;padding:.1em .3em}
details{border:1px solid var(--line);border-radius:8px;margin:.5rem 0;padding:.4rem .9rem}
summary{cursor:pointer}
summary b{font:600 13px ui-monospace,monospace;display:inline-block;min-width:4.2em}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{text-align:left;vertical-align:top;border-top:1px solid var(--line);padding:.3rem .7rem .3rem 0}
th{font-weight:600}
.scroll{overflow-x:auto}.quiet{opacity:.72}
"""
STYLE_HASH: Final = "sha256-" + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
"""For the page's Content-Security-Policy: the page runs nothing and loads nothing, and has this style."""

_CODE: Final = re.compile(r"`([^`]+)`")


def render_docs(openapi: Mapping[str, Any], asyncapi: Mapping[str, Any]) -> str:
    """The page.

    Args:
        openapi: The OpenAPI document.
        asyncapi: The AsyncAPI document.
    """
    schemas = {**asyncapi["components"]["schemas"], **openapi["components"]["schemas"]}
    info = openapi["info"]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(info['title'])}: API</title><style>{_STYLE}</style>",
        f'<h1>{escape(info["title"])} <span class="quiet">{escape(info["version"])}</span></h1>',
        f"<p>{_prose(info['summary'])}. {_prose(info['description'])}</p>",
        '<nav><a href="#http">HTTP</a><a href="#websocket">WebSocket</a><a href="#events">Events</a>'
        '<a href="#codes">Codes</a><a href="#schemas">Objects</a><a href="/openapi.json">openapi.json</a>'
        '<a href="/asyncapi.json">asyncapi.json</a></nav>',
        '<h2 id="http">HTTP</h2>',
        *_http(openapi),
        '<h2 id="websocket">WebSocket</h2>',
        *_websocket(asyncapi),
        '<h2 id="events">Events</h2>',
        *_events(asyncapi),
        '<h2 id="codes">Codes</h2>',
        *_codes(asyncapi),
        '<h2 id="schemas">Objects</h2>',
    ]
    for name in sorted(schemas):
        parts += _schema(name, schemas[name])
    parts.append("</html>")
    return "\n".join(parts)


def _prose(text: str) -> str:
    shown = _CODE.sub(r"<code>\1</code>", escape(text))
    return shown.replace("\n\n", "<br><br>")


def _http(openapi: Mapping[str, Any]) -> Iterable[str]:
    for tag in openapi["tags"]:
        yield f"<h3>{escape(tag['name'])}</h3><p>{_prose(tag['description'])}</p>"
        for path, methods in openapi["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield from _operation(path, method, operation)


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterable[str]:
    yield f'<details id="{escape(operation["operationId"])}"><summary><b>{method.upper()}</b> <code>{escape(path)}</code> '
    yield f"{_prose(operation['summary'])}</summary>"
    if "description" in operation:
        yield f"<p>{_prose(operation['description'])}</p>"
    rows = [
        (f"<code>{escape(each['name'])}</code>", each["in"], _type(each["schema"]), _prose(each.get("description", "")))
        for each in operation.get("parameters", [])
    ]
    if rows:
        yield _table(("Parameter", "In", "Type", ""), rows)
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]
        yield _table(("Body", ""), [(escape(media), _type(content["schema"])) for media, content in body.items()])
    answers = []
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            answers.append((escape(status), '<a href="#schema-Problem">Problem</a>'))
            continue
        kinds = ", ".join(f"{_type(each['schema'])}" for each in _distinct(answer.get("content", {})))
        answers.append((escape(status), f"{_prose(answer['description'])} {kinds}"))
    yield _table(("Answer", ""), answers)
    yield "</details>"


def _distinct(content: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    seen: list[Any] = []
    for each in content.values():
        if each["schema"] not in seen:
            seen.append(each["schema"])
            yield each


def _websocket(asyncapi: Mapping[str, Any]) -> Iterable[str]:
    channel = asyncapi["channels"]["stream"]
    yield f"<p><code>GET {escape(channel['address'])}</code>. {_prose(asyncapi['info']['description'])}</p>"
    yield f"<p>{_prose(channel['description'])}</p>"
    rows = []
    for operation in asyncapi["operations"].values():
        if operation["action"] == "receive":
            sent = operation["messages"][0]["$ref"].rpartition("/")[2]
            reply = operation["reply"]["messages"][0]["$ref"].rpartition("/")[2]
            rows.append((_message(asyncapi, sent), _message(asyncapi, reply)))
    yield _table(("Command", "Reply (or <code>error</code>)"), rows)


def _events(asyncapi: Mapping[str, Any]) -> Iterable[str]:
    rows = []
    for reference in asyncapi["operations"]["push"]["messages"]:
        name = reference["$ref"].rpartition("/")[2]
        message = asyncapi["components"]["messages"][name]
        payload = message["payload"]
        data = _type(payload["properties"]["data"]) if "properties" in payload else _type(payload)
        rows.append((f"<code>{escape(name)}</code>", _prose(message.get("summary", "")), data))
    yield _table(("Push", "", "Data"), rows)


def _codes(asyncapi: Mapping[str, Any]) -> Iterable[str]:
    channel = asyncapi["channels"]["stream"]
    yield _table(
        ("Error code", ""),
        [
            (f"<code>{escape(code)}</code>", "temporary" if each["temporary"] else "")
            for code, each in channel["x-error-codes"].items()
        ],
    )
    yield _table(
        ("Close code", "Reason", ""),
        [
            (
                escape(code),
                f"<code>{escape(each['reason'])}</code>",
                "reconnect" if each["reconnect"] else "do not reconnect",
            )
            for code, each in channel["x-close-codes"].items()
        ],
    )


def _message(asyncapi: Mapping[str, Any], name: str) -> str:
    payload = asyncapi["components"]["messages"][name]["payload"]
    return f'<a href="#schema-{escape(payload["$ref"].rpartition("/")[2])}"><code>{escape(name)}</code></a>'


def _schema(name: str, schema: Mapping[str, Any]) -> Iterable[str]:
    yield f'<details id="schema-{escape(name)}"><summary><b>{escape(name)}</b></summary>'
    if "description" in schema:
        yield f"<p>{_prose(schema['description'])}</p>"
    required = schema.get("required", [])
    rows = [
        (
            f"<code>{escape(field)}</code>",
            _type(each),
            "" if field in required else "optional",
            _prose(each.get("description", "")),
        )
        for field, each in schema.get("properties", {}).items()
    ]
    yield _table(("Field", "Type", "", ""), rows) if rows else f"<p>{_type(schema)}</p>"
    yield "</details>"


def _type(schema: Any) -> str:
    """A schema in a few words; objects as links."""
    if not isinstance(schema, Mapping) or not schema:
        return "anything"
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in values)
    for group in ("anyOf", "oneOf"):
        if group in schema:
            return " | ".join(dict.fromkeys(_type(option) for option in schema[group]))
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("prefixItems", schema.get("items", {}))
        inner = ", ".join(map(_type, items)) if isinstance(items, list) else _type(items)
        return f"list of ({inner})"
    if kind == "object":
        extra = schema.get("additionalProperties")
        return f"object of ({_type(extra)})" if isinstance(extra, Mapping) and extra else "object"
    bounds = [
        f"{sign} {schema[key]:g}" if isinstance(schema[key], float) else f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("maximum", "≤"), ("maxLength", "up to"))
        if key in schema
    ]
    kinds = " | ".join(kind) if isinstance(kind, list) else str(kind)
    return escape(" ".join([kinds, *bounds]))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
