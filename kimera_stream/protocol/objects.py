"""The public objects (section 5 of the contract), as they travel and as they are stored.

All are immutable. Optional fields that are ``None`` are left out of the encoding; all other fields are always present.
"""

from typing import Any, Literal

import msgspec

Scalar = str | int | float | bool | None
Decision = Literal["collapse", "surge", "buffer"]
ContradictionState = Literal["open", "resolved", "dissolved"]
GradientType = Literal["semantic", "symbolic", "composite"]
WatchKind = Literal["contradicts", "related"]

RESERVED_SYMBOLS = frozenset({"subject", "as_of", "valid_from", "valid_to"})
"""Keys of a symbolic state that say whom and when it is about; never compared as facts."""


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything up to and including ``offset`` of the log ``epoch`` has been seen. Offset 0 is before the beginning."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.offset}"


class GeoidBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a client may say of a geoid. At least one of text, vector, semantic_state, symbolic_state."""

    text: str | None = None
    vector: list[float] | None = None
    semantic_state: dict[str, float] | None = None
    symbolic_state: dict[str, Scalar] | None = None
    metadata: dict[str, Any] | None = None
    id: str | None = None
    session_id: str | None = None
    originator_agent_id: str | None = None
    purpose: str | None = None


class Geoid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One unit of knowledge. ``entropy`` is the Shannon entropy of the semantic state in bits; times are unix ms."""

    id: str
    version: int
    text: str | None = None
    semantic_state: dict[str, float]
    symbolic_state: dict[str, Scalar]
    metadata: dict[str, Any]
    session_id: str | None = None
    originator_agent_id: str | None = None
    purpose: str | None = None
    entropy: float
    created_at: int
    updated_at: int
    offset: int
    vector: list[float] | None = None
    """Only on request; never in events."""


StageName = Literal["scan", "rules", "prefilter", "verify", "scope", "threshold"]
"""The stages of the cascade, in their order."""


class Components(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a contradiction's score, each in [0, 1]."""

    relatedness: float
    semantic: float
    embedding_misalignment: float
    layer_conflict: float
    symbolic_opposition: float
    composite: float
    """The original KIMERA tension. Kept for continuity; on its own it ranks unrelated pairs highest."""


class Contradiction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A scored pair of geoids that cannot both hold; ``a`` is the older one.

    ``version`` grows when an update of either geoid, or a later and better judgement, scores the same pair again.
    """

    id: str
    a: str
    b: str
    a_text: str | None = None
    b_text: str | None = None
    score: float
    components: Components
    why: list[str]
    gradient_type: GradientType
    pulse_strength: float
    decision: Decision
    state: ContradictionState
    model: str
    detected_at: int
    offset: int
    version: int = msgspec.field(default_factory=lambda: 1)
    provisional: bool = False
    """Decided without the verifier, which may still change it."""


class Scar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The permanent record of a resolved contradiction. Entropies in bits."""

    id: str
    contradiction_id: str
    geoids: tuple[str, str]
    decision: Decision
    reason: str | None
    resolved_by: str
    vault: Literal["a", "b"]
    pre_entropy: float
    post_entropy: float
    delta_entropy: float
    weight: float
    created_at: int
    offset: int


class ScoredGeoid(msgspec.Struct, frozen=True, kw_only=True):
    """A search hit."""

    geoid: Geoid
    score: float


class StageReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one stage of the cascade said of a pair.

    ``ran``: it is switched on and had something to look at. ``passed``: a published pair would go on to the next stage (of the last
    one: would be reported). ``value``: its number: the cosine, a probability, the threshold. ``ms``: how long it took.
    """

    stage: StageName
    ran: bool
    passed: bool | None = None
    value: float | None = None
    ms: float | None = None
    note: str = ""


class ScoreResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How two statements stand to each other; nothing is stored. ``stages``: in their order, if they were asked for."""

    score: float
    components: Components
    why: list[str]
    stages: list[StageReport] = []


class WatchMatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Data of ``watch.matched``."""

    watch: str
    kind: WatchKind
    score: float
    geoid: Geoid
    contradiction: Contradiction | None = None


class Watch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A standing semantic query. ``id`` names its channel ``watch:<id>``; ``watch`` is unique per principal."""

    id: str
    watch: str
    principal: str
    text: str | None = None
    kinds: list[WatchKind]
    min_score: float | None = None
    filter: dict[str, Any] | None = None
    created_at: int


class VaultRebalance(msgspec.Struct, frozen=True, kw_only=True):
    """Data of ``vault.rebalanced``: scars moved between the two vaults to even out their weight."""

    moved: list[str]
    source: Literal["a", "b"]
    target: Literal["a", "b"]
    weight_a: float
    weight_b: float


class FieldState(msgspec.Struct, frozen=True, kw_only=True):
    """Data of ``field.updated``: the thermodynamics of the whole field, as of the event's offset.

    ``entropy`` bits, ``temperature`` >= 0, ``activation`` and ``stability`` in [0, 1].
    """

    geoids: int
    open_contradictions: int
    entropy: float
    temperature: float
    activation: float
    stability: float
    clusters: list[dict[str, Any]]
    updated_at: int
