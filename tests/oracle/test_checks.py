"""The oracle can fail: a true story passes every check, and each way of doctoring it is caught by the check that is for it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.oracle.checks import check_all, check_heard, check_prefix
from tests.oracle.chronicle import check_kept
from tests.oracle.damage import flip_bit, tear_page
from tests.oracle.model import Entry, Heard, Ledger, Log, Op, Segment, digest, entry_of, told
from tests.oracle.plan import plan, weights_of
from tests.oracle.reference import compare


def geoid(mark: str, offset: int, version: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "id": mark.partition("/")[0],
        "version": version,
        "symbolic_state": {"subject": "s", "n": offset},
        "session_id": "y" if mark == "two" else "x",
        "metadata": {"mark": mark},
        "offset": offset,
        **fields,
    }


def clash(id: str, a: str, b: str, offset: int, state: str = "open") -> dict[str, Any]:
    return {"id": id, "a": a, "b": b, "score": 0.99, "gradient_type": "symbolic", "state": state, "offset": offset}


def event(channel: str, offset: int, type: str, data: dict[str, Any], ts: int | None = None) -> dict[str, Any]:
    ts = 1_000 + offset if ts is None else ts
    return {"channel": channel, "epoch": "e", "offset": offset, "type": type, "ts": ts, "data": data}


EVENTS = [
    event("geoids", 1, "geoid.created", geoid("one", 1)),
    event("geoids", 2, "geoid.created", geoid("two", 2)),
    event("contradictions", 3, "contradiction.found", clash("c1", "one", "two", 3), 1_002),
    event("geoids", 4, "geoid.created", geoid("three", 4)),
    event("contradictions", 5, "contradiction.found", clash("c2", "one", "three", 5), 1_004),
    event("contradictions", 6, "contradiction.found", clash("c3", "two", "three", 6), 1_004),
    event("geoids", 7, "geoid.updated", geoid("one/2", 7, 2)),
    event("contradictions", 8, "contradiction.dissolved", clash("c1", "one", "two", 8, "dissolved"), 1_007),
    event("contradictions", 9, "contradiction.resolved", clash("c3", "two", "three", 9, "resolved")),
    event(
        "scars",
        10,
        "scar.formed",
        {"id": "s1", "contradiction_id": "c3", "geoids": ["two", "three"], "decision": "surge", "offset": 10},
        1_009,
    ),
    event("geoids", 11, "geoid.deleted", geoid("three", 11)),
    event("contradictions", 12, "contradiction.dissolved", clash("c2", "one", "three", 12, "dissolved"), 1_011),
]


@dataclass
class Story:
    """Everything that the checks look at."""

    ledger: Ledger
    log: Log
    heard: list[Heard]

    def wrong(self) -> list[str]:
        self.log.__dict__.pop("entries", None)  # computed once, before it was doctored
        self.log.__dict__.pop("_offsets", None)
        return check_all(self.ledger, self.log, self.heard, era=0, at_once=True)

    def op(self, mark: str) -> Op:
        return next(op for op in self.ledger.ops if op.mark == mark)

    def segment(self) -> Segment:
        return self.heard[0].segments[0]


def log_of(events: list[dict[str, Any]], epoch: str = "e") -> Log:
    log = Log(epoch, max(each["offset"] for each in events))
    for channel in ("geoids", "contradictions", "scars"):
        log.channels[channel] = [entry_of(each) for each in events if each["channel"] == channel]
    log.channels["geoid:two"] = [entry_of(each) for each in events if "two" in _named(each["data"])]
    log.channels["session:x"] = [entry_of(each) for each in events if {"one", "three"} & _named(each["data"])]
    living: dict[str, int] = {}
    for entry in log.channels["geoids"]:
        living[entry.data["id"]] = digest(entry.data)
        if entry.type == "geoid.deleted":
            del living[entry.data["id"]]
    log.listed = living
    last = {entry.data["id"]: entry.data for entry in log.channels["contradictions"]}
    log.open = {id_: digest(each) for id_, each in last.items() if each["state"] == "open"}
    log.closed = {id_: digest(each) for id_, each in last.items() if each["state"] != "open"}
    log.scars = {entry.data["id"]: digest(entry.data) for entry in log.channels["scars"]}
    return log


def _named(data: dict[str, Any]) -> set[str]:
    """Geoids that an entry names."""
    return {data["id"], data.get("a", ""), data.get("b", ""), *data.get("geoids", ())}


def acked(mark: str, number: int, *found: int, key: str | None = "k") -> Op:
    """A publish that was answered with what the log has."""
    events = {each["offset"]: each for each in EVENTS}
    there = next(
        each["data"]
        for each in EVENTS
        if each["data"].get("metadata") == {"mark": mark} and "deleted" not in each["type"]
    )
    op = Op(mark, "publish", "session", there["id"], {"id": there["id"]}, key, [(1, number)], "acked")
    op.offset, op.version, op.said, op.geoid_id = there["offset"], there["version"], digest(there), there["id"]
    op.found = {offset: digest(events[offset]["data"]) for offset in found}
    return op


def story() -> Story:
    """What really happened: three statements, an update, a resolution, a delete, all answered and heard."""
    ledger = Ledger()
    for op in (acked("one", 1), acked("two", 2, 3), acked("three", 3, 5, 6), acked("one/2", 4)):
        ledger.add(op)
    ledger.add(Op("four", "publish", "session", key=None, outcome="unknown"))
    ledger.add(Op("five", "publish", "session", key=None, outcome="refused", codes=["overloaded"]))
    ledger.add(Op("d", "delete", "", "three", outcome="acked", offset=11, sent=[(1, 6)]))
    scar = next(each["data"] for each in EVENTS if each["type"] == "scar.formed")
    ledger.add(Op("r", "resolve", "", "c3", outcome="acked", offset=10, said=digest(scar), sent=[(1, 5)]))
    log = log_of(EVENTS)
    heard = Heard("listener", "contradictions")
    first, second = Segment("e", 0, ("e", 0), True, True), Segment("e", 6, ("e", 6), True, True)
    for each in EVENTS:
        if each["channel"] == "contradictions":
            (first if each["offset"] <= 6 else second).hear(each)
    heard.segments = [first, second]
    heard.until["e"] = log.head
    return Story(ledger, log, [heard])


def test_a_true_story_passes() -> None:
    assert story().wrong() == []


# -- each is a way in which a server could fail -------------------------------------------------------------------------------


def a_gap(told: Story) -> None:
    segment = told.segment()
    del segment.offsets[1], segment.digests[1]


def a_gap_at_the_end_of_a_subscription(told: Story) -> None:
    segment = told.segment()
    segment.offsets.pop()
    segment.digests.pop()


def a_gap_at_the_end_of_all(told: Story) -> None:
    segment = told.heard[0].segments[1]
    segment.offsets.pop()
    segment.digests.pop()


def a_repeat(told: Story) -> None:
    segment = told.segment()
    segment.offsets.append(segment.offsets[-1])
    segment.digests.append(segment.digests[-1])


def a_repeat_after_a_resume(told: Story) -> None:
    first, second = told.heard[0].segments
    second.offsets.insert(0, first.offsets[-1])
    second.digests.insert(0, first.digests[-1])


def a_reordering(told: Story) -> None:
    segment = told.segment()
    segment.offsets[0], segment.offsets[1] = segment.offsets[1], segment.offsets[0]
    segment.digests[0], segment.digests[1] = segment.digests[1], segment.digests[0]


def an_altered_event(told: Story) -> None:
    told.segment().digests[1] ^= 1


def an_event_of_nowhere(told: Story) -> None:
    told.segment().offsets[1] = 4


def a_recovery_that_began_elsewhere(told: Story) -> None:
    told.heard[0].segments[1].start = 7


def a_position_that_was_not_recovered(told: Story) -> None:
    told.heard[0].segments[1].recovered = False


def a_recovery_from_another_log(told: Story) -> None:
    told.heard[0].segments[0].asked = ("another", 0)


def a_cursor_that_slipped(told: Story) -> None:
    told.heard[0].segments[1].allowed = frozenset([3])


def a_lost_ack(told: Story) -> None:
    told.ledger.add(Op("six", "publish", "session", "six", {}, "k6", [(1, 9)], "acked", offset=13, version=1))


def an_ack_at_another_offset(told: Story) -> None:
    told.op("two").offset = 4


def an_ack_of_another_geoid(told: Story) -> None:
    told.op("two").said ^= 1


def an_ack_without_its_contradiction(told: Story) -> None:
    told.op("three").found.popitem()


def an_ack_with_a_contradiction_of_nowhere(told: Story) -> None:
    told.op("two").found[4] = 17


def a_statement_twice(told: Story) -> None:
    told.log.channels["geoids"].append(entry_of(event("geoids", 13, "geoid.updated", geoid("one/2", 13, 3))))
    told.log.head = 13


def an_unanswered_statement_twice(told: Story) -> None:
    for offset, version in ((13, 1), (14, 2)):
        body = geoid("four", offset, version)
        told.log.channels["geoids"].append(
            entry_of(event("geoids", offset, "geoid.created" if version == 1 else "geoid.updated", body))
        )
        told.log.listed["four"] = digest(body)
    told.log.head = 14


def a_refused_statement_that_is_there(told: Story) -> None:
    body = geoid("five", 13)
    told.log.channels["geoids"].append(entry_of(event("geoids", 13, "geoid.created", body)))
    told.log.listed["five"] = digest(body)
    told.log.head = 13


def a_statement_that_nobody_made(told: Story) -> None:
    body = geoid("seven", 13)
    told.log.channels["geoids"].append(entry_of(event("geoids", 13, "geoid.created", body)))
    told.log.listed["seven"] = digest(body)
    told.log.head = 13


def a_delete_that_did_not_happen(told: Story) -> None:
    told.op("d").offset = 7


def a_scar_that_is_not_there(told: Story) -> None:
    told.op("r").said ^= 1


def a_hole_in_the_log(told: Story) -> None:
    del told.log.channels["geoids"][0]


def a_log_out_of_order(told: Story) -> None:
    entries = told.log.channels["geoids"]
    entries[0], entries[1] = entries[1], entries[0]


def a_log_that_ends_early(told: Story) -> None:
    told.log.head += 1


def a_time_that_goes_back(told: Story) -> None:
    told.log.channels["geoids"][1].ts = 5


def an_entry_told_in_two_ways(told: Story) -> None:
    entry = told.log.channels["geoids"][1]
    told.log.channels["agent:x"] = [Entry(entry.offset, entry.type, entry.ts, entry.raw, 1)]


def a_version_left_out(told: Story) -> None:
    entry = told.log.channels["geoids"][3]
    assert entry.type == "geoid.updated"
    told.log.channels["geoids"][3] = entry_of(event("geoids", 7, "geoid.updated", geoid("one/2", 7, 3)))


def a_geoid_that_is_not_listed(told: Story) -> None:
    del told.log.listed["one"]


def a_deleted_geoid_that_is_listed(told: Story) -> None:
    told.log.listed["three"] = 3


def a_geoid_listed_otherwise(told: Story) -> None:
    told.log.listed["one"] ^= 1


def a_second_contradiction_of_a_pair(told: Story) -> None:
    told.log.channels["contradictions"].append(
        entry_of(event("contradictions", 13, "contradiction.found", clash("c9", "one", "two", 13)))
    )
    told.log.channels["contradictions"].append(
        entry_of(event("contradictions", 14, "contradiction.found", clash("c10", "one", "two", 14)))
    )
    told.log.open = {"c10": digest(clash("c10", "one", "two", 14))}
    told.log.head = 14


def an_open_contradiction_of_nowhere(told: Story) -> None:
    told.log.open["c1"] = 1


def a_session_out_of_order(told: Story) -> None:
    told.op("one").sent, told.op("two").sent = [(1, 2)], [(1, 1)]


def a_resolution_out_of_order(told: Story) -> None:
    told.op("d").sent, told.op("r").sent = [(1, 5)], [(1, 6)]


def a_gap_before_a_heartbeat(told: Story) -> None:
    told.heard[0].until.clear()
    a_gap_at_the_end_of_all(told)
    told.heard[0].segments[1].beaten = 12


def an_entry_that_a_geoid_is_not_told_of(told: Story) -> None:
    del told.log.channels["geoid:two"][1]


def an_entry_of_another_session(told: Story) -> None:
    told.log.channels["session:x"].insert(1, told.log.channels["geoids"][1])


def a_contradiction_that_is_closed_in_the_log_alone(told: Story) -> None:
    del told.log.closed["c1"]


def a_scar_listed_otherwise(told: Story) -> None:
    told.log.scars["s1"] ^= 1


DOCTORED: list[tuple[Callable[[Story], None], str]] = [
    (a_gap, "a gap: [5]"),
    (a_gap_at_the_end_of_a_subscription, "asked for 6 after 5"),
    (a_gap_at_the_end_of_all, "has not heard 1 events to the end: [12]"),
    (a_repeat, "a repeat: 6 came again"),
    (a_repeat_after_a_resume, "6 came, which is not in its selection"),
    (a_reordering, "a reordering: 5 came before 3"),
    (an_altered_event, "event 5 is not what the log has there"),
    (an_event_of_nowhere, "4 came, which is not in its selection"),
    (a_recovery_that_began_elsewhere, "asked to go on after 6, began after 7"),
    (a_position_that_was_not_recovered, "the position 6 was not recovered"),
    (a_recovery_from_another_log, "told to have recovered from a position in another log"),
    (a_cursor_that_slipped, "the cursor stood at one of [3], it began after 6"),
    (a_lost_ack, "six was acknowledged at 13 and is not in the log"),
    (an_ack_at_another_offset, "two was acknowledged at 4 and is at 2"),
    (an_ack_of_another_geoid, "entry 2 is not the geoid that was acknowledged"),
    (an_ack_without_its_contradiction, "its contradictions at [5, 6], its answer had [5]"),
    (an_ack_with_a_contradiction_of_nowhere, "its answer had a contradiction at 4 that is not there"),
    (a_statement_twice, "is in the log 2 times"),
    (an_unanswered_statement_twice, "four (unknown) is in the log 2 times"),
    (a_refused_statement_that_is_there, "five was refused"),
    (a_statement_that_nobody_made, "nobody has published seven"),
    (a_delete_that_did_not_happen, "the delete of three was acknowledged at 7 and is not there"),
    (a_scar_that_is_not_there, "its scar is not there"),
    (a_hole_in_the_log, "the log has no entry 1"),
    (a_log_out_of_order, "offset 1 comes after 2"),
    (a_log_that_ends_early, "its head is said to be 13"),
    (a_time_that_goes_back, "entry 2 is 996 ms older"),
    (an_entry_told_in_two_ways, "is told otherwise than on another channel"),
    (a_version_left_out, "geoid.updated to version 3 after version 1"),
    (a_geoid_that_is_not_listed, "one is in the log and not in the list"),
    (a_deleted_geoid_that_is_listed, "three is in the list of geoids, its last entry says deleted"),
    (a_geoid_listed_otherwise, "one differs between the list of geoids and its last entry"),
    (a_second_contradiction_of_a_pair, "have a second open contradiction"),
    (an_open_contradiction_of_nowhere, "contradiction c1 is open in the list and not in the log"),
    (a_session_out_of_order, "one was sent after two and is before it"),
    (a_resolution_out_of_order, "r was sent after d and is before it"),
    (a_gap_before_a_heartbeat, "a gap: [12] did not come"),
    (an_entry_that_a_geoid_is_not_told_of, "geoid:two: a gap: [3]"),
    (an_entry_of_another_session, "session:x: 2 came, which is not in its selection"),
    (a_contradiction_that_is_closed_in_the_log_alone, "closed contradiction c1 is in the log alone"),
    (a_scar_listed_otherwise, "scar s1 is in the list alone, or differs from the log"),
]


@pytest.mark.parametrize(("doctor", "finding"), DOCTORED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_way_of_doctoring_it_is_caught(doctor: Callable[[Story], None], finding: str) -> None:
    told = story()
    doctor(told)
    wrong = told.wrong()
    assert any(finding in each for each in wrong), wrong


# -- answers ------------------------------------------------------------------------------------------------------------------


def published(offset: int, *, duplicate: bool, mark: str = "x") -> dict[str, Any]:
    return {"geoid": geoid(mark, offset), "offset": offset, "contradictions": [], "duplicate": duplicate}


@pytest.mark.parametrize(
    ("sent", "key", "answers", "finding"),
    [
        (1, "k", [published(1, duplicate=True)], "as a duplicate though it was sent once"),
        (2, None, [published(1, duplicate=True)], "though it has no key"),
        (2, "k", [published(1, duplicate=False), published(1, duplicate=False)], "answered as new once more"),
        (2, "k", [published(1, duplicate=False), published(2, duplicate=True)], "with another result"),
        (1, "k", [published(1, duplicate=False, mark="y")], "published x, answered with y"),
    ],
)
def test_answers_are_compared_with_each_other(
    sent: int, key: str | None, answers: list[dict[str, Any]], finding: str
) -> None:
    ledger = Ledger()
    op = ledger.add(Op("x", "publish", "", "x", {}, key, [(1, each) for each in range(sent)]))
    for answer in answers:
        ledger.published(op, answer)
    assert any(finding in each for each in ledger.broken), ledger.broken


def test_a_repeated_answer_that_is_the_same_is_right() -> None:
    ledger = Ledger()
    op = ledger.add(Op("x", "publish", "", "x", {}, "k", [(1, 1), (1, 2)]))
    ledger.published(op, published(1, duplicate=False))
    ledger.published(op, published(1, duplicate=True))
    assert (ledger.broken, op.repeats) == ([], 1)


def test_of_copies_under_way_together_any_may_be_answered_first() -> None:
    ledger = Ledger()
    op = ledger.add(Op("x", "publish", "", target="x", key="k", sent=[(1, 1), (1, 2)]))
    ledger.published(op, published(1, duplicate=True))
    ledger.published(op, published(1, duplicate=False))
    assert ledger.broken == []


def test_a_valid_statement_must_not_be_refused_for_good() -> None:
    ledger = Ledger()
    ledger.refused(ledger.add(Op("x", "publish", "")), "bad_request")
    assert ledger.broken == ["x: a valid statement was refused with bad_request"]


# -- a restored log -----------------------------------------------------------------------------------------------------------


def test_a_restored_log_is_a_beginning_of_the_other_under_a_new_name() -> None:
    original = log_of(EVENTS)
    assert check_prefix(log_of(EVENTS[:6], "f"), original) == []
    assert check_prefix(log_of(EVENTS[:6]), original) == [
        "the restored log has the epoch of the one that it was copied from"
    ]
    other = [*EVENTS[:5], event("contradictions", 6, "contradiction.found", clash("c3", "two", "one", 6))]
    assert check_prefix(log_of(other, "f"), original) == ["entry 6 of the restored log is not the original's"]


def test_what_came_after_a_backup_must_not_come_back() -> None:
    told = story()
    told.ledger.restored(6)
    assert {op.mark for op in told.ledger.ops if op.era == 1} == {"one", "two", "three"}
    wrong = check_all(told.ledger, told.log, [], era=1, at_once=True)
    assert "one/2 came after the backup that was restored and is in the log at 7" in wrong


# -- the serial reference run ---------------------------------------------------------------------------------------------------


def test_a_contradiction_that_is_missing_or_too_many_or_other_is_a_difference() -> None:
    log = log_of(EVENTS)
    assert compare(log, log_of(EVENTS), at_once=True).differences == []
    without = [each for each in EVENTS if each["offset"] != 6]
    (missing,) = compare(log_of(without), log, at_once=True).differences[:1]
    assert "a serial run finds a contradiction" in missing
    (too_many,) = compare(log, log_of(without), at_once=True).differences[:1]
    assert "was found, a serial run finds none" in too_many
    other = copy.deepcopy(EVENTS)
    other[4]["data"]["score"] = 0.7
    (different,) = compare(log_of(other), log, at_once=True).differences[:1]
    assert "it was found with (0.7, 'symbolic')" in different


def test_what_one_commit_opens_and_closes_need_not_be_told() -> None:
    """Statement two is replaced in the commit that brings it: a serial run tells of its contradiction and of its end."""
    serial = [
        event("geoids", 1, "geoid.created", geoid("one", 1)),
        event("geoids", 2, "geoid.created", geoid("two", 2)),
        event("contradictions", 3, "contradiction.found", clash("c1", "one", "two", 3)),
        event("geoids", 4, "geoid.updated", geoid("one", 4, 2)),
        event("contradictions", 5, "contradiction.dissolved", clash("c1", "one", "two", 5, "dissolved")),
    ]
    at_once = [
        event("geoids", 1, "geoid.created", geoid("one", 1)),
        event("geoids", 2, "geoid.created", geoid("two", 2), 1_100),
        event("geoids", 3, "geoid.updated", geoid("one", 3, 2), 1_100),
    ]
    assert compare(log_of(at_once), log_of(serial), at_once=True).differences == []
    at_once[2]["ts"] = 1_200
    assert compare(log_of(at_once), log_of(serial), at_once=True).differences != []


def test_a_reference_that_cannot_follow_is_a_difference() -> None:
    log = log_of(EVENTS)
    shorter = log_of([each for each in EVENTS if each["type"] != "geoid.deleted" and each["offset"] != 12])
    assert "from entry 11 on the reference run could not follow" in compare(log, shorter, at_once=True).differences


# -- the rest -----------------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_plan_and_every_kind_is_in_it() -> None:
    weights = weights_of("sqlite", shimmed=True, damage=True)
    steps = [next(each) for each in [plan(7, weights, pause=0.1)] for _ in range(60)]
    assert steps == [next(each) for each in [plan(7, weights, pause=0.1)] for _ in range(60)]
    assert {step.kind for step in steps[: len(weights)]} == set(weights)
    assert steps != [next(each) for each in [plan(8, weights, pause=0.1)] for _ in range(60)]
    assert {step.kind for step in steps} <= set(weights)


def test_told_is_the_same_in_both_encodings_and_other_for_another_event() -> None:
    import msgspec

    one = event("geoids", 1, "geoid.created", geoid("one", 1, semantic_state={"a": 1.0, "b": 0.25}))
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(one))
    plain = msgspec.json.decode(msgspec.json.encode(dict(reversed(one.items()))))
    assert told(packed) == told(plain) == entry_of(one).digest
    assert told({**one, "offset": 2}) != told(one)


def test_damage_changes_what_it_says(tmp_path: Any) -> None:
    from random import Random

    file = tmp_path / "file"
    content = b"x" * 8192 + b'{"mark":"abcdefgh"}' + b"y" * 8173
    for hurt in (flip_bit, tear_page):
        file.write_bytes(content)
        hurt(file, Random(1))
        changed = file.read_bytes()
        assert len(changed) == len(content)
        assert changed != content


@pytest.mark.parametrize(("keep", "wrong"), [(3, ""), (12, "yet 2 was not recovered"), (None, "everything is kept")])
def test_only_what_is_trimmed_may_be_told_to_be(keep: int | None, wrong: str) -> None:
    log = log_of(EVENTS)
    log.keep = keep
    heard = Heard("late", "geoids", segments=[Segment("e", 11, ("e", 2), recovered=False, was_recovering=True)])
    found = check_heard(heard, log)
    assert len(found) == bool(wrong)
    assert wrong in "".join(found)
    assert heard.told_of_trimming == 1


def test_a_silent_gap_over_what_is_trimmed_is_noticed() -> None:
    log = log_of(EVENTS)
    log.keep = 3
    segment = Segment("e", 2, ("e", 2), recovered=True, was_recovering=True)
    segment.hear(EVENTS[10])  # 4 and 7 were trimmed
    (wrong,) = check_heard(Heard("late", "geoids", segments=[segment]), log)
    assert "a gap: [4, 7]" in wrong


def test_what_is_kept_is_the_end_of_what_was_told() -> None:
    told = log_of(EVENTS).channels["geoids"]
    assert check_kept("geoids", told[-2:], told, head=12, keep=6) == []
    assert check_kept("geoids", told[-1:], told, head=12, keep=6) != []
    assert check_kept("geoids", told[:2], told, head=12, keep=5) != []
