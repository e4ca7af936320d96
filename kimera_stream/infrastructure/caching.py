"""Results kept for the next time, bounded in bytes: what is cached here comes from users, so a bound in items would be none."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import _lru_cache_wrapper, update_wrapper
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """The most recently used values, as many as fit. May be shared between threads.

    Args:
        max_bytes: Bound, by what ``cost`` estimates. A value that would take more alone is not kept.
        cost: Bytes that an entry takes, key and value.
    """

    def __init__(self, max_bytes: int, cost: Callable[[K, V], int]) -> None:
        self.max_bytes = max_bytes
        self._cost = cost
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return self._bytes

    def get(self, key: K) -> V | None:
        """The value, which is the most recently used one now."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V) -> None:
        """Keep a value, in place of an older one."""
        cost = self._cost(key, value)
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes -= 0 if old is None else old[1]
            if cost > self.max_bytes:
                return
            self._entries[key] = value, cost
            self._bytes += cost
            while self._bytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._bytes -= freed

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0


class KeptResults:
    """The newest results of a function under ``functools.lru_cache``, where speed forbids to weigh each: bounded in number, and each
    in bytes, as the function's callers see to.

    Args:
        function: So wrapped.
        each: Bytes that a result takes with its arguments, at most.
    """

    def __init__(self, function: "_lru_cache_wrapper[Any]", *, each: int) -> None:
        self._function = function
        self.each = each

    @property
    def bytes(self) -> int:
        """What they take, at most."""
        return self._function.cache_info().currsize * self.each

    @property
    def max_bytes(self) -> int:
        return (self._function.cache_info().maxsize or 0) * self.each

    def clear(self) -> None:
        """Keep nothing."""
        self._function.cache_clear()


class Remembering(Generic[K, V]):
    """A function of one argument that remembers its results. Two threads that ask at once may both compute.

    Attributes:
        cache: What it remembers.
    """

    def __init__(self, function: Callable[[K], V], cache: ByteCache[K, V]) -> None:
        update_wrapper(self, function)
        self._function = function
        self.cache = cache

    def __call__(self, key: K) -> V:
        found = self.cache.get(key)
        if found is None:
            found = self._function(key)
            self.cache.put(key, found)
        return found


def remembering(*, max_bytes: int, cost: Callable[[K, V], int]) -> Callable[[Callable[[K], V]], Remembering[K, V]]:
    """Make a function remember its results, none of which is None; see ``ByteCache``."""
    return lambda function: Remembering(function, ByteCache(max_bytes, cost))
