"""The one way to a database: one writer, pooled readers, one code path for SQLite and PostgreSQL.

```
caller --read(fn)--> Connections(readers) --> fn(Transaction)   one snapshot
caller --write(fn)-> Connections(writer)  --> fn(Transaction)   one transaction, durable on return
```

``fn`` is an ordinary function over a ``Transaction``. On SQLite it runs in the thread of its connection, so a whole
transaction costs one hop between threads however many statements it has; on PostgreSQL it runs in a greenlet on the loop.
Nothing else in the package opens a connection.
"""

from kimera_stream.infrastructure.database.commits import CommitCollector, CommitWatch
from kimera_stream.infrastructure.database.database import Database, Steps
from kimera_stream.infrastructure.database.engines import ABANDONED_AFTER, async_url
from kimera_stream.infrastructure.database.failures import CommitInDoubtError
from kimera_stream.infrastructure.database.statements import Insert, Query, QueryIn
from kimera_stream.infrastructure.database.transaction import Transaction

__all__ = [
    "ABANDONED_AFTER",
    "CommitCollector",
    "CommitInDoubtError",
    "CommitWatch",
    "Database",
    "Insert",
    "Query",
    "QueryIn",
    "Steps",
    "Transaction",
    "async_url",
]
