"""Typed settings from the environment: ``KIMERA_<GROUP>__<NAME>``, with ``.env`` support.

``settings_model`` has the fields, ``settings_loading`` reads them and names what is wrong, ``settings_checks`` looks at them
together. The reference is docs/settings.md.
"""

from kimera_stream.infrastructure.settings_checks import (
    access_is_open,
    check_environment,
    check_files,
    config_check,
    config_show,
    database_url,
    is_loopback,
    load_settings,
    masked,
    node_name,
)
from kimera_stream.infrastructure.settings_loading import Problem, SettingsError, read_settings
from kimera_stream.infrastructure.settings_model import (
    ApiSettings,
    BusSettings,
    DatabaseSettings,
    EmbeddingSettings,
    Environment,
    Group,
    PathsSettings,
    PerformanceSettings,
    ScoringSettings,
    SecuritySettings,
    Settings,
    StreamSettings,
    TelemetrySettings,
)

__all__ = [
    "ApiSettings",
    "BusSettings",
    "DatabaseSettings",
    "EmbeddingSettings",
    "Environment",
    "Group",
    "PathsSettings",
    "PerformanceSettings",
    "Problem",
    "ScoringSettings",
    "SecuritySettings",
    "Settings",
    "SettingsError",
    "StreamSettings",
    "TelemetrySettings",
    "access_is_open",
    "check_environment",
    "check_files",
    "config_check",
    "config_show",
    "database_url",
    "is_loopback",
    "load_settings",
    "masked",
    "node_name",
    "read_settings",
]
