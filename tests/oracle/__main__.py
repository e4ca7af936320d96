"""``python -m tests.oracle``: a run of faults against a deployment, and a tally. Exit code 1 where a promise was broken."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from random import SystemRandom

from tests.oracle.run import Config, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--deployment", choices=["sqlite", "postgres", "cluster"], default="sqlite")
    parser.add_argument("--seed", type=int, default=None, help="of plan and statements; by default a new one")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults go on")
    parser.add_argument("--faults", type=int, default=None, help="how many faults, instead of minutes")
    parser.add_argument("--only", default=None, help="kinds of faults, separated by commas")
    parser.add_argument("--rate", type=float, default=None, help="operations a second of each of the four publishers")
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds of quiet between faults")
    parser.add_argument(
        "--slow", type=float, default=1.0, help="how many times longer everything may take: others use the machine, too"
    )
    parser.add_argument(
        "--every-log", action="store_true", help="compare each log with a serial run, and not only the last"
    )
    parser.add_argument("--keep", type=int, default=None, help="entries of the log that are kept; by default all")
    parser.add_argument("--folder", type=Path, default=None, help="keep data and output there")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else SystemRandom().randrange(1_000_000)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="oracle-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    config = Config(
        given.deployment,
        seed,
        folder,
        faults=given.faults,
        seconds=given.minutes * 60,
        rate=given.rate or (4.0 if given.deployment == "cluster" else 8.0),
        pause=given.pause,
        every_log=given.every_log,
        slow=given.slow,
        keep=given.keep,
        damage=given.keep is None,
        kinds=frozenset(given.only.split(",")) if given.only else None,
    )
    live = sys.stderr.isatty()

    def say(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}" if live else f"{line}\n")
        sys.stderr.flush()

    say(f"seed {seed}, {given.deployment}, data and output in {folder}")
    tally = run(config, say, every=1.0 if live else 10.0)
    if live:
        sys.stderr.write("\n")
    sys.stdout.write("\n".join([*tally.lines(), ""]))
    if given.folder is None and not tally.violations:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
