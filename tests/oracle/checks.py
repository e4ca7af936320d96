"""The promises, checked on the records of ``model``. Each check returns what is wrong, in words; an empty list is the promise kept."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tests.oracle.model import MAIN_CHANNELS, Entry, Heard, Ledger, Log, Op, Segment, digest

MOST = 20
"""Sentences about one promise at most."""


def check_all(ledger: Ledger, log: Log, heard: Sequence[Heard], *, era: int, at_once: bool) -> list[str]:
    """Everything about one log.

    Args:
        era: Which of the ledger's eras the log is of.
        at_once: Contradictions are committed together with the statement that causes them.
    """
    wrong: list[str] = []
    for check in (
        check_order(log),
        check_versions(log),
        check_contradictions(log),
        check_closed(log),
        check_concerned(log),
        check_acked(ledger, log, era=era, at_once=at_once),
        check_session_order(ledger, era=era),
        *(check_heard(each, log) for each in heard),
    ):
        wrong += check[:MOST]
        if len(check) > MOST:
            wrong.append(f"... and {len(check) - MOST} more of that kind")
    return wrong


def check_order(log: Log) -> list[str]:
    """One total order: offsets from 1 to the head, each once; times that do not go back; every channel in order."""
    wrong: list[str] = []
    for name, entries in log.channels.items():
        wrong += [
            f"{name}: offset {later.offset} comes after {earlier.offset}"
            for earlier, later in pairwise(entries)
            if later.offset <= earlier.offset
        ]
        wrong += [
            f"{name}: entry {entry.offset} is told otherwise than on another channel"
            for entry in entries
            if (owner := log.entries.get(entry.offset)) is None or entry.digest != owner.digest
        ]
    expected = 1
    for offset in log.entries:
        if offset != expected:
            wrong.append(f"the log has no entry {expected}, the next is {offset}")
        expected = offset + 1
    if expected != log.head + 1:
        wrong.append(f"the log ends at {expected - 1}, its head is said to be {log.head}")
    wrong += [
        f"entry {later.offset} is {earlier.ts - later.ts} ms older than the one before it"
        for earlier, later in pairwise(log.entries.values())
        if later.ts < earlier.ts
    ]
    return wrong


def check_versions(log: Log) -> list[str]:
    """Every geoid is created, then updated by one version at a time, then perhaps deleted; the list has the living ones."""
    wrong: list[str] = []
    living: dict[str, tuple[int, int]] = {}
    for entry in log.channels["geoids"]:
        geoid = entry.data
        before = living.get(geoid["id"], (0, 0))[0]
        if geoid["offset"] != entry.offset:
            wrong.append(f"entry {entry.offset} carries a geoid of offset {geoid['offset']}")
        if entry.type == "geoid.deleted":
            if not before:
                wrong.append(f"entry {entry.offset} deletes {geoid['id']}, which is not there")
            living.pop(geoid["id"], None)
            continue
        if geoid["version"] != before + 1 or (entry.type == "geoid.created") != (before == 0):
            wrong.append(f"entry {entry.offset}: {entry.type} to version {geoid['version']} after version {before}")
        living[geoid["id"]] = (geoid["version"], digest(geoid))
    for geoid_id in sorted(living.keys() | log.listed.keys()):
        if geoid_id not in log.listed:
            wrong.append(f"{geoid_id} is in the log and not in the list of geoids")
        elif geoid_id not in living:
            wrong.append(f"{geoid_id} is in the list of geoids, its last entry says deleted, or there is none")
        elif living[geoid_id][1] != log.listed[geoid_id]:
            wrong.append(f"{geoid_id} differs between the list of geoids and its last entry")
    return wrong


def check_contradictions(log: Log) -> list[str]:
    """At most one open contradiction of a pair, between living geoids; the list of open ones is what the log comes to."""
    wrong: list[str] = []
    living: set[str] = set()
    pairs: dict[frozenset[str], str] = {}
    state: dict[str, Entry] = {}
    for entry in log.entries.values():
        data = entry.data
        if entry.type.startswith("geoid."):
            (living.discard if entry.type == "geoid.deleted" else living.add)(data["id"])
        elif entry.type == "contradiction.found":
            pair = frozenset((data["a"], data["b"]))
            known = pairs.get(pair)
            if known is not None and known != data["id"]:
                wrong.append(f"entry {entry.offset}: {sorted(pair)} have a second open contradiction")
            if not pair <= living:
                wrong.append(f"entry {entry.offset}: a contradiction of {sorted(pair - living)}, which is not there")
            pairs[pair] = data["id"]
            state[data["id"]] = entry
        elif entry.type in ("contradiction.dissolved", "contradiction.resolved"):
            pair = frozenset((data["a"], data["b"]))
            if pairs.pop(pair, None) != data["id"]:
                wrong.append(f"entry {entry.offset}: {entry.type} of {data['id']}, which is not open")
            state.pop(data["id"], None)
    told = {id_: digest(entry.data) for id_, entry in state.items()}
    for id_ in sorted(told.keys() | log.open.keys()):
        if id_ not in log.open:
            wrong.append(f"contradiction {id_} is open in the log and not in the list")
        elif id_ not in told:
            wrong.append(f"contradiction {id_} is open in the list and not in the log")
        elif told[id_] != log.open[id_]:
            wrong.append(f"contradiction {id_} differs between list and log")
    return wrong


def check_closed(log: Log) -> list[str]:
    """The lists of closed contradictions and of scars are what the log comes to."""
    closed: dict[str, int] = {}
    for entry in log.channels["contradictions"]:
        data = entry.data
        if entry.type == "contradiction.found":
            closed.pop(data["id"], None)
        else:
            closed[data["id"]] = digest(data)
    scars = {entry.data["id"]: entry for entry in log.channels["scars"] if entry.type == "scar.formed"}
    formed = {id_: digest(entry.data) for id_, entry in scars.items()}
    return [
        f"{what} {id_} is in the {'list' if id_ in listed else 'log'} alone, or differs from the {'log' if id_ in listed else 'list'}"
        for what, told, listed in (("closed contradiction", closed, log.closed), ("scar", formed, log.scars))
        for id_ in sorted(told.keys() | listed.keys())
        if told.get(id_) != listed.get(id_)
    ]


def check_concerned(log: Log) -> list[str]:
    """The channel of a geoid, and that of a session whose geoids are nobody else's, have all that concerns them and nothing else."""
    wrong: list[str] = []
    for name, entries in log.channels.items():
        kind, _, of = name.partition(":")
        if kind == "geoid":
            ids = {of}
        elif kind == "session":
            ids = {data["id"] for entry in log.channels["geoids"] if (data := entry.data).get("session_id") == of}
        else:
            continue
        expected = [entry.offset for entry in log.entries.values() if not ids.isdisjoint(_concerned(entry))]
        got = [entry.offset for entry in entries]
        if got != expected:
            wrong.append(f"{name}: {_difference(got, expected, 0)}")
    return wrong


def _concerned(entry: Entry) -> set[str]:
    """Geoids that an entry is about."""
    data = entry.data
    match entry.type.partition(".")[0]:
        case "geoid":
            return {data["id"]}
        case "contradiction":
            return {data["a"], data["b"]}
        case "scar":
            return set(data["geoids"])
    return set()


def check_acked(ledger: Ledger, log: Log, *, era: int, at_once: bool) -> list[str]:
    """What was acknowledged is there exactly once and as it was acknowledged; what was refused is not; nothing is twice."""
    wrong, ledger.broken = ledger.broken, []
    marks: dict[str, list[Entry]] = defaultdict(list)
    for entry in log.channels["geoids"]:
        if entry.type != "geoid.deleted":
            marks[entry.data["metadata"]["mark"]].append(entry)
    known = {op.mark: op for op in ledger.ops if op.kind == "publish"}
    for mark, entries in marks.items():
        op = known.get(mark)
        if op is None:
            wrong.append(f"entries {[each.offset for each in entries]}: nobody has published {mark}")
        elif len(entries) > 1:
            wrong.append(f"{mark} ({op.outcome}) is in the log {len(entries)} times: {[e.offset for e in entries]}")
        elif op.outcome == "refused":
            wrong.append(f"{mark} was refused ({op.codes}) and is in the log at {entries[0].offset}")
        elif op.outcome == "acked" and op.era != era:
            wrong.append(f"{mark} came after the backup that was restored and is in the log at {entries[0].offset}")
    for op in ledger.ops:
        if op.era != era or op.outcome != "acked":
            continue
        if op.kind == "publish":
            wrong += _check_published(op, log, marks.get(op.mark, []), at_once=at_once)
        elif op.kind == "delete":
            entry = log.at("geoids", op.offset)
            if entry is None or entry.type != "geoid.deleted" or entry.data["id"] != op.target:
                wrong.append(f"{op.mark}: the delete of {op.target} was acknowledged at {op.offset} and is not there")
        else:
            entry = log.at("scars", op.offset)
            if entry is None or entry.type != "scar.formed" or digest(entry.data) != op.said:
                wrong.append(f"{op.mark}: resolving {op.target} was acknowledged at {op.offset}, its scar is not there")
    return wrong


def _check_published(op: Op, log: Log, entries: list[Entry], *, at_once: bool) -> list[str]:
    if not entries:
        return [f"{op.mark} was acknowledged at {op.offset} and is not in the log"]
    (entry, *_) = entries
    wrong: list[str] = []
    if entry.offset != op.offset:
        wrong.append(f"{op.mark} was acknowledged at {op.offset} and is at {entry.offset}")
    geoid = entry.data
    if digest(geoid) != op.said or geoid["version"] != op.version:
        wrong.append(f"{op.mark}: entry {entry.offset} is not the geoid that was acknowledged")
    wrong += [
        f"{op.mark}: entry {entry.offset} has another {name} than was published"
        for name in ("id", "text", "symbolic_state")
        if op.body.get(name) is not None and geoid.get(name) != op.body[name]
    ]
    for offset, said in op.found.items():
        there = log.at("contradictions", offset)
        if there is None or digest(there.data) != said:
            wrong.append(f"{op.mark}: its answer had a contradiction at {offset} that is not there")
    if at_once:
        upto = entry.offset
        while (follower := log.entries.get(upto + 1)) is not None and not follower.type.startswith(("geoid.", "scar.")):
            upto += 1
        caused = {
            each.offset
            for each in log.select("contradictions", entry.offset, upto)
            if each.type == "contradiction.found" and each.data["b"] == geoid["id"]
        }
        if caused != set(op.found):
            wrong.append(
                f"{op.mark}: the log has its contradictions at {sorted(caused)}, its answer had {sorted(op.found)}"
            )
    return wrong


def check_session_order(ledger: Ledger, *, era: int) -> list[str]:
    """What one session sent on one connection, each thing once, is in the log in that order."""
    sent: dict[tuple[int, str], list[tuple[int, Op]]] = defaultdict(list)
    for op in ledger.ops:
        if op.era == era and op.outcome == "acked" and len(op.sent) == 1:
            connection, number = op.sent[0]
            sent[connection, op.session].append((number, op))
    wrong: list[str] = []
    for ops in sent.values():
        ops.sort(key=lambda each: each[0])
        wrong += [
            f"session {later.session}: {later.mark} was sent after {earlier.mark} and is before it ({later.offset} < {earlier.offset})"
            for (_, earlier), (_, later) in pairwise(ops)
            if later.offset <= earlier.offset
        ]
    return wrong


def check_heard(heard: Heard, log: Log) -> list[str]:
    """Every subscription heard the log from where it began: all of it, in order, once, unchanged; a resumption began
    where it was asked to."""
    wrong = list(heard.broken)
    heard.broken = []
    previous: Segment | None = None
    for number, segment in enumerate(heard.segments):
        if segment.epoch == log.epoch:
            where = f"{heard.name} on {heard.channel}, subscription {number}"
            wrong += _check_start(segment, previous, heard, where, log.keep)
            wrong += _check_segment(segment, heard, log, where)
        previous = segment
    of_this = [segment for segment in heard.segments if segment.epoch == log.epoch]
    until = heard.until.get(log.epoch)
    if until is not None and of_this:
        last = of_this[-1]
        missing = [entry.offset for entry in _selected(heard, log, last.last, until)]
        if missing:
            wrong.append(
                f"{heard.name} on {heard.channel} has not heard {len(missing)} events to the end: {missing[:5]} ..."
            )
    return wrong


def _check_start(
    segment: Segment, previous: Segment | None, heard: Heard, where: str, keep: int | None
) -> Iterable[str]:
    if segment.allowed is not None:
        if keep is not None and not segment.recovered:
            if segment.start - min(segment.allowed) <= keep:
                yield f"{where}: the last {keep} are kept, and yet the cursor was not recovered at {segment.start}"
        elif segment.start not in segment.allowed:
            yield f"{where}: the cursor stood at one of {sorted(segment.allowed)[:5]}, it began after {segment.start}"
        return
    if segment.asked is None:
        return
    epoch, offset = segment.asked
    if not segment.was_recovering:
        yield f"{where}: asked for a position and was told that nothing was asked for"
    if epoch != segment.epoch:
        if segment.recovered:
            yield f"{where}: told to have recovered from a position in another log"
        return
    if not segment.recovered:
        if keep is None:
            yield f"{where}: everything is kept, and yet the position {offset} was not recovered"
        elif segment.start - offset <= keep:
            yield f"{where}: the last {keep} are kept, and yet {offset} was not recovered at {segment.start}"
    elif segment.start != offset:
        yield f"{where}: asked to go on after {offset}, began after {segment.start}"
    elif previous is not None and not heard.skips and previous.epoch == epoch and previous.last != offset:
        yield f"{where}: the harness asked for {offset} after {previous.last}"


def _selected(heard: Heard, log: Log, after: int, upto: int) -> list[Entry]:
    entries = log.select(heard.channel, after, upto)
    return entries if heard.wanted is None else [entry for entry in entries if heard.wanted(entry)]


def _check_segment(segment: Segment, heard: Heard, log: Log, where: str) -> list[str]:
    expected = _selected(heard, log, segment.start, max([segment.beaten, *segment.offsets]))
    got = segment.offsets.tolist()
    if got != [entry.offset for entry in expected]:
        return [f"{where}: {_difference(got, [entry.offset for entry in expected], segment.start)}"]
    return [
        f"{where}: event {entry.offset} is not what the log has there"
        for entry, heard_digest in zip(expected, segment.digests, strict=True)
        if entry.digest != heard_digest
    ]


def _difference(got: list[int], expected: list[int], start: int) -> str:
    """In what two sequences of offsets differ first."""
    if sorted(got) == expected:
        early, right = next((one, other) for one, other in zip(got, expected, strict=True) if one != other)
        return f"a reordering: {early} came before {right}"
    seen: set[int] = set()
    place = {offset: number for number, offset in enumerate(expected)}
    before = start
    for number, offset in enumerate(got):
        if offset in seen:
            return f"a repeat: {offset} came again"
        seen.add(offset)
        if offset not in place:
            return f"{offset} came, which is not in its selection of the log after {start}"
        if offset < before:
            return f"a reordering: {offset} came after {before}"
        if number >= len(expected) or offset != expected[number]:
            return f"a gap: {expected[number : place[offset]][:5]} did not come between {before} and {offset}"
        before = offset
    return f"a gap: {expected[len(got) :][:5]} did not come"


def check_prefix(log: Log, original: Log) -> list[str]:
    """A restored log is a beginning of the one it was copied from, under another name."""
    wrong: list[str] = []
    if log.epoch == original.epoch:
        wrong.append("the restored log has the epoch of the one that it was copied from")
    for offset in range(1, log.head + 1):
        ours, theirs = log.entries.get(offset), original.entries.get(offset)
        if ours is None or theirs is None or ours.digest != theirs.digest:
            wrong.append(f"entry {offset} of the restored log is not the original's")
    return wrong[:MOST]


__all__ = [
    "MAIN_CHANNELS", "check_acked", "check_all", "check_closed", "check_concerned", "check_contradictions", "check_heard",
    "check_order", "check_prefix", "check_session_order", "check_versions",
]  # fmt: skip
