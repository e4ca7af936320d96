"""The fault plan: what is done when, drawn from a seed. The same seed and deployment make the same plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

ALWAYS = {
    "cut": 3,
    "half_open": 2,
    "stall": 2,
    "retry_storm": 2,
    "kill": 4,
    "pause": 2,
    "stop": 1,
    "revoke": 1,
    "locked": 1,
}
"""Faults of every deployment, with their weights."""
SHIMMED = {"disk_full": 2, "slow_sync": 2, "sync_fails": 1, "clock": 2}
"""Those that need the preloaded library."""
ON_SQLITE = {"torn_log": 1}
DAMAGE = {"bit_flip": 1, "bit_flip_log": 1, "torn_page": 1}
"""Those that end in the restoring of a backup: each makes a new log."""
ON_POSTGRES = {
    "database_sessions": 3,
    "database_restart": 2,
    "database_kill": 1,
    "database_pause": 1,
    "database_stall": 1,
    "database_partition": 1,
    "database_failover": 1,
}
SHIMMED_ON_POSTGRES = {"node_disk_full": 1}
ON_CLUSTER = {
    "redis_flush": 3,
    "redis_restart": 2,
    "redis_pause": 1,
    "redis_partition": 2,
    "redis_cut_off": 2,
    "database_cut_off": 2,
}


@dataclass(frozen=True)
class Step:
    """One fault.

    Attributes:
        wait: Seconds before it.
        length: Seconds that it lasts, where it lasts.
        draw: What is left to chance within it.
    """

    number: int
    kind: str
    wait: float
    length: float
    draw: int


def weights_of(deployment: str, *, shimmed: bool, damage: bool) -> dict[str, int]:
    """Kinds that can be had there."""
    found = dict(ALWAYS)
    if shimmed:
        found |= SHIMMED
    if deployment == "sqlite":
        found |= ON_SQLITE
        if damage:
            found |= DAMAGE
    else:
        found |= ON_POSTGRES
        if shimmed:
            found |= SHIMMED_ON_POSTGRES
    if deployment == "cluster":
        found |= ON_CLUSTER
    return found


def plan(seed: int, weights: dict[str, int], *, pause: float, scale: float = 1.0) -> Iterator[Step]:
    """Steps without end: first each kind once, in any order, then by weight. Damage comes rarely: it costs a whole check.

    Args:
        pause: Mean seconds of quiet between two faults.
        scale: Of the lengths of faults.
    """
    rng = Random(f"plan-{seed}")
    kinds = sorted(weights)
    first = list(kinds)
    rng.shuffle(first)
    number = 0
    since_damage = 0
    while True:
        kind = first.pop() if first else rng.choices(kinds, [weights[kind] for kind in kinds])[0]
        if kind in DAMAGE and number >= len(kinds):
            if since_damage < 40:
                continue
            since_damage = 0
        number += 1
        since_damage += 1
        wait = rng.expovariate(1 / pause) if pause else 0.0
        yield Step(number, kind, wait, scale * (0.2 + rng.random() * 1.3), rng.getrandbits(32))
