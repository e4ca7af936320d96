"""How Python's collector of cyclic garbage is set for a server that holds many long-lived objects.

As it comes, it looks through all that has been imported (libraries of models: some hundred thousand objects, a pause of
a tenth of a second and more) whenever a few tens of thousands of objects have been made, and a crowd of new connections makes
these in no time. What closes here leaves no cycles behind, so little depends on how often it runs.
"""

import gc
from typing import Final

_THRESHOLDS: Final = (10_000, 50, 20)
"""New objects before the young are looked through (a pause of 4 ms where all of them live), and how many of those runs before the older
are: half a million objects, those of several thousand connections. At 20 runs it was a pause of 160 ms in the middle of a crowd."""


def settle_garbage() -> None:
    """To be called once what stays for the life of the process has been made: it is not looked through again.

    Blocks for one full collection.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
