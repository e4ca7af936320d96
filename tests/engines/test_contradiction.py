"""The cascade, with the real index and the hashing encoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from kimera_stream.core.embedding import HashingProvider
from kimera_stream.core.geoid import built
from kimera_stream.core.index import FlatIndex
from kimera_stream.core.interfaces import Judgement, StoredGeoid
from kimera_stream.engines import contradiction
from kimera_stream.engines.contradiction import CascadeEngine, fair_share
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.engines.pairs import Stages
from kimera_stream.engines.scores import EXACT
from kimera_stream.engines.verifier import Verifier
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.objects import GeoidBody, StageReport

pytestmark = pytest.mark.anyio
T = TypeVar("T")
DIMENSION = 256
encoder = HashingProvider(DIMENSION)


class SameThread:
    """``Threads`` that runs at once."""

    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return fn(*args)


class Shelf:
    """``GeoidLoader`` over a dictionary."""

    def __init__(self) -> None:
        self.geoids: dict[str, StoredGeoid] = {}

    async def get_many(self, ids: Sequence[str]) -> Mapping[str, StoredGeoid]:
        return {each: self.geoids[each] for each in ids if each in self.geoids}


class Oracle:
    """A verifier that gives every pair one probability, and remembers what it was asked."""

    name = "oracle-1"

    def __init__(self, probability: float | None) -> None:
        self.probability = probability
        self.asked: list[tuple[str, str]] = []

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        if self.probability is None:
            raise UnavailableError("verifier: out of order")
        self.asked += pairs
        return np.full(len(pairs), self.probability, dtype=np.float32)


def geoid(geoid_id: str, text: str | None = None, *, now: int = 1, **state: Any) -> StoredGeoid:
    body = GeoidBody(text=text, symbolic_state=state)
    vector = None if text is None else encoder.encode_now([text])[0]
    return StoredGeoid(
        built(body, geoid_id=geoid_id, session_id=None, now=now, offset=1, previous=None), vector, "tester"
    )


class World:
    def __init__(
        self,
        verifier: Verifier | None = None,
        stages: Stages | None = None,
        head: PairHead | None = None,
        **scoring: Any,
    ) -> None:
        settings = ScoringSettings(**{"min_relatedness": 0.3, **scoring})
        self.shelf = Shelf()
        self.registry = CollectorRegistry()
        self.index = FlatIndex(DIMENSION, threads=SameThread(), performance=PerformanceSettings(), scoring=settings)
        self.engine = CascadeEngine(
            self.index, self.shelf, verifier, settings, SameThread(), self.registry, head=head, stages=stages
        )

    def put(self, *stored: StoredGeoid) -> None:
        for each in stored:
            self.shelf.geoids[each.geoid.id] = each
            self.index.put(each)

    async def hits(self, *fresh: StoredGeoid) -> list[list[str]]:
        return [[older.geoid.id for older, _ in found] for found in await self.engine.detect(fresh)]


async def test_a_stored_statement_that_cannot_also_hold_is_found_and_explained() -> None:
    world = World()
    world.put(geoid("a", "The door is open."), geoid("b", "Paris is the capital of France."))
    [[(older, judgement)]] = await world.engine.detect([geoid("c", "The door is closed.")])
    assert older.geoid.id == "a"
    assert judgement.model == "rules-1"
    assert judgement.gradient_type == "semantic"
    assert judgement.result.why == ["opposites: 'open' vs 'closed'"]


@pytest.mark.parametrize(
    ("older", "newer", "reasons"),
    [
        (
            "The audit of the plant is led by Anna.",
            "The audit of the plant is led by Ben.",
            ["name: 'Anna' vs 'Ben'"],
        ),
        ("Anna hired Ben.", "Ben hired Anna.", ["roles: 'Anna ... Ben' vs 'Ben ... Anna'"]),
        (
            "The corner bakery is open.",
            "By noon the blinds of the bakery were drawn, and its staff had gone home.",
            [
                "differs: only in the older: 'corner', 'open'",
                "differs: only in the newer: 'noon the blinds', 'drawn', 'staff had gone home'",
                "meaning: read side by side, the two cannot both hold",
            ],
        ),
    ],
)
async def test_the_reasons_name_who_and_what_stand_against_each_other(
    older: str, newer: str, reasons: list[str]
) -> None:
    world = World(Oracle(0.97), min_relatedness=0.05)
    [judgement] = await world.engine.judge_pairs([(geoid("a", older), geoid("b", newer))])
    assert judgement.result.why == reasons


async def test_pairs_inside_a_batch_are_found_once_older_first() -> None:
    assert await World().hits(geoid("a", "db-1 is up"), geoid("b", "db-1 is down")) == [[], ["a"]]


async def test_symbolic_pairs_inside_a_batch_need_neither_text_nor_vector() -> None:
    fresh = [geoid("a", subject="db-1", status="up"), geoid("b", "A text."), geoid("c", subject="db-1", status="down")]
    assert await World().hits(*fresh) == [[], [], ["a"]]


async def test_an_earlier_update_in_the_batch_replaces_the_stored_version() -> None:
    world = World()
    world.put(geoid("a", "db-1 is up"))
    assert await world.hits(geoid("a", "db-1 is down"), geoid("b", "db-1 is down")) == [[], []]


async def test_a_later_update_in_the_batch_does_not_hide_the_stored_version() -> None:
    world = World()
    world.put(geoid("a", "db-1 is up"))
    assert await world.hits(geoid("b", "db-1 is down"), geoid("a", "db-1 is down")) == [["a"], []]


async def test_unrelated_statements_are_never_reported_whatever_the_verifier_says() -> None:
    world = World(Oracle(1.0))
    world.put(geoid("a", "Paris is the capital of France."))
    assert await world.hits(geoid("b", "Pump seven is not running.")) == [[]]
    [judged] = await world.engine.judge_pairs(
        [(geoid("a", "Paris is the capital of France."), geoid("b", "Pump seven is not running."))]
    )
    assert judged.score < 0.35


async def test_the_verifier_decides_about_texts() -> None:
    sure, unsure = World(Oracle(0.97)), World(Oracle(0.02))
    for world in (sure, unsure):
        world.put(geoid("a", "The red pump runs on water."))
    fresh = geoid("b", "The red pump runs on diesel.")
    [[(_, judgement)]] = await sure.engine.detect([fresh])
    assert judgement.score == pytest.approx(0.97, abs=1e-4)
    assert judgement.model == "oracle-1"
    assert judgement.result.why
    assert await unsure.hits(fresh) == [[]]


async def test_no_more_pairs_are_read_than_the_setting_allows() -> None:
    oracle = Oracle(0.0)
    world = World(oracle, verify_candidates=2)
    world.put(*(geoid(f"g{i}", f"The red pump in hall {i} is running.") for i in range(8)))
    await world.hits(geoid("new", "The red pump in hall 3 is stopped."))
    assert len(oracle.asked) == 2
    assert ("The red pump in hall 3 is running.", "The red pump in hall 3 is stopped.") in oracle.asked


async def test_the_rules_read_the_candidates_that_share_most_words() -> None:
    world = World(oracle := Oracle(0.0), read_candidates=2)
    crowd = [geoid(f"g{i}", f"The red pump in hall {i} is running.") for i in range(8)]
    world.put(*crowd)
    new = geoid("new", "The red pump in hall 3 is stopped.")
    await world.hits(new)
    assert len(oracle.asked) == 2
    assert oracle.asked[0] == ("The red pump in hall 3 is running.", "The red pump in hall 3 is stopped.")
    oracle.asked.clear()
    await World(oracle, read_candidates=2).hits(*crowd, new)
    asked = [older for older, newer in oracle.asked if newer == "The red pump in hall 3 is stopped."]
    assert asked[0] == "The red pump in hall 3 is running."
    assert len(asked) == 2, "those of one batch are counted like stored ones"
    oracle.asked.clear()
    unfiltered = World(oracle, Stages(prefilter=False), read_candidates=2)
    unfiltered.put(*crowd)
    await unfiltered.hits(new)
    assert len(oracle.asked) == 8


async def test_the_rules_read_what_names_the_same_numbered_thing() -> None:
    world = World(oracle := Oracle(0.0), read_candidates=2)
    world.put(*(geoid(f"g{i}", f"The valve V{i}-300 in hall two is closed for repair since Monday.") for i in range(8)))
    world.put(geoid("same", "The valve V9-300 in hall two is open."))
    new = "The valve V9-300 in hall two is closed for repair since Monday."
    await world.hits(geoid("new", new))
    assert ("The valve V9-300 in hall two is open.", new) in oracle.asked


async def test_names_count_among_statements_of_one_batch_too() -> None:
    world = World(oracle := Oracle(0.0), read_candidates=2)
    others = [geoid(f"g{i}", f"The valve V{i}-300 in hall two is closed for repair since Monday.") for i in range(8)]
    same, new = (
        "The valve V9-300 in hall two is open.",
        "The valve V9-300 in hall two is closed for repair since Monday.",
    )
    await world.hits(*others, geoid("same", same), geoid("new", new))
    assert (same, new) in oracle.asked


async def test_a_clash_of_symbols_is_found_however_few_candidates_are_read() -> None:
    world = World(read_candidates=1)
    world.put(geoid("near", "The red pump in hall 3 is running."))
    world.put(*(geoid(f"far-{i}", f"Water level {i}", subject="pump", state="on") for i in range(3)))
    new = geoid("new", "The red pump in hall 3 is stopped.", subject="pump", state="off")
    assert sorted((await world.hits(new))[0]) == ["far-0", "far-1", "far-2", "near"]


async def test_without_the_prefilter_every_readable_candidate_is_read() -> None:
    oracle = Oracle(0.0)
    world = World(oracle, Stages(prefilter=False), verify_candidates=1)
    world.put(*(geoid(f"g{i}", f"The red pump in hall {i} is running.") for i in range(5)))
    await world.hits(geoid("new", "The red pump in hall 3 is stopped."))
    assert len(oracle.asked) == 5


async def test_of_a_large_batch_fewer_candidates_are_read_each() -> None:
    world = World(oracle := Oracle(0.1), verify_candidates=5, verify_pairs=12)
    world.put(*(geoid(f"g{i}", f"The red pump in hall {i} is running.") for i in range(6)))
    await world.hits(geoid("alone", "The red pump in hall 3 is stopped."))
    assert len(oracle.asked) == 5
    oracle.asked.clear()
    await world.hits(*(geoid(f"n{i}", f"The red pump in hall {i} is stopped.") for i in range(4)))
    assert len(oracle.asked) == 4 * 4


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 16), st.integers(1, 300))
def test_the_share_is_as_large_as_the_total_allows(sizes: list[int], most: int, total: int) -> None:
    share = fair_share(sizes, least=4, most=most, total=total)
    read = sum(min(size, share) for size in sizes)
    assert share <= most
    assert share == min(4, most) or read <= total
    assert share == most or sum(min(size, share + 1) for size in sizes) > total


async def asked_and_found(**scoring: Any) -> tuple[int, list[str]]:
    """How many pairs the verifier, which is sure of nothing, was asked about; and what was found."""
    verifier = Oracle(0.01)
    settings = ScoringSettings(**{"min_relatedness": 0.1, "verify_candidates": 1, **scoring})
    shelf, index = (
        Shelf(),
        FlatIndex(DIMENSION, threads=SameThread(), performance=PerformanceSettings(), scoring=settings),
    )
    for each in (geoid("a", "The door is open."), geoid("b", "The red door is open."), geoid("c", "Is the door open?")):
        shelf.geoids[each.geoid.id] = each
        index.put(each)
    engine = CascadeEngine(index, shelf, verifier, settings, SameThread(), CollectorRegistry())
    [hits] = await engine.detect([geoid("new", "The door is closed.")])
    return len(verifier.asked), sorted(older.geoid.id for older, _ in hits)


async def test_stages_are_switched_by_setting() -> None:
    assert await asked_and_found() == (1, [])
    assert await asked_and_found(stages=["verify", "scope"]) == (3, [])
    assert await asked_and_found(stages=["prefilter", "scope"]) == (0, ["a", "b"])
    assert await asked_and_found(stages=["prefilter"], threshold=0.3) == (0, ["a", "b", "c"])
    assert await asked_and_found(stages=["scope"], threshold=0.3) == (0, ["a", "b"])


@pytest.mark.parametrize(
    ("off", "batches"),
    [
        ("", {"scan": 1, "prefilter": 1, "rules": 1, "verify": 1, "scope": 1}),
        ("prefilter", {"scan": 1, "prefilter": None, "rules": 1, "verify": 1, "scope": 1}),
        ("verify", {"scan": 1, "prefilter": 1, "rules": 1, "verify": None, "scope": 1}),
        ("scope", {"scan": 1, "prefilter": 1, "rules": 1, "verify": 1, "scope": 1}),
    ],
)
async def test_the_metrics_tell_how_long_each_stage_took_for_a_batch(
    off: str, batches: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(Oracle(0.9), stages=Stages(**dict.fromkeys(off.split(), False)))
    world.put(geoid("a", "The door is open."))
    clock = iter(range(10_000))
    monkeypatch.setattr(contradiction.time, "perf_counter", lambda: float(next(clock)))  # a second at each look
    await world.hits(geoid("b", "The door is closed."), geoid("c", "The door is shut."))

    def sample(what: str, stage: str) -> float | None:
        return world.registry.get_sample_value(f"kimera_cascade_seconds_{what}", {"stage": stage})

    assert {stage: sample("count", stage) for stage in batches} == batches
    assert all((sample("sum", stage) or 0) > 0 for stage, count in batches.items() if count)
    if off != "prefilter":
        assert sample("sum", "prefilter") == 2, "both of its halves"


def by_stage(judgement: Judgement) -> dict[str, StageReport]:
    stages = {report.stage: report for report in judgement.result.stages}
    assert list(stages) == ["scan", "rules", "prefilter", "verify", "scope", "threshold"]
    for report in stages.values():
        assert (report.ms is not None and report.ms >= 0) if report.ran else report.ms is None, report.stage
    return stages


async def test_a_pair_is_explained_stage_by_stage() -> None:
    world = World(Oracle(0.9))
    pair = geoid("a", "The door is open."), geoid("b", "The door is closed.")
    judgement = await world.engine.explain(*pair)
    [plain] = await world.engine.judge_pairs([pair])
    assert (judgement.score, judgement.result.why) == (plain.score, plain.result.why)
    assert plain.result.stages == []
    stages = by_stage(judgement)
    assert all(report.ran for report in stages.values())
    assert stages["scan"].value == pytest.approx(plain.result.components.relatedness, abs=1e-3)
    assert (stages["scan"].passed, stages["prefilter"].passed, stages["threshold"].passed) == (True, True, True)
    assert (stages["verify"].value, stages["verify"].note, stages["scope"].value) == (0.9, "oracle-1", 0.9)
    assert stages["threshold"].value == world.engine.threshold


async def test_what_did_not_run_says_why() -> None:
    pair = geoid("a", "Is the door open?"), geoid("b", "The door is closed.")
    without = by_stage(await World().engine.explain(*pair))
    assert not without["verify"].ran
    assert "the rules decide" in without["verify"].note
    assert without["scope"].note == "a question asserts nothing"
    assert without["threshold"].passed is False
    off = by_stage(
        await World(Oracle(0.9), stages=Stages(prefilter=False, verify=False, scope=False)).engine.explain(*pair)
    )
    assert [stage for stage, report in off.items() if not report.ran] == ["prefilter", "verify", "scope"]
    assert {off[each].note.split(":")[0] for each in ("prefilter", "verify", "scope")} == {
        "switched off by scoring.stages"
    }
    away = by_stage(await World(Oracle(None)).engine.explain(*pair))
    assert away["verify"].note.startswith("unavailable")
    unrelated = by_stage(await World().engine.explain(geoid("a", "Paris is in France."), geoid("b", "It rains.")))
    assert unrelated["scan"].passed is False
    assert unrelated["scan"].note == "not related: the cosine is below 0.3"
    states = geoid("a", subject="x", up=1), geoid("b", subject="x", up=2)
    symbolic = by_stage(await World(Oracle(0.9)).engine.explain(*states))
    assert (symbolic["scan"].note, symbolic["rules"].ran) == ("symbolic states differ", False)
    assert symbolic["verify"].note == "there are not two texts to read"
    assert symbolic["threshold"].passed is True
    apart = by_stage(await World().engine.explain(geoid("a", subject="x", up=1), geoid("b", subject="y", up=2)))
    assert apart["scan"].note.startswith("not compared")


async def test_days_are_looked_for_once_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(older: str, older_at: int, newer: str, newer_at: int) -> str:
        calls.append(newer)
        return ""

    monkeypatch.setattr("kimera_stream.engines.pairs.other_day", counted)
    world = World(Oracle(0.9))
    world.put(geoid("a", "The door is open."))
    assert await world.hits(geoid("b", "The door is closed.")) == [["a"]]
    assert calls == ["The door is closed."]


def said(geoid_id: str, text: str, session: str | None, who: str = "tester") -> StoredGeoid:
    stored = geoid(geoid_id, text)
    return StoredGeoid(msgspec.structs.replace(stored.geoid, session_id=session), stored.vector, who)


async def test_statements_are_compared_within_their_group_in_a_batch_too() -> None:
    world = World(compare_within="session", candidates=2, verify_candidates=2)
    world.put(
        *[said(f"other-{n}", "The door is open.", "s2") for n in range(9)], said("mine", "The door is open.", "s1")
    )
    fresh = [
        said("b", "The door is closed.", "s1"),
        said("c", "The door is open.", "s1"),
        said("d", "The door is open.", None),
    ]
    assert await world.hits(*fresh) == [["mine"], ["b"], []]
    assert not world.engine.comparable(fresh[0], fresh[2])
    [everywhere] = await world.engine.detect([said("q", "The door is closed.", None)], everywhere=True)
    assert len(everywhere) == 2
    by_principal = World(compare_within="principal")
    by_principal.put(said("a", "The door is open.", None, "ann"), said("b", "The door is open.", None, "bob"))
    assert await by_principal.hits(said("c", "The door is closed.", None, "bob")) == [["b"]]


class Choking(Oracle):
    """Meets a defect in every batch with a certain text in it."""

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        if any("poison" in each for pair in pairs for each in pair):
            raise ZeroDivisionError("a defect")
        return await super().judge(pairs)


async def test_a_pair_over_which_the_verifier_meets_a_defect_is_left_to_the_rules_alone() -> None:
    verifier = Choking(0.9)
    world = World(verifier, min_relatedness=0.1)
    texts = ["The door is open.", "The poison door is open.", "The door is wide.", "The door is red."]
    world.put(*[geoid(f"g{n}", text) for n, text in enumerate(texts)])
    detection = await world.engine.look([geoid("new", "The door is closed.")])
    assert detection.unread == [False]
    found = {older.geoid.id: judgement for older, judgement in detection.hits[0]}
    assert found["g1"].model == "rules-1"
    assert not found["g1"].provisional
    assert {found[each].model for each in ("g0", "g2", "g3")} == {"oracle-1"}
    assert world.registry.get_sample_value("kimera_cascade_faults_total", {"stage": "verify"}) == 1


@pytest.mark.parametrize("count", [2, 9])
async def test_a_pair_over_which_the_rules_meet_a_defect_is_left_out_alone(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    judge = contradiction.packaged_rules().judge

    def choking(triples: Sequence[tuple[str, str, float]]) -> Any:
        if any("poison" in older for older, _, _ in triples):
            raise ZeroDivisionError("a defect")
        return judge(triples)

    monkeypatch.setattr(world.engine._rules, "judge", choking)
    world.put(*[geoid(f"g{n}", "The poison door is open." if n == 1 else "The door is open.") for n in range(count)])
    [hits] = await world.hits(geoid("new", "The door is closed."))
    assert sorted(hits) == sorted(f"g{n}" for n in range(count) if n != 1)
    assert world.registry.get_sample_value("kimera_cascade_faults_total", {"stage": "rules"}) == 1


async def test_a_verifier_that_reads_nothing_any_more_is_a_defect_for_the_supervisor() -> None:
    world = World(Choking(0.9), min_relatedness=0.0, verify_candidates=16)
    for batch in range(2):
        world.put(*[geoid(f"g{batch}-{n}", f"The poison door {batch} {n} is open.") for n in range(16)])
    await world.engine.look([geoid("one", "The poison door 0 is closed.")])
    with pytest.raises(ZeroDivisionError):
        await world.engine.look([geoid("two", "The poison door 1 is closed.")])


async def test_an_unavailable_verifier_leaves_it_to_the_rules_provisionally() -> None:
    world = World(Oracle(None))
    world.put(geoid("a", "The door is open."))
    [[(_, judgement)]] = await world.engine.detect([geoid("b", "The door is closed.")])
    assert judgement.provisional
    assert judgement.model == "rules-1"
    assert world.registry.get_sample_value("kimera_cascade_fallbacks_total") == 1


async def test_equal_subjects_make_a_symbolic_conflict_exact_without_any_text() -> None:
    world = World()
    world.put(geoid("a", subject="db-1", status="up"))
    [[(_, judgement)]] = await world.engine.detect([geoid("b", subject="db-1", status="down")])
    assert judgement.score == EXACT
    assert judgement.gradient_type == "symbolic"
    assert judgement.result.why == ["symbolic: status: 'up' vs 'down'"]
    assert judgement.result.components.symbolic_opposition == 1.0


async def test_different_subjects_rule_a_pair_out_texts_and_all() -> None:
    world = World()
    world.put(geoid("a", "The database is up.", subject="db-1", status="up"))
    assert await world.hits(geoid("b", "The database is down.", subject="db-2", status="down")) == [[]]


async def test_without_subjects_statements_with_conflicting_states_must_be_related() -> None:
    world = World()
    world.put(
        geoid("a", "Boiler two in the old hall", status="up"), geoid("b", "Quarterly tax return filed", status="up")
    )
    assert await world.hits(geoid("c", "Boiler two in the old hall, evening round", status="down")) == [["a"]]


async def test_a_question_contradicts_nothing() -> None:
    world = World(Oracle(0.99))
    world.put(geoid("a", "The door of the lab is open."))
    assert await world.hits(geoid("b", "Is the door of the lab closed?")) == [[]]


@pytest.mark.parametrize(("apart", "scope", "found"), [(0, True, ["a"]), (2, True, []), (2, False, ["a"])])
async def test_yesterday_said_on_two_days_is_not_one_day(apart: int, scope: bool, found: list[str]) -> None:
    day = 86_400_000
    older = geoid("a", "The gate was shut yesterday.", now=100 * day)
    newer = geoid("b", "The gate was open yesterday.", now=(100 + apart) * day)
    world = World(verifier=Oracle(0.99), stages=Stages(scope=scope))
    world.put(older)
    assert await world.hits(newer) == [found]
    [judgement] = await world.engine.judge_pairs([(older, newer)])
    assert ("scope: 'yesterday' was said on different days" in judgement.result.why) == (found == [])


@pytest.mark.parametrize(
    ("older", "newer", "reason"),
    [
        (
            "On 3 March the valve was open.",
            "On 5 March the valve was closed.",
            "'3 March' and '5 March' are different times",
        ),
        ("Valve W7-77 is open.", "Valve W7-78 is closed.", "w7-77 and w7-78 are different things"),
        ("The office in Recife is open.", "The office in Natal is closed.", "one speaks of Recife, the other of Natal"),
        ("The launch is on 3 March.", "The launch is on 5 March.", ""),
        ("The office is in Recife.", "The office is in Natal.", ""),
    ],
)
async def test_what_both_name_apart_is_no_contradiction_however_sure_the_verifier_is(
    older: str, newer: str, reason: str
) -> None:
    world = World(Oracle(0.99))
    world.put(geoid("a", older))
    fresh = geoid("b", newer)
    assert await world.hits(fresh) == [[] if reason else ["a"]]
    judgement = await world.engine.explain(world.shelf.geoids["a"], fresh)
    assert judgement.score == pytest.approx(0.2 if reason else 0.99, abs=1e-4)
    assert by_stage(judgement)["scope"].note == reason
    assert [why for why in judgement.result.why if why.startswith("scope")] == ([f"scope: {reason}"] if reason else [])
    without = World(Oracle(0.99), stages=Stages(scope=False))
    without.put(geoid("a", older))
    assert await without.hits(fresh) == [["a"]]


@pytest.mark.parametrize(("point", "reported"), [("precise", False), ("balanced", True), ("sensitive", True)])
async def test_the_operating_point_decides_what_is_reported(point: str, reported: bool) -> None:
    world = World(Oracle(0.75), operating_point=point)
    world.put(geoid("a", "The door is open."))
    assert (await world.hits(geoid("b", "The door is closed."))) == [["a"] if reported else []]


async def test_a_threshold_overrides_the_operating_point() -> None:
    assert World(threshold=0.123, operating_point="precise").engine.threshold == 0.123


class Calibrated(Oracle):
    """A verifier that brings its own operating points, once it is loaded."""

    operating_points: Mapping[str, float] = {}


async def test_a_verifier_that_knows_its_operating_points_sets_them() -> None:
    verifier = Calibrated(0.5)
    world = World(verifier)
    before = world.engine.threshold
    verifier.operating_points = {"balanced": 0.31}
    assert world.engine.threshold == 0.31 != before


async def test_rules_that_stand_in_for_a_verifier_must_be_as_sure_as_without_it() -> None:
    class Lenient(Oracle):
        operating_points: Mapping[str, float] = {"balanced": 0.01}

    world = World(Lenient(None))
    world.put(geoid("a", "The red pump in hall 3 is running."))
    fresh = geoid("b", "The red pump in hall 4 was painted on a cold day.")
    [judged] = await world.engine.judge_pairs([(world.shelf.geoids["a"], fresh)])
    assert judged.score > world.engine.threshold
    assert await world.hits(fresh) == [[]]


async def test_components_are_shares_and_the_composite_is_the_original_mean() -> None:
    a, b = (
        geoid("a", "The door is open.", status="open", floor=1),
        geoid("b", "The door is closed.", status="shut", room=2),
    )
    [judged] = await World().engine.judge_pairs([(a, b)])
    parts = judged.result.components
    values = [getattr(parts, name) for name in parts.__struct_fields__]
    assert all(0 <= value <= 1 for value in values)
    assert parts.layer_conflict == pytest.approx(2 / 3, abs=1e-4)
    assert parts.composite == pytest.approx((parts.embedding_misalignment + 2 / 3 + 1.0) / 3, abs=1e-3)


async def test_nothing_to_judge_is_nothing() -> None:
    world = World()
    assert await world.engine.detect([]) == []
    assert await world.engine.judge_pairs([]) == []


async def test_a_correction_is_reported_and_the_reasons_say_that_it_replaces() -> None:
    world = World(Oracle(0.97))
    world.put(geoid("a", "The red pump runs on water."))
    [[(_, judgement)]] = await world.engine.detect([geoid("b", "Correction: the red pump runs on diesel.")])
    assert judgement.score == pytest.approx(0.97, abs=1e-4)
    assert any(reason.startswith("supersession: ") for reason in judgement.result.why)
    [[(_, plain)]] = await world.engine.detect([geoid("c", "The red pump runs on diesel.")])
    assert not any(reason.startswith("supersession: ") for reason in plain.result.why)
