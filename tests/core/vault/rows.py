"""One database with rows in every table and a value in every column, and which revision of the schema brought what.

The rows are what a server of the newest revision wrote, and are written down here so that nothing of today's code makes them: a
database of an older revision is its migrations and these rows without what came later.
"""

import struct
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from kimera_stream.infrastructure.database import async_url

NEW: dict[str, set[str]] = {
    "0001": {
        "log_state",
        "log_entry",
        "log_channel",
        "geoid",
        "geoid_version",
        "semantic_feature",
        "symbolic_feature",
        "contradiction",
        "scar",
        "watch",
        "cursor",
        "idempotency_key",
        "audit_entry",
    },
    "0002": {"session", "usage", "checkpoint", "checkpoint_request"},
    "0003": {"usage.tokens"},
    "0004": {"dead_letter", "checkpoint_request.not_before"},
    "0005": {"cluster", "node", "slice", "lease", "geoid.stated"},
    "0006": {"revocation"},
    "0007": set(),  # an index
    "0008": {"idempotency_key.checksum"},
    "0009": {"usage.bytes"},
}
"""Tables, and columns of tables that were there before."""

DEFAULTS: dict[str, Any] = {
    "usage.tokens": 0,
    "usage.bytes": 0,
    "checkpoint_request.not_before": 0,
    "geoid.stated": 0,
    "idempotency_key.checksum": None,
}
"""What a column says in rows that were there before it."""

SESSIONS = [("s", "ann", 2, 1002, 1007), ("t", "bob", 1, 1003, 1003)]
"""What 0002 makes of the geoids that are there."""

NUMBERED = {"audit_entry", "dead_letter", "revocation"}
"""Their ``id`` is given by the database."""

VECTOR = struct.pack("<8f", *(n / 8 for n in range(8)))

_ROWS: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "log_state": (
        "id epoch head trimmed payload_bytes encoder created_at",
        [
            (1, "an-older-epoch-1", 8, 1, 1670, "minilm/1", 1699999999000),
        ],
    ),
    "log_entry": (
        "offset type ts channels checksum data",
        [
            (
                2,
                "geoid.created",
                1002,
                "geoids geoid:b session:s agent:ag",
                1263715359,
                b'{"id":"b","version":1,"text":"statement b","semantic_state":{"x":0.5},"symbolic_state":{"n":1},"metadata":{"p":[1]},"session_id":"s","originator_agent_id":"ag","purpose":"p","entropy":0.0,"created_at":1002,"updated_at":1002,"offset":2}',
            ),
            (
                3,
                "geoid.created",
                1003,
                "geoids geoid:c session:t",
                2740028559,
                b'{"id":"c","version":1,"text":"statement c","semantic_state":{},"symbolic_state":{},"metadata":{},"session_id":"t","entropy":0.0,"created_at":1003,"updated_at":1003,"offset":3}',
            ),
            (
                4,
                "geoid.created",
                1004,
                "geoids geoid:d session:t",
                1312468093,
                b'{"id":"d","version":1,"text":"statement d","semantic_state":{},"symbolic_state":{},"metadata":{},"session_id":"t","entropy":0.0,"created_at":1004,"updated_at":1004,"offset":4}',
            ),
            (
                5,
                "contradiction.found",
                5,
                "contradictions geoid:a geoid:b",
                1243817337,
                b'{"id":"c1","a":"a","b":"b","a_text":"statement a","b_text":"statement b","score":0.75,"components":{"relatedness":0.1,"semantic":0.2,"embedding_misalignment":0.3,"layer_conflict":0.4,"symbolic_opposition":0.5,"composite":0.6},"why":["symbolic: status: \'up\' vs \'down\'","he said \\"no\\""],"gradient_type":"symbolic","pulse_strength":0.9,"decision":"collapse","state":"open","model":"rules/1","detected_at":2005,"offset":5,"version":1,"provisional":true}',
            ),
            (
                6,
                "scar.formed",
                5,
                "scars",
                4035334601,
                b'{"id":"s1","contradiction_id":"c1","geoids":["x","y"],"decision":"surge","reason":"because","resolved_by":"ann","vault":"a","pre_entropy":1.5,"post_entropy":1.0,"delta_entropy":-0.5,"weight":0.25,"created_at":3006,"offset":6}',
            ),
            (
                7,
                "geoid.updated",
                1007,
                "geoids geoid:a session:s agent:ag",
                162901299,
                b'{"id":"a","version":2,"text":"statement a","semantic_state":{"x":0.5},"symbolic_state":{"n":1},"metadata":{"p":[1]},"session_id":"s","originator_agent_id":"ag","purpose":"p","entropy":0.0,"created_at":1007,"updated_at":1007,"offset":7}',
            ),
            (
                8,
                "geoid.deleted",
                1008,
                "geoids geoid:d session:t",
                1901026664,
                b'{"id":"d","version":1,"text":"statement d","semantic_state":{},"symbolic_state":{},"metadata":{},"session_id":"t","entropy":0.0,"created_at":1004,"updated_at":1004,"offset":4}',
            ),
        ],
    ),
    "geoid": (
        "id version offset principal session_id agent_id purpose entropy created_at updated_at semantic_features symbolic_features metadata text vector stated",
        [
            ("a", 2, 7, "ann", "s", "ag", "p", 0.0, 1007, 1007, 1, 1, '{"p":[1]}', "statement a", VECTOR, 1),
            ("b", 1, 2, "ann", "s", "ag", "p", 0.0, 1002, 1002, 1, 1, '{"p":[1]}', "statement b", VECTOR, 2),
            ("c", 1, 3, "bob", "t", None, None, 0.0, 1003, 1003, 0, 0, "{}", "statement c", VECTOR, 3),
        ],
    ),
    "geoid_version": (
        "geoid_id offset version deleted principal purpose entropy recorded_at text",
        [
            ("a", 1, 1, False, "ann", "p", 0.0, 1001, "statement a"),
            ("a", 7, 2, False, "ann", "p", 0.0, 1007, "statement a"),
            ("b", 2, 1, False, "ann", "p", 0.0, 1002, "statement b"),
            ("c", 3, 1, False, "bob", None, 0.0, 1003, "statement c"),
            ("d", 4, 1, False, "bob", None, 0.0, 1004, "statement d"),
            ("d", 8, 2, True, "bob", None, 0.0, 1700000000000, None),
        ],
    ),
    "semantic_feature": (
        "geoid_id name position weight",
        [
            ("a", "x", 0, 0.5),
            ("b", "x", 0, 0.5),
        ],
    ),
    "symbolic_feature": (
        "geoid_id name position value",
        [
            ("a", "n", 0, "1"),
            ("b", "n", 0, "1"),
        ],
    ),
    "contradiction": (
        "id version offset state a b score relatedness semantic embedding_misalignment layer_conflict symbolic_opposition composite gradient_type pulse_strength decision model provisional detected_at why a_text b_text",
        [
            (
                "c1",
                1,
                5,
                "open",
                "a",
                "b",
                0.75,
                0.1,
                0.2,
                0.3,
                0.4,
                0.5,
                0.6,
                "symbolic",
                0.9,
                "collapse",
                "rules/1",
                True,
                2005,
                '["symbolic: status: \'up\' vs \'down\'","he said \\"no\\""]',
                "statement a",
                "statement b",
            ),
        ],
    ),
    "scar": (
        "id contradiction_id offset a b decision reason resolved_by vault pre_entropy post_entropy delta_entropy weight created_at",
        [
            ("s1", "c1", 6, "x", "y", "surge", "because", "ann", "a", 1.5, 1.0, -0.5, 0.25, 3006),
        ],
    ),
    "watch": (
        "id principal name contradicts related min_score created_at text filter vector",
        [
            ("w", "p", "n", True, True, 0.5, 1, "t", '{"agent":"ag"}', VECTOR),
        ],
    ),
    "cursor": (
        "principal name channel epoch offset updated_at",
        [
            ("ann", "reader", "geoids", "an-older-epoch-1", 5, 1700000000003),
        ],
    ),
    "idempotency_key": (
        "principal key created_at result checksum",
        [
            ("ann", "k", 1700000000000, b'{"ok":1}', 3478789320),
        ],
    ),
    "audit_entry": (
        "id ts principal action target",
        [
            (1, 1, "ann", "publish", "a"),
        ],
    ),
    "session": (
        "id principal statements created_at updated_at",
        [
            ("s", "ann", 3, 1700000000000, 1700000000000),
            ("t", "bob", 2, 1700000000000, 1700000000000),
        ],
    ),
    "usage": (
        "principal day statements text_bytes tokens bytes",
        [
            ("ann", 19675, 3, 33, 14, 330),
            ("bob", 19675, 2, 22, 14, 22),
        ],
    ),
    "checkpoint": (
        "id node created_at",
        [
            ("stop-1", "n1", 1700000000000),
        ],
    ),
    "checkpoint_request": (
        "checkpoint_id position principal session_id idempotency_key priority attempts merge must_exist accepted_at body not_before",
        [
            ("stop-1", 0, "ann", "s", "k3", 3, 2, True, True, 1700000000001, b'{"id":"a","text":"t"}', 1700000000002),
        ],
    ),
    "dead_letter": (
        "id principal session_id idempotency_key priority merge must_exist attempts accepted_at failed_at error_code error_message body",
        [
            (1, "ann", "s", "k2", 2, True, True, 4, 7, 5, "internal", "no", b'{"text":"x"}'),
        ],
    ),
    "cluster": (
        "id slices watch_generation created_at",
        [
            (1, 2, 3, 1700000000004),
        ],
    ),
    "node": (
        "id name role started_at seen_at reachable",
        [
            ("node-1", "one", "engine", 1700000000005, 1700000000006, True),
        ],
    ),
    "slice": (
        "number owner generation lease_until scored unread heir",
        [
            (0, "node-1", 4, 5, 8, 7, "node-2"),
            (1, None, 1, 0, 8, None, None),
        ],
    ),
    "lease": (
        "duty owner generation lease_until",
        [
            ("announce", "node-1", 2, 6),
        ],
    ),
    "revocation": (
        "id kind subject revoked_at expires_at",
        [
            (1, "principal", "eve", 1700000000007, 1700000000008),
        ],
    ),
}

Row = dict[str, Any]

ROWS: dict[str, list[Row]] = {
    table: [dict(zip(columns.split(), values, strict=True)) for values in rows]
    for table, (columns, rows) in _ROWS.items()
}
ROWS["log_channel"] = [
    {"channel": channel, "offset": entry["offset"]}
    for entry in ROWS["log_entry"]
    for channel in entry["channels"].split(" ")
]


def later_than(revision: str) -> set[str]:
    """Tables and columns that are not there yet at ``revision``."""
    return {name for since, names in NEW.items() if since > revision for name in names}


def rows_at(revision: str) -> dict[str, list[Row]]:
    """The rows as a database of ``revision`` has them."""
    later = later_than(revision)
    return {
        table: [{name: value for name, value in row.items() if f"{table}.{name}" not in later} for row in rows]
        for table, rows in ROWS.items()
        if table not in later
    }


def rows_after(revision: str) -> dict[str, list[Row]]:
    """The rows once a database of ``revision`` has been upgraded: what came since says nothing of what was there before."""
    later = later_than(revision)
    made: dict[str, list[Row]] = {table: [] if table in later else rows for table, rows in ROWS.items()}
    made = {
        table: [
            {name: DEFAULTS[f"{table}.{name}"] if f"{table}.{name}" in later else value for name, value in row.items()}
            for row in rows
        ]
        for table, rows in made.items()
    }
    if "session" in later:
        made["session"] = [dict(zip(ROWS["session"][0], values, strict=True)) for values in SESSIONS]
    return made


async def insert(url: str, tables: dict[str, list[Row]]) -> None:
    """Put rows into a database in which there is only the beginning of a log."""
    engine = create_async_engine(async_url(url))
    try:
        async with engine.begin() as connection:
            await connection.execute(text("DELETE FROM log_state"))
            for table, rows in tables.items():
                for row in rows:
                    given = {name: value for name, value in row.items() if name != "id" or table not in NUMBERED}
                    columns, values = ", ".join(f'"{name}"' for name in given), ", ".join(f":{name}" for name in given)
                    await connection.execute(text(f'INSERT INTO "{table}" ({columns}) VALUES ({values})'), given)
    finally:
        await engine.dispose()


async def contents(url: str) -> dict[str, list[Row]]:
    """Every table with its rows."""
    engine = create_async_engine(async_url(url))
    names = (
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        if engine.dialect.name == "sqlite"
        else "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
    )
    try:
        async with engine.connect() as connection:
            tables = set((await connection.execute(text(names))).scalars()) - {"alembic_version"}
            return {
                table: [dict(row) for row in (await connection.execute(text(f'SELECT * FROM "{table}"'))).mappings()]
                for table in tables
            }
    finally:
        await engine.dispose()


def in_order(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """To be compared: a table has no order, and booleans are numbers to SQLite."""
    return {
        table: sorted(
            ({name: int(value) if isinstance(value, bool) else value for name, value in row.items()} for row in rows),
            key=lambda row: [str(row[name]) for name in sorted(row)],
        )
        for table, rows in tables.items()
    }
