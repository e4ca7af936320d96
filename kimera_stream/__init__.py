"""Kimera Stream: a live contradiction detector for streams of statements."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kimera-stream")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
