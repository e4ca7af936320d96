"""What stays for the life of a server is not looked through for garbage again."""

import gc

from kimera_stream.infrastructure.garbage import settle_garbage


def test_what_is_there_is_set_aside_and_new_cycles_are_still_found() -> None:
    before = gc.get_threshold()
    try:
        settle_garbage()
        assert gc.get_freeze_count() > 1000
        assert gc.isenabled()
        assert gc.get_threshold()[0] > before[0]
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
