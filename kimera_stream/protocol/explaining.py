"""The decoder's errors in the words of the contract: the field first, then what was expected there."""

import re
from typing import Any, Final, TypeVar, get_args

import msgspec

from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.messages import Encoding
from kimera_stream.protocol.objects import ContradictionState, Decision, Scalar, WatchKind

T = TypeVar("T")

_SHOWN_CHARS: Final = 256
"""Of a key in a path; no key that is accepted is longer."""
_GOT_NONE: Final = re.compile(r"\A(Expected `[^`]*`, got `)None`")
_WITH_PATH: Final = re.compile(r"(?P<what>.*) - at `(?:key` in `)?\$(?P<path>.*)`", re.DOTALL)
_WRONG_KEY: Final = re.compile(r"Expected `str`, got `(?P<given>\w+)` - at `key` in `.*`", re.DOTALL)
_UNKNOWN_FIELD: Final = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING_FIELD: Final = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_NO_CHOICE: Final = re.compile(r"Invalid enum value '(?P<given>.*)'", re.DOTALL)
_STEP: Final = re.compile(r"\[(?:\.\.\.|(?P<index>\d+))\]|\.?(?P<name>[^.\[]+)")
_ANY_KEY: Final = "[...]"
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "decision": get_args(Decision),
    "kinds": get_args(WatchKind),
    "relation": get_args(WatchKind),
    "state": get_args(ContradictionState),
}
"""What the fields of commands and requests with a fixed choice take: the decoder's error tells only what was given."""
_VALUES: Final[dict[str, Any]] = {"semantic_state": float, "symbolic_state": Scalar}
"""What the free keys of a field hold; those of every other field hold anything."""


def bad_request(exc: Exception, data: str | bytes | None = None, encoding: Encoding = "json") -> BadRequestError:
    """A decoding error as the error to answer.

    Args:
        data: What was decoded, in ``encoding``: the decoder does not tell which of the free keys of an object it stopped at.
    """
    text = _words(exc)
    path = ""
    if match := _WITH_PATH.fullmatch(text):
        text, path = match["what"], match["path"]
        if data is not None and _ANY_KEY in path:
            path = _named(path, data, encoding)
        path = path.removeprefix(".")
    if given := wrong_key(exc):
        text = f"expected keys to be strings, got `{given}`"
    elif match := _UNKNOWN_FIELD.fullmatch(text):
        path, text = _join(path, match["name"]), "unknown field"
    elif match := _MISSING_FIELD.fullmatch(text):
        path, text = _join(path, match["name"]), "required"
    elif (match := _NO_CHOICE.fullmatch(text)) and (choices := _CHOICES.get(path.partition("[")[0])):
        text = f"expected one of {', '.join(choices)}, got {match['given'][:40]!r}"
    elif text:
        text = text[0].lower() + text[1:]
    return BadRequestError(f"{path or 'message'}: {text}", field=path or None)


def wrong_key(exc: Exception) -> str | None:
    """The type of the key at which the decoder stopped as it is no string; None: it was something else that stopped it."""
    match = _WRONG_KEY.fullmatch(_words(exc))
    return match["given"] if match else None


def _words(exc: Exception) -> str:
    """The decoder's own, with one name for null: MessagePack's has two."""
    return _GOT_NONE.sub(r"\1null`", str(exc))


def decode_as(kind: type[T], data: str | bytes | msgspec.Raw, encoding: Encoding) -> T:
    """``data`` as ``kind``.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is not one.
    """
    if encoding == "json":
        return msgspec.json.decode(data, type=kind)
    return msgspec.msgpack.decode(data.encode() if isinstance(data, str) else data, type=kind)


def _named(path: str, data: str | bytes, encoding: Encoding) -> str:
    """``path`` with the keys in place of ``[...]``, as far as they can be found.

    Goes down the path once and looks at each value of an object with free keys on its own.
    """
    steps = list(_STEP.finditer(path))
    value: str | bytes | msgspec.Raw = data
    named = ""
    for place, step in enumerate(steps):
        try:
            if step["index"]:
                value = decode_as(list[msgspec.Raw], value, encoding)[int(step["index"])]
                named += step[0]
                continue
            held = decode_as(dict[str, msgspec.Raw], value, encoding)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError):
            return named + path[step.start() :]  # what comes after the value is broken as well
        name = step["name"]
        if name is None:
            last = place == len(steps) - 1
            kind = _VALUES.get(steps[place - 1]["name"] or "", Any) if last and place else Any
            name = next((key for key, each in held.items() if not _fits(each, kind, encoding)), None)
        if name is None or name not in held:  # a key that is there twice: the later value hides the wrong one
            return named + path[step.start() :]
        value = held[name]
        named = _join(named, name if len(name) <= _SHOWN_CHARS else name[:_SHOWN_CHARS] + "...")
    return named


def _fits(value: msgspec.Raw, kind: Any, encoding: Encoding) -> bool:
    try:
        decode_as(kind, value, encoding)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
