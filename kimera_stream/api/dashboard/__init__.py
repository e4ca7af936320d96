"""The dashboard at ``/``: static files served under a strict content security policy."""

from kimera_stream.api.dashboard.routes import dashboard_routes

__all__ = ["dashboard_routes"]
