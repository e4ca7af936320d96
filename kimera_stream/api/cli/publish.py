"""``kimera-stream publish`` and ``resolve``."""

import sys
from typing import Annotated, Any

import typer

from kimera_stream.api.cli.console import clean, out, print_json, usage_error
from kimera_stream.api.cli.options import DEFAULT_URL, Json, Token, Url


def publish(
    text: Annotated[str | None, typer.Argument(help="The statement; `-` reads it from standard input.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="Id of the geoid; an existing one is updated.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", help="Who says it.")] = None,
    session: Annotated[str | None, typer.Option("--session", help="Session that it belongs to.")] = None,
    purpose: Annotated[str | None, typer.Option("--purpose", help="What it is for.")] = None,
    symbol: Annotated[
        list[str] | None, typer.Option("--symbol", "-s", metavar="KEY=VALUE", help="A hard assertion; repeatable.")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", metavar="KEY=WEIGHT", help="A semantic feature; repeatable.")
    ] = None,
    metadata: Annotated[str | None, typer.Option("--metadata", help="A JSON object.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Idempotency key.")] = None,
    json: Json = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Publish a statement and show what it contradicts."""
    from kimera_stream.client.http import HttpClient
    from kimera_stream.protocol.objects import GeoidBody

    if text == "-":
        text = sys.stdin.read().strip()
    if not text and not symbol and not feature:
        raise usage_error("give a statement, or --symbol, or --feature")
    body = GeoidBody(
        text=text or None,
        id=id,
        originator_agent_id=agent,
        session_id=session,
        purpose=purpose,
        symbolic_state=symbols_of(symbol or []) or None,
        semantic_state=features_of(feature or []) or None,
        metadata=None if metadata is None else object_of(metadata, "--metadata"),
    )
    with HttpClient(url, token=token) as client:
        published = client.publish(body, key=key)
    if json:
        print_json(published)
        return
    import msgspec

    from kimera_stream.api.cli.render import contradiction_text

    console = out()
    again = " (published before with this key)" if published.duplicate else ""
    console.print(
        f"{clean(published.geoid.id)} version {published.geoid.version} at offset {published.offset}{again}",
        style="dim",
    )
    for found in published.contradictions:
        console.print(contradiction_text(msgspec.to_builtins(found)))
    if not published.contradictions:
        console.print("contradicts nothing", style="green")


def resolve(
    contradiction_id: Annotated[str, typer.Argument(help="Id of the contradiction.")],
    decision: Annotated[str, typer.Argument(help="collapse, surge or buffer.")],
    reason: Annotated[str | None, typer.Option("--reason", help="Why, for the record.")] = None,
    json: Json = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Resolve a contradiction; the decision stays on record as a scar."""
    from kimera_stream.client.http import HttpClient

    if decision not in ("collapse", "surge", "buffer"):
        raise usage_error(f"decision: expected collapse, surge or buffer, got {decision!r}")
    with HttpClient(url, token=token) as client:
        scar, offset = client.resolve(contradiction_id, decision, reason)  # type: ignore[arg-type]
    if json:
        print_json({"scar": scar, "offset": offset})
        return
    console = out()
    console.print(f"resolved by {scar.decision}: scar {scar.id} at offset {offset}", style="green")
    console.print(
        f"entropy {scar.pre_entropy:.3f} → {scar.post_entropy:.3f} bits ({scar.delta_entropy:+.3f}), "
        f"vault {scar.vault}, weight {scar.weight:.3f}",
        style="dim",
    )


def symbols_of(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value that reads as a JSON scalar (12, 1.5, true, null, "x") is one, else it is a string."""
    import msgspec

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise usage_error(f"--symbol: expected KEY=VALUE, got {pair!r}")
        try:
            found[key] = msgspec.json.decode(value, type=str | int | float | bool | None)
        except msgspec.DecodeError:
            found[key] = value
    return found


def features_of(pairs: list[str]) -> dict[str, float]:
    """``KEY=WEIGHT`` pairs."""
    found: dict[str, float] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            found[key] = float(value)
        except ValueError:
            raise usage_error(f"--feature: expected KEY=WEIGHT with a number, got {pair!r}") from None
    return found


def object_of(text: str, option: str) -> dict[str, Any]:
    """A JSON object given as an option."""
    import msgspec

    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise usage_error(f"{option}: expected a JSON object ({exc})") from None
