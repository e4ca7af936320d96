"""Faults of disk and clock, switched while a process runs: a library preloaded into it, and the file that steers it."""

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
_SIZE = 8192
_FOLDER = 40
"""Where the folder's name begins in ``struct control``."""


def build_shim(folder: Path) -> Path | None:
    """The library, compiled into ``folder``; None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-Wall", "-Wno-nonnull-compare", "-o", str(library), str(SOURCE), "-ldl"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return library


class Shim:
    """What is switched on for the processes that were started with ``environment``. Everything is off at first.

    Args:
        library: What ``build_shim`` made.
        control: File that steers it.
        folder: Where the disk may be full.
    """

    def __init__(self, library: Path, control: Path, folder: Path) -> None:
        control.write_bytes(b"\0" * _SIZE)
        control.chmod(0o666)  # another user's process may write down what it did
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        name = str(folder.absolute()).encode()
        self._map[_FOLDER : _FOLDER + len(name)] = name
        self.environment = {"LD_PRELOAD": str(library.absolute()), "ORACLE_SHIM": str(control.absolute())}

    def _set(self, at: int, form: str, value: int) -> None:
        struct.pack_into(form, self._map, at, value)

    def _get(self, at: int) -> int:
        return int(struct.unpack_from("<i", self._map, at)[0])

    def sync_takes(self, milliseconds: int) -> None:
        """How much longer each fsync takes, those under way included; -1: it does nothing, for a server of whom nobody expects to
        keep anything."""
        self._set(0, "<i", milliseconds)

    def disk_full(self, on: bool) -> None:
        """No room for another byte; the first write may leave half of it."""
        self._set(4, "<i", int(on))

    def read_only(self, on: bool) -> None:
        """Nothing there can be changed any more, and nothing opened to be changed."""
        self._set(32, "<i", int(on))

    def sync_fails(self, on: bool) -> None:
        """Each fsync fails with EIO."""
        self._set(8, "<i", int(on))

    def clock_jumps(self, milliseconds: int) -> None:
        """By how much the time of day differs from the true one."""
        self._set(16, "<q", milliseconds)

    @property
    def refused(self) -> int:
        """Calls that were made to fail."""
        return self._get(12)

    @property
    def delayed(self) -> int:
        """Syncs that were held up."""
        return self._get(24)

    def quiet(self) -> None:
        """Disk and clock as they are, but for the clock, which stays where it jumped to."""
        self.sync_takes(0)
        self.disk_full(False)
        self.read_only(False)
        self.sync_fails(False)
