"""Which words mean the same and which are opposites, from WordNet, for the marks that the verifier's tokens carry.

``python -m training.verifier.lexicon`` writes ``kimera_stream/engines/weights/lexicon.txt.gz``. WordNet 3.0 (Princeton University,
WordNet licence) as Debian's package ``wordnet-base`` installs it. Only single words, and only senses that its tagged texts hold, the
first two of each word: in a rare sense nearly every word means the same as some other.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from training.verifier.wordnet import DIRECTORY

TARGET = Path(__file__).parents[2] / "kimera_stream" / "engines" / "weights" / "lexicon.txt.gz"
PARTS = ("adj", "adv", "verb", "noun")
SENSES = 2
_SHORT = re.compile(r"[^aeiou]*[aeiou]{1,2}[^aeiou]+[ey]?")
"""An adjective that is compared with -er and -est: of one syllable, or of two with a y at the end."""


def written(directory: Path = DIRECTORY) -> Iterator[str]:
    """Lines of the lexicon: ``= word word ...`` mean the same, ``! words | words`` are opposites.

    Raises:
        FileNotFoundError: WordNet is not there; ``apt-get install wordnet-base``.
    """
    lines: set[str] = set()
    for part in PARTS:
        synsets = dict(_synsets(directory / f"data.{part}"))
        used = _used(directory / f"index.{part}")
        for name, (words, opposites) in synsets.items():
            known = [word for word in words if name in used.get(word, ())]
            if len(known) > 1:
                lines.add(f"= {' '.join(sorted(known))}")
            for mine, synset, its in opposites:
                one, other = words[mine], synsets[synset][0][its]
                if not (name in used.get(one, ()) and synset in used.get(other, ()) and one < other):
                    continue
                lines.add(f"! {one} | {other}")
                if part == "adj" and _SHORT.fullmatch(one) and _SHORT.fullmatch(other):
                    lines.update(f"! {a} | {b}" for a, b in zip(_compared(one), _compared(other), strict=True))
    yield from sorted(lines)


def _synsets(path: Path) -> Iterator[tuple[str, tuple[list[str], list[tuple[int, str, int]]]]]:
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue
        head = line.split(" | ")[0].split()
        count = int(head[3], 16)
        words = [re.sub(r"\(.*\)", "", word).lower() for word in head[4 : 4 + 2 * count : 2]]
        pointers = head[4 + 2 * count :]
        links = []
        for at in range(1, 1 + 4 * int(pointers[0]), 4):
            if pointers[at] == "!":
                ends = pointers[at + 3]
                links.append((int(ends, 16) // 256 - 1, pointers[at + 1], int(ends, 16) % 256 - 1))
        yield head[0], (words, links)


def _used(path: Path) -> dict[str, set[str]]:
    """Single words, and the synsets of their first senses among those that the tagged texts hold."""
    used: dict[str, set[str]] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue
        parts = line.split()
        word, kinds = parts[0], int(parts[3])
        tagged = int(parts[5 + kinds])
        if tagged and word.isalpha() and len(word) > 2:
            used[word] = set(parts[6 + kinds :][: min(tagged, SENSES)])
    return used


def _compared(word: str) -> tuple[str, str]:
    """ "tall" gives "taller" and "tallest"."""
    if word.endswith("e"):
        base = word[:-1]
    elif word.endswith("y"):
        base = f"{word[:-1]}i"
    elif re.search(r"[^aeiou][aeiou][bdgmnpt]$", word):
        base = word + word[-1]
    else:
        base = word
    return f"{base}er", f"{base}est"


def main() -> None:
    lines = list(written())
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())
    print(f"{TARGET.name}: {len(lines)} lines, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
