"""The HTTP door as a whole: its table of operations, and the routes of it."""

from starlette.routing import Route

from kimera_stream.api.http import contradictions, geoids, health, meaning, revocations, stream, usage
from kimera_stream.api.http.documents import Documents
from kimera_stream.api.http.door import HttpDoor
from kimera_stream.api.http.operations import Operation, routes_of

OPERATIONS: tuple[Operation, ...] = (
    *geoids.OPERATIONS,
    *contradictions.OPERATIONS,
    *meaning.OPERATIONS,
    *stream.OPERATIONS,
    *usage.OPERATIONS,
    *revocations.OPERATIONS,
    *health.OPERATIONS,
)


def http_routes(door: HttpDoor) -> list[Route]:
    """Every route of section 4 of the contract but the dashboard.

    They want ``Starlette(exception_handlers=problems.EXCEPTION_HANDLERS, middleware=middleware.http_middleware(...))`` around.
    """
    return routes_of(door, Documents(OPERATIONS, door.version).operations)
