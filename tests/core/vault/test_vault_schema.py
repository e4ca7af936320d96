"""What the tables are made of: columns that can be asked about, and a closed list of those that cannot."""

from typing import Any

import msgspec
import pytest
from sqlalchemy import JSON, LargeBinary, PickleType, Table

from kimera_stream.core.vault import schema
from tests.core.vault.rows import ROWS

MESSAGES = {"log_entry.data", "idempotency_key.result", "checkpoint_request.body", "dead_letter.body"}
"""A message kept whole: the event, the reply to be given again, the request to be carried out."""
NUMBERS = {"geoid.vector", "watch.vector"}
"""Little-endian float32."""
FREE = {"geoid.metadata", "watch.filter", "contradiction.why"}
"""JSON in text: the user's own payload, and a list of sentences."""


def opaque(tables: list[Table], rows: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Columns of bytes, and those in which a row has a JSON object or list."""
    found = {
        f"{column.table.name}.{column.name}"
        for table in tables
        for column in table.columns
        if isinstance(column.type, (LargeBinary, JSON, PickleType))
    }
    for table, those in rows.items():
        for row in those:
            found |= {f"{table}.{name}" for name, value in row.items() if is_container(value)}
    return found


def is_container(value: Any) -> bool:
    try:
        return isinstance(value, (str, bytes)) and isinstance(msgspec.json.decode(value), (dict, list))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def test_no_other_column_hides_a_whole_object() -> None:
    assert opaque(schema.metadata.sorted_tables, ROWS) == MESSAGES | NUMBERS | FREE


@pytest.mark.parametrize("value", ['{"state": 1}', b"[1]"])
def test_one_more_would_be_noticed(value: str | bytes) -> None:
    rows = {"session": [{"id": "s", "extra": value}]}
    assert opaque([], rows) == {"session.extra"}
    assert opaque([schema.geoid], {}) == {"geoid.vector"}
