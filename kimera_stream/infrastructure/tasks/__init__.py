"""Structured concurrency: every task has an owner, a name and a policy for failure.

``Supervisor`` owns one task group and the services in it; ``ServiceSpec`` says how each starts, fails and stops.
"""

from kimera_stream.infrastructure.tasks.policy import Backoff, Budget, OnEnd, OnFailure
from kimera_stream.infrastructure.tasks.service import (
    Service,
    ServiceFailed,
    ServiceSpec,
    ServiceState,
    ServiceStatistics,
    Unrecoverable,
)
from kimera_stream.infrastructure.tasks.supervisor import StopReport, Supervisor

__all__ = [
    "Backoff",
    "Budget",
    "OnEnd",
    "OnFailure",
    "Service",
    "ServiceFailed",
    "ServiceSpec",
    "ServiceState",
    "ServiceStatistics",
    "StopReport",
    "Supervisor",
    "Unrecoverable",
]
