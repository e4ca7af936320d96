"""How events look in a terminal."""

import time
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from kimera_stream.api.cli.clash import clash
from kimera_stream.api.cli.console import clean


def contradiction_text(data: Mapping[str, Any], *, names: Mapping[str, str] | None = None) -> Text:
    """The two statements one above the other, the words they differ in marked, the score and why.

    Args:
        data: A contradiction object.
        names: Source of each geoid id, where known.
    """
    names = names or {}
    a = clean(str(data.get("a_text") or data["a"]))
    b = clean(str(data.get("b_text") or data["b"]))
    spans = clash(a, b)
    score = float(data["score"])
    text = Text()
    text.append(f" {score:.2f} ", style=f"bold white on {_heat(score)}")
    text.append(" contradiction", style="bold")
    if data.get("gradient_type") == "symbolic":
        text.append(" (symbolic)", style="dim")
    if data.get("provisional"):
        text.append(" (provisional)", style="dim")
    text.append(f"  {data['id']}\n", style="dim")
    for mark, key, statement, marked in (("┌", "a", a, spans[0]), ("├", "b", b, spans[1])):
        text.append(f"  {mark} ", style="dim")
        body = Text(statement)
        for start, end in marked:
            body.stylize("bold yellow", start, end)
        text.append_text(body)
        source = names.get(str(data[key]))
        if source:
            text.append(f"  · {clean(source)}", style="cyan")
        text.append("\n")
    text.append("  └ ", style="dim")
    why = "; ".join(clean(str(reason)) for reason in data.get("why") or ()) or "the texts as a whole"
    text.append(f"why: {why}", style="italic")
    advice = data.get("decision")
    if advice:
        text.append(f"  → {advice}", style="dim")
    return text


def event_text(event: Mapping[str, Any]) -> Text:
    """One event of any channel."""
    kind = str(event["type"])
    data = event["data"]
    stamp = Text(time.strftime("%H:%M:%S ", time.localtime(event["ts"] / 1000)), style="dim")
    if kind == "contradiction.found":
        return stamp.append_text(contradiction_text(data))
    if kind.startswith("contradiction."):
        word = kind.removeprefix("contradiction.")
        texts = f"{clean(str(data.get('a_text') or data['a']))}  |  {clean(str(data.get('b_text') or data['b']))}"
        return stamp.append(f"{word:<9}", style="green").append(texts).append(f"  {data['id']}", style="dim")
    if kind.startswith("geoid."):
        word = kind.removeprefix("geoid.")
        style = {"created": "blue", "updated": "magenta", "deleted": "red"}.get(word, "")
        stamp.append(f"{word:<9}", style=style).append(clean(str(data.get("text") or _facts(data))))
        source = data.get("originator_agent_id")
        if source:
            stamp.append(f"  · {clean(str(source))}", style="cyan")
        return stamp.append(f"  {data['id']}", style="dim")
    if kind == "scar.formed":
        stamp.append("scar     ", style="red").append(f"{data['decision']}  by {clean(str(data['resolved_by']))}")
        if data.get("reason"):
            stamp.append(f"  “{clean(str(data['reason']))}”")
        return stamp.append(f"  {data['contradiction_id']}", style="dim")
    if kind == "watch.matched":
        return _match(stamp, data)
    if kind == "field.updated":
        numbers = "  ".join(
            f"{name} {data[name]:.3f}" for name in ("entropy", "temperature", "activation", "stability")
        )
        return stamp.append(f"field    {numbers}")
    return stamp.append(f"{kind:<9}").append(clean(_short(data)))


def _match(stamp: Text, data: Mapping[str, Any]) -> Text:
    stamp.append(f"{data['kind']} ", style="yellow").append(f"{data['score']:.2f}  watch {clean(str(data['watch']))}  ")
    stamp.append(clean(str(data["geoid"].get("text") or data["geoid"]["id"])))
    if data.get("contradiction"):
        stamp.append("\n").append_text(contradiction_text(data["contradiction"]))
    return stamp


def _facts(data: Mapping[str, Any]) -> str:
    symbols = data.get("symbolic_state") or {}
    if symbols:
        return ", ".join(f"{key}={value}" for key, value in symbols.items())
    return "(vector only)"


def _short(data: object) -> str:
    text = str(data)
    return text if len(text) <= 200 else text[:199] + "…"


def _heat(score: float) -> str:
    return "red" if score >= 0.8 else "dark_orange3" if score >= 0.6 else "yellow4"
