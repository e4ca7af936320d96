"""The durable store: one totally ordered log and the entities it speaks of, in one database.

```
commit(WriteBatch) -> writing   -> log_entry, log_channel, geoid, ... in one transaction
read(channel, ...) -> entries   -> checksummed pages of the log
geoid, list_...    -> reading   -> rows -> public objects
watches, cursors.. -> records
```
"""
