"""``kimera-stream search`` and ``score``."""

from typing import Annotated

import typer

from kimera_stream.api.cli.console import clean, out, print_json, usage_error
from kimera_stream.api.cli.options import DEFAULT_URL, Json, Token, Url


def search(
    text: Annotated[str, typer.Argument(help="What to look for.")],
    contradicts: Annotated[
        bool, typer.Option("--contradicts", help="Statements that contradict it, not those related to it.")
    ] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="How many at most.")] = 10,
    filter: Annotated[str | None, typer.Option("--filter", help="Filter, as for tail.")] = None,
    json: Json = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Find statements that are related to a text, or that contradict it."""
    from kimera_stream.api.cli.filters import parse_filter
    from kimera_stream.client.http import HttpClient

    tree = None if filter is None else parse_filter(filter)
    with HttpClient(url, token=token) as client:
        hits = client.search(text, relation="contradicts" if contradicts else "related", k=k, filter=tree)
    if json:
        for hit in hits:
            print_json(hit)
        return
    console = out()
    for hit in hits:
        line = f"{hit.score:.3f}  {clean(hit.geoid.text or hit.geoid.id)}"
        source = f"  · {clean(hit.geoid.originator_agent_id)}" if hit.geoid.originator_agent_id else ""
        console.print(f"{line}{source}  ({hit.geoid.id})")
    if not hits:
        console.print("nothing found", style="dim")


def score(
    a: Annotated[str, typer.Argument(help="One statement.")],
    b: Annotated[str, typer.Argument(help="Another statement.")],
    explain: Annotated[bool, typer.Option("--explain", help="Also say what each stage of the cascade found.")] = False,
    json: Json = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Say how much two statements contradict each other; nothing is stored."""
    from kimera_stream.client.http import HttpClient

    if not a.strip() or not b.strip():
        raise usage_error("give two statements")
    with HttpClient(url, token=token) as client:
        result = client.score(a, b, explain=explain)
    if json:
        print_json(result)
        return
    console = out()
    console.print(f"{result.score:.3f}  {'; '.join(map(clean, result.why)) or 'nothing speaks for a contradiction'}")
    parts = result.components
    for name in type(parts).__struct_fields__:
        console.print(f"  {name:<24}{getattr(parts, name):.3f}", style="dim")
    for stage in result.stages:
        value = "" if stage.value is None else f"{stage.value:.3f}"
        passed = {True: "passes", False: "ends here", None: ""}[stage.passed]
        console.print(
            f"  {stage.stage:<12}{'' if stage.ran else 'not run':<10}{value:<8}{passed:<11}"
            f"{'' if stage.ms is None else f'{stage.ms:.1f} ms':<11}{clean(stage.note)}".rstrip(),
            style="dim",
        )
