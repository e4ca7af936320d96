"""Python client: needs the wire types alone, no server code, no numpy, no torch.

::

    async with connect("http://127.0.0.1:8765") as client:
        await client.publish("The pump in hall 3 is running.")
        async with client.subscribe("contradictions") as events:
            async for item in events:
                ...

``connect`` keeps one WebSocket alive inside a task group of its own: it reconnects with backoff, resumes each
subscription where it stopped, and hands out every event exactly once or says that it cannot (``Gap``).
``HttpClient`` is the blocking face for scripts; ``ingest.LineStream`` sends many statements through one request.
"""

from kimera_stream.client.backoff import Backoff
from kimera_stream.client.errors import ConnectionEndedError, ConnectionLostError
from kimera_stream.client.http import HttpClient
from kimera_stream.client.session import Client, connect
from kimera_stream.client.subscription import Gap, Subscription
from kimera_stream.protocol.messages import Event, Resync
from kimera_stream.protocol.objects import GeoidBody, Position

__all__ = [
    "Backoff",
    "Client",
    "ConnectionEndedError",
    "ConnectionLostError",
    "Event",
    "Gap",
    "GeoidBody",
    "HttpClient",
    "Position",
    "Resync",
    "Subscription",
    "connect",
]
