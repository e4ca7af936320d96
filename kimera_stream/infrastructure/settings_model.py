"""The settings as types: groups, fields, limits, defaults.

Each field's description is its entry in ``docs/settings.md`` (generated; a test compares them).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Stage = Literal["prefilter", "verify", "scope"]
Environment = Literal["development", "staging", "production"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(ge=1024)]


class Group(BaseModel):
    """Base of the groups: unknown names are refused, values are read-only, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatabaseSettings(Group):
    url: SecretStr = Field(
        SecretStr(""),
        description="SQLAlchemy URL: sqlite+aiosqlite:///FILE or postgresql+asyncpg://... Empty: SQLite in the data directory.",
    )
    pool_size: Positive = Field(4, description="Pooled reading connections.")
    page_cache_bytes: Bytes = Field(
        16_777_216, description="Bytes of pages that each connection to SQLite keeps in memory."
    )
    busy_timeout: Seconds = Field(
        5.0, description="Seconds to wait for a locked database before refusing with `unavailable`."
    )
    commit_within: Seconds = Field(
        3.0,
        description="Seconds that a commit may take (a slow fsync, say). While one takes longer, new writes are refused with "
        "`unavailable`; what was accepted waits for it, and reads and streams go on.",
    )
    synchronous: Literal["FULL", "EXTRA"] = Field(
        "FULL", description="SQLite synchronous level; both keep every acked write through a power loss."
    )
    max_cursors: Positive = Field(1_000, description="Durable cursors that one principal may keep.")
    group_commit_max: Positive = Field(512, description="Statements committed in one transaction at most.")
    retention_age: float = Field(0.0, ge=0, description="Drop log entries older than this many seconds; 0 keeps all.")
    retention_count: int = Field(0, ge=0, description="Keep at most this many log entries; 0 keeps all.")
    retention_bytes: int = Field(0, ge=0, description="Keep at most this many bytes of log payload; 0 keeps all.")
    retention_sessions: float = Field(
        2_592_000.0,
        ge=0,
        description="Drop the records of sessions that have been quiet for this many seconds; 0 keeps all. Their geoids stay.",
    )
    retention_audit_count: int = Field(
        100_000, ge=0, description="Keep at most this many entries of the audit trail (who did what); 0 keeps all."
    )
    retention_audit_age: float = Field(
        0.0, ge=0, description="Drop entries of the audit trail older than this many seconds; 0 keeps all."
    )


class BusSettings(Group):
    url: SecretStr = Field(
        SecretStr(""),
        description="Redis that joins several nodes: redis://HOST:PORT/DB, rediss://... or unix://PATH. Needs PostgreSQL as the "
        "database. Empty: one node, in-process.",
    )
    prefix: str = Field(
        "kimera:",
        max_length=64,
        description="Begins every key in Redis; nodes with the same database share it, others must not.",
    )
    slices: int = Field(
        16,
        ge=1,
        le=1024,
        description="Slices into which geoids and work are divided among the engines; recorded in the database at the first start.",
    )
    lease: Seconds = Field(
        5.0, description="Seconds after which the slices and duties of a silent engine go to others."
    )
    poll: Seconds = Field(0.5, description="Seconds between looks at the log in the database, whatever the bus says.")
    answer_within: Seconds = Field(
        15.0,
        description="Seconds without any progress of the engines after which an edge answers a publish with `unavailable`.",
    )
    retry_after: Seconds = Field(
        2.0, description="Seconds after which an edge adds unanswered work again that the bus may have lost."
    )
    timeout: Seconds = Field(2.0, description="Seconds without an answer after which Redis counts as away.")
    work_items: Positive = Field(
        1_024,
        description="Statements waiting in one slice's stream at most, and of one principal no more than are still free; beyond, they are refused with `overloaded`.",
    )
    work_batch: Positive = Field(128, description="Statements an engine takes from the bus at once at most.")
    claim_after: Seconds = Field(
        5.0, description="Seconds after which an engine claims what another consumer of its slices keeps unfinished."
    )
    topic_items: Positive = Field(
        20_000, description="Messages kept per topic for nodes that lag at most; who lags more reads the database."
    )
    topic_bytes: Bytes = Field(67_108_864, description="Bytes kept per topic at most.")
    message_bytes: Bytes = Field(
        1_048_576, description="Bytes of one message to a topic at most; what is larger is read from the database."
    )
    outbox_items: Positive = Field(8_192, description="Operations sent to Redis and not yet confirmed at most.")
    outbox_bytes: Bytes = Field(33_554_432, description="Their bytes at most.")
    questions: Positive = Field(64, description="Questions of other nodes answered at once at most.")
    presence_ttl: Seconds = Field(
        10.0, description="Seconds after which what a silent node shared (presence, counts) is forgotten."
    )
    rebalance_above: float = Field(
        0.0,
        ge=0,
        description="Share by which an edge may have more connections than the average edge (0.2: a fifth); what it has beyond is "
        "closed with 4005, a few at a time, to come back through a balancer. 0: any number.",
    )


class ApiSettings(Group):
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8765, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    max_connections: Positive = Field(10_000, description="WebSocket connections per node.")
    max_connections_per_principal: Positive = Field(
        10_000, description="WebSocket connections of one principal, over all nodes; more are closed with 4503."
    )
    max_command_bytes: Bytes = Field(65_536, description="Bytes of one WebSocket command.")
    max_line_bytes: Bytes = Field(1_048_576, description="Bytes of one NDJSON line.")
    max_body_bytes: Bytes = Field(16_777_216, description="Bytes of one HTTP body that is not NDJSON.")
    max_text_chars: Positive = Field(8_192, description="Characters of a geoid's text.")
    max_state_keys: Positive = Field(256, description="Keys of a semantic or symbolic state.")
    max_metadata_bytes: Bytes = Field(16_384, description="Bytes of a geoid's metadata as JSON.")
    commands_per_second: float = Field(100.0, gt=0, description="Sustained commands per connection per second.")
    commands_burst: Positive = Field(200, description="Commands a connection may send at once.")
    shutdown_deadline: Seconds = Field(10.0, description="Seconds a graceful stop may take before the rest is aborted.")
    dashboard: bool = Field(True, description="Serve the dashboard at /.")
    tls_certificate: Path | None = Field(None, description="PEM certificate chain; with tls_key, serve HTTPS and WSS.")
    tls_key: Path | None = Field(None, description="PEM private key of tls_certificate.")
    trusted_proxies: list[str] = Field(
        default_factory=list, description="Addresses whose X-Forwarded-* headers are believed (JSON list)."
    )


class StreamSettings(Group):
    ping_interval: Seconds = Field(25.0, description="Seconds between pings, and of quiet before a heartbeat.")
    pong_timeout: Seconds = Field(
        10.0, description="Seconds to wait for a pong before closing with 4004, once the ping can have arrived."
    )
    connect_timeout: Seconds = Field(10.0, description="Seconds to wait for `connect` before closing with 4504.")
    outbox_bytes: Bytes = Field(1_048_576, description="Bytes queued per connection before it counts as slow.")
    outbox_age: Seconds = Field(
        30.0, description="Seconds a stalled connection may stay behind before it is closed with 4001."
    )
    slow_consumer: Literal["catch_up", "disconnect"] = Field(
        "catch_up",
        description="What happens to a slow subscriber of a log channel: read on from the log, or close with 4001. "
        "Latest channels are conflated.",
    )
    max_subscriptions: Positive = Field(128, description="Channels per connection.")
    max_channel_bytes: Positive = Field(255, description="Bytes of a channel name.")
    tail_bytes: Bytes = Field(
        16_777_216, description="Bytes of encoded recent events kept for catching up without a query."
    )
    history_page: Positive = Field(1_000, description="Events in one history page at most.")
    tick: float = Field(
        0.001, ge=0, le=1, description="Seconds that events are gathered under load before one joined write."
    )
    filter_nodes: Positive = Field(64, description="Nodes of a filter at most.")
    filter_depth: Positive = Field(8, description="Levels of a filter at most.")
    stats_interval: Seconds = Field(1.0, description="Seconds between values of the `stats` channel.")
    field_interval: Seconds = Field(
        1.0, description="Seconds between values of the `field` channel, if anything changed."
    )
    compression: bool = Field(False, description="Offer permessage-deflate.")


class EmbeddingSettings(Group):
    provider: Literal["minilm", "hashing", "http", "none"] = Field(
        "minilm",
        description="minilm: packaged encoder. hashing: no weights. http: OpenAI-compatible service. none: vectors only.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where torch runs; auto takes CUDA when there is one."
    )
    precision: Literal["auto", "float32", "bfloat16", "int16"] = Field(
        "auto",
        description="Of encoder and verifier. auto: bfloat16 where the processor has it, else int16 (16-bit integers in C, "
        "on processors with AVX2), else float32.",
    )
    fallback: Literal["none", "http"] = Field(
        "none",
        description="What stands in for minilm when it fails. http: the service at embedding.url, which has to serve the same "
        "model (compared at its first use). A failing CUDA device is always replaced by the CPU.",
    )
    gpu_memory_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of a CUDA device's memory that this process may take."
    )
    dimension: int = Field(
        384, ge=2, le=8192, description="Vector length for the providers hashing, http and none; minilm has 384."
    )
    batch_size: Positive = Field(32, description="Texts encoded together at most.")
    batch_wait: float = Field(0.002, ge=0, le=1, description="Seconds to wait for more texts before encoding.")
    cache_bytes: Bytes = Field(67_108_864, description="Bytes of the cache of encoded texts.")
    url: str = Field("", repr=False, description="Base URL of the HTTP provider.")
    api_key: SecretStr = Field(SecretStr(""), description="Key of the HTTP provider.")
    model: str = Field("", description="Model name asked of the HTTP provider.")
    timeout: Seconds = Field(10.0, description="Seconds before an HTTP embedding request fails.")


class ScoringSettings(Group):
    operating_point: Literal["precise", "balanced", "sensitive"] = Field(
        "balanced", description="How sure a contradiction must be to be reported."
    )
    threshold: Fraction | None = Field(
        None, description="Score at which a pair is reported; overrides the operating point."
    )
    candidates: Positive = Field(64, description="Candidates the scan hands on per statement.")
    read_candidates: Positive = Field(
        24,
        description="Candidates that the rules read per statement at most, the most promising by cosine and shared words; clashing "
        "symbols are looked at beyond that.",
    )
    verify_candidates: Positive = Field(16, description="Candidates the verifier reads per statement at most.")
    verify_pairs: Positive = Field(
        256,
        description="Candidates the verifier reads for one batch of statements; of a larger batch fewer each, but at least 4.",
    )
    verify_within: Seconds = Field(
        10.0,
        description="Seconds a statement may have waited when its turn comes; beyond, the pair head decides at once (with "
        "another encoder than minilm the rules), marked provisional, and the verifier's word follows when it has caught up.",
    )
    stages: list[Stage] = Field(
        default_factory=lambda: list[Stage](("prefilter", "verify", "scope")),
        description="Stages of the cascade that run besides the scan and the rules (JSON list). Without prefilter the verifier reads "
        "every related pair; without verify the rules decide; without scope questions, other days and what names other things, times "
        "or places count as said.",
    )
    compare_within: Literal["all", "session", "agent", "principal"] = Field(
        "all",
        description="Which statements are compared: all with all, or only those of one session, agent or principal; those that name "
        "none are compared among themselves.",
    )
    reading_cache_bytes: Bytes = Field(
        33_554_432, description="Bytes of statements that are kept as the evidence rules read them."
    )
    min_relatedness: Fraction = Field(0.3, description="Cosine below which two statements are about different things.")
    verifier: Literal["auto", "off"] = Field(
        "auto", description="auto: the packaged cross-encoder; off: evidence rules alone."
    )
    scan_device: Literal["kernel", "cuda", "torch-cpu"] = Field(
        "kernel",
        description="Where vectors are scanned: kernel: on the processor. cuda: through torch on the GPU. torch-cpu: the same "
        "code on the processor, for tests.",
    )
    device_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of GPU memory for the vectors at most, above which the kernel scans; 0: what there is.",
    )
    kernel: Literal["auto", "compiled", "reference"] = Field("auto", description="Scoring kernel: compiled, or numpy.")


class PerformanceSettings(Group):
    max_memory: int = Field(
        0,
        ge=0,
        description="Bytes of memory, mapped files aside, that the process stays below: from 85 % on it is told and caches are "
        "emptied, from 95 % on new statements are refused; 0: no limit.",
    )
    threads: Positive = Field(8, description="Worker threads in all.")
    scan_threads: int = Field(0, ge=0, description="Threads of one scan; 0: one per processor.")
    max_geoids: Positive = Field(2_000_000, description="Geoids in the index.")
    max_index_bytes: int = Field(
        4_294_967_296,
        ge=0,
        description="Bytes of memory that the geoids in the index take at most, besides their mapped vectors; 0: no limit.",
    )
    index_full: Literal["refuse", "evict_oldest"] = Field(
        "refuse", description="What a full index does with a new geoid."
    )
    snapshot_interval: float = Field(
        300.0, ge=0, description="Seconds between snapshots of the index, if anything changed; 0: none by time."
    )
    snapshot_entries: int = Field(
        25_000, ge=0, description="Log entries after which a snapshot of the index is written; 0: none by number."
    )
    snapshots_kept: int = Field(
        2, ge=0, le=16, description="Snapshots of the index kept in the data directory; 0: none is written or used."
    )
    sieve_from: int = Field(
        100_000,
        ge=0,
        description="Geoids from which scans go through a sieve, which reads a part of the rows and takes about 110 bytes "
        "more a geoid, besides max_index_bytes; 0: every scan is exact.",
    )
    queue_items: Positive = Field(4_096, description="Statements accepted and not yet committed.")
    queue_bytes: Bytes = Field(33_554_432, description="Bytes accepted and not yet committed.")
    geoid_cache_bytes: Bytes = Field(67_108_864, description="Bytes of recently used geoids kept decoded.")
    sessions: Positive = Field(10_000, description="Sessions whose conversation memory is kept.")
    session_history: Positive = Field(100, description="Statements remembered per session.")
    session_bytes: Bytes = Field(67_108_864, description="Bytes of the memory of all sessions.")
    session_ttl: Seconds = Field(3_600.0, description="Seconds of quiet after which a session's memory is dropped.")
    idempotency_window: Seconds = Field(
        300.0, description="Seconds within which a repeated key returns the first result."
    )
    retry_within: float = Field(
        3.0,
        ge=0,
        description="Seconds from its acceptance within which work is tried again that fails by a cause that may pass (database "
        "or encoder away); then its sender is told. 0: told at once.",
    )
    max_attempts: Positive = Field(
        5, description="Attempts at accepted work that was kept over a stop; then it is set aside as a dead letter."
    )
    retry_poll: Seconds = Field(
        5.0, description="Seconds between looks for kept work that is due, and for dead letters to be tried again."
    )
    dead_letters: Positive = Field(1_000, description="Dead letters kept; beyond, the oldest are dropped.")
    loop_lag_warning: Seconds = Field(0.25, description="Seconds of event-loop lag that are reported.")


class PathsSettings(Group):
    data_dir: Path = Field(Path("data"), description="Where the database and the files behind the index live.")


class SecuritySettings(Group):
    auth: Literal["auto", "none", "required"] = Field(
        "auto", description="auto: open in development on a loopback address, required elsewhere."
    )
    jwt_key_file: Path | None = Field(
        None, description="File with the JWT verification key or key set (PEM, JWK or JWKS)."
    )
    jwt_secret: SecretStr = Field(SecretStr(""), description="Shared secret for HS256 tokens, at least 32 bytes.")
    jwt_algorithms: list[str] = Field(
        default_factory=lambda: ["EdDSA", "ES256", "RS256"],
        description="Accepted signature algorithms (JSON list); never `none`.",
    )
    jwt_issuer: str = Field("", description="Required `iss` of tokens.")
    jwt_audience: str = Field("kimera-stream", description="Required `aud` of tokens.")
    jwt_leeway: float = Field(10.0, ge=0, le=300, description="Seconds of clock difference forgiven.")
    api_keys_file: Path | None = Field(
        None, description="File of hashed API keys (`kimera-stream config new-key` makes them)."
    )
    allowed_origins: list[str] = Field(
        default_factory=list, description="Origins browsers may connect from besides the server's own (JSON list)."
    )


class TelemetrySettings(Group):
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log records written."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, JSON elsewhere."
    )
    metrics: bool = Field(True, description="Serve Prometheus metrics at /metrics.")
    tracing: bool = Field(
        False, description="Record OpenTelemetry spans; export is configured by the OTEL_* variables."
    )


class Settings(BaseSettings):
    """All settings, read-only. ``load_settings`` fills them from the environment; built directly, they are the defaults
    and what is given, whatever the environment says.
    """

    model_config = SettingsConfigDict(env_prefix="KIMERA_", env_nested_delimiter="__", extra="forbid", frozen=True)

    environment: Environment = Field("development", description="development, staging or production.")
    node: str = Field("", description="This node's name; empty: host name and process id.")
    role: Literal["all", "edge", "engine"] = Field(
        "all",
        description="What this node does, where a bus joins several. edge: connections and fan-out. engine: embed, score, verify. "
        "all: both.",
    )
    database: DatabaseSettings = Field(default_factory=DatabaseSettings)  # type: ignore[arg-type]
    bus: BusSettings = Field(default_factory=BusSettings)  # type: ignore[arg-type]
    api: ApiSettings = Field(default_factory=ApiSettings)  # type: ignore[arg-type]
    stream: StreamSettings = Field(default_factory=StreamSettings)  # type: ignore[arg-type]
    embedding: EmbeddingSettings = Field(default_factory=EmbeddingSettings)  # type: ignore[arg-type]
    scoring: ScoringSettings = Field(default_factory=ScoringSettings)  # type: ignore[arg-type]
    performance: PerformanceSettings = Field(default_factory=PerformanceSettings)  # type: ignore[arg-type]
    paths: PathsSettings = Field(default_factory=PathsSettings)  # type: ignore[arg-type]
    security: SecuritySettings = Field(default_factory=SecuritySettings)  # type: ignore[arg-type]
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)  # type: ignore[arg-type]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given: ``load_settings`` reads the environment, so that it can name what is wrong in it."""
        return (init_settings,)
