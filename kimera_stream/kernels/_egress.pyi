from typing import Any

class Sink:
    fd: int
    closing: bool
    dirty: bool
    transport: Any
    def __init__(self, transport: Any, fd: int) -> None: ...

def fan_out(handles: list[Any], frames: bytes) -> None: ...
def frame_records(packed: bytes, head: bytes) -> tuple[bytes | None, int, int, int]: ...
