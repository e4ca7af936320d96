"""The settings reference: ``python -m kimera_stream.infrastructure.settings_docs > docs/settings.md``."""

import sys
from itertools import groupby

from kimera_stream.infrastructure.settings_loading import EXEMPT, Variable, variables

INTRODUCTION = """\
# Settings

Generated from the code by `python -m kimera_stream.infrastructure.settings_docs > docs/settings.md`; a test compares the two.

Every setting is a variable of the environment, or a line of `.env` in the working directory. The environment goes before
the file; an empty value counts as not set. An unknown variable that begins with `KIMERA_` stops the start, and so does a value
that is not allowed: one line says which, what was given and what is allowed. `kimera-stream config check` tells without
starting, `kimera-stream config show` lists what is in force and where each value is from, with secrets masked.

A secret can come from a file of its own: the variable's name with `_FILE` behind it, as in
`KIMERA_DATABASE__URL_FILE=/run/secrets/database-url`. Secrets are marked with \N{KEY}. Variables that begin with
{exempt} are not the server's and are left alone.

Templates: `deploy/env/development.env`, `deploy/env/staging.env`, `deploy/env/production.env`.
Staging and production refuse what is right on a developer's machine only: open access, a relative data directory,
tokens whose issuer is not checked, any origin.
"""
TITLES = {
    "": "General",
    "database": "Database",
    "bus": "Bus",
    "api": "API",
    "stream": "Stream",
    "embedding": "Embedding",
    "scoring": "Scoring",
    "performance": "Performance",
    "paths": "Paths",
    "security": "Security",
    "telemetry": "Telemetry",
}


def render() -> str:
    """The reference as Markdown, one table per group."""
    exempt = [f"`{prefix}`" for prefix in EXEMPT]
    parts = [INTRODUCTION.replace("{exempt}", f"{', '.join(exempt[:-1])} or {exempt[-1]}")]
    for group, members in groupby(variables().values(), key=_group):
        parts.append(
            f"\n## {TITLES[group]}\n\n| variable | allowed | default | description |\n| --- | --- | --- | --- |\n"
        )
        parts.extend(_row(variable) for variable in members)
    return "".join(parts)


def _group(variable: Variable) -> str:
    return variable.path[0] if len(variable.path) > 1 else ""


def _row(variable: Variable) -> str:
    key = " \N{KEY}" if variable.secret else ""
    default = f"`{variable.default}`" if variable.default else ""
    cells = (f"`{variable.name}`{key}", variable.allowed, default, variable.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(render())
