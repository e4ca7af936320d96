"""Settings read from variables, and one line for a person about each that is wrong."""

import difflib
import json
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from dotenv import dotenv_values
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from kimera_stream.infrastructure.secrets import MASK
from kimera_stream.infrastructure.settings_model import Settings
from kimera_stream.protocol.errors import KimeraError

PREFIX: Final = "KIMERA_"
EXEMPT: Final = ("KIMERA_TEST_", "KIMERA_CLIENT_", "KIMERA_BUILD_")
"""Prefixes that belong to the tests, the client and the build, not to the server."""
DEFAULT_ENV_FILE: Final = Path(".env")
Origin = Literal["default", "environment", "env file", "secret file"]


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting as a variable of the environment.

    Attributes:
        name: ``KIMERA_API__PORT``.
        path: Where it is in ``Settings``: ``("api", "port")``.
        allowed: What it takes, in words.
        default: The default as it would be written, empty for none.
        description: What it is for.
        secret: Its value is never shown.
        is_list: It is written as a JSON list.
    """

    name: str
    path: tuple[str, ...]
    allowed: str
    default: str
    description: str
    secret: bool
    is_list: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the settings.

    Attributes:
        variable: Which one.
        message: What is wrong with it and what is allowed; never a secret.
        next_step: What to do about it.
        fatal: Whether it stops the start; otherwise it is advice.
    """

    variable: str
    message: str
    next_step: str = ""
    fatal: bool = True

    @property
    def line(self) -> str:
        """All of it on one line."""
        tail = f"; {self.next_step}" if self.next_step else ""
        return " ".join(f"{self.variable}: {self.message}{tail}".split())


class SettingsError(KimeraError):
    """The settings cannot be used. As text it is one line: the first problem in full, any others by name.

    Attributes:
        problems: Every problem found, at least one.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        others = ", ".join(dict.fromkeys(problem.variable for problem in problems[1:]))
        super().__init__(problems[0].line + (f" (also wrong: {others})" if others else ""))


def variables() -> dict[str, Variable]:
    """Every setting by the name of its variable, in the order of the reference."""
    found = {}
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            for inner_name, inner in group.model_fields.items():
                variable = _variable((name, inner_name), inner)
                found[variable.name] = variable
        else:
            variable = _variable((name,), field)
            found[variable.name] = variable
    return found


def variable_name(path: tuple[str, ...]) -> str:
    """``KIMERA_API__PORT`` of ``("api", "port")``."""
    return PREFIX + "__".join(path).upper()


@dataclass(frozen=True, slots=True)
class Read:
    """Settings with the origin of every value, by variable name."""

    settings: Settings
    origins: Mapping[str, Origin]


def read_settings(environ: Mapping[str, str] | None = None, env_file: Path | str | None = DEFAULT_ENV_FILE) -> Read:
    """Settings from variables; each alone is checked, not how they go together.

    A variable of the environment goes before the same one in the file; an empty value counts as not set. A secret can be
    given in a file of its own, named by the variable with ``_FILE`` behind it.

    Args:
        environ: Variables; None takes those of the process.
        env_file: File of variables; the default one may be missing, None reads none.

    Raises:
        SettingsError: a variable is unknown, or its value is not allowed, or a file cannot be read.
    """
    known = variables()
    problems: list[Problem] = []
    values: dict[str, str] = {}
    origins: dict[str, Origin] = dict.fromkeys(known, "default")
    given: dict[str, tuple[str, Origin]] = {
        **_ours(_file_values(env_file), "env file"),
        **_ours(os.environ if environ is None else environ, "environment"),
    }
    for name, (value, origin) in given.items():
        secret = known.get(name.removesuffix("_FILE"))
        if name in known:
            values[name], origins[name] = value, origin
        elif name.endswith("_FILE") and secret is not None and secret.secret:
            if secret.name in given:
                problems.append(Problem(name, f"{secret.name} is given as well", "keep one of the two"))
                continue
            try:
                values[secret.name] = Path(value).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                problems.append(
                    Problem(name, f"{value!r} cannot be read ({_reason(error)}); expected a file with the secret")
                )
                continue
            origins[secret.name] = "secret file"
        else:
            problems.append(_unknown(name, known))
    tree, malformed = _tree(values, known)
    problems += malformed
    settings = None
    try:
        settings = Settings(**tree)
    except ValidationError as error:
        problems += [_invalid(detail["loc"], detail["msg"], values, known) for detail in error.errors()]
    if problems or settings is None:
        raise SettingsError(problems)
    return Read(settings, origins)


def _file_values(env_file: Path | str | None) -> dict[str, str]:
    if env_file is None:
        return {}
    path = Path(env_file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if path == DEFAULT_ENV_FILE:
            return {}
        raise SettingsError([Problem(str(path), f"cannot be read ({_reason(error)})")]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([Problem(str(path), f"cannot be read ({_reason(error)})")]) from error
    found = dotenv_values(stream=StringIO(text))
    return {name: value or "" for name, value in found.items()}


def _ours(values: Mapping[str, str], origin: Origin) -> dict[str, tuple[str, Origin]]:
    named = {name.upper(): value for name, value in values.items()}
    return {
        name: (value, origin)
        for name, value in named.items()
        if name.startswith(PREFIX) and not name.startswith(EXEMPT) and value.strip() != ""
    }


def _tree(values: Mapping[str, str], known: Mapping[str, Variable]) -> tuple[dict[str, Any], list[Problem]]:
    """The values nested as ``Settings`` has them, JSON lists decoded."""
    tree: dict[str, Any] = {}
    problems = []
    for name, text in values.items():
        variable = known[name]
        value: Any = text
        if variable.is_list:
            try:
                value = json.loads(text)
            except ValueError:
                problems.append(_not_allowed(variable, text))
                continue
        branch = tree
        for part in variable.path[:-1]:
            branch = branch.setdefault(part, {})
        branch[variable.path[-1]] = value
    return tree, problems


def _not_allowed(variable: Variable, text: str) -> Problem:
    shown = MASK if variable.secret else repr(text if len(text) <= 100 else text[:100] + "...")
    return Problem(variable.name, f"{shown} is not allowed; expected {variable.allowed}")


def _invalid(
    location: tuple[int | str, ...], message: str, values: Mapping[str, str], known: Mapping[str, Variable]
) -> Problem:
    # Longer than the path where an item of a list is wrong.
    for length in (2, 1):
        variable = known.get(variable_name(tuple(str(part) for part in location[:length])))
        if variable is not None:
            return _not_allowed(variable, values.get(variable.name, ""))
    return Problem(variable_name(tuple(str(part) for part in location)), message)


def _unknown(name: str, known: Mapping[str, Variable]) -> Problem:
    # A single underscore where two belong is the usual slip; compare without them.
    near = difflib.get_close_matches(name.replace("_", ""), [k.replace("_", "") for k in known], n=1, cutoff=0.75)
    if near:
        match = next(k for k in known if k.replace("_", "") == near[0])
        return Problem(name, "there is no such setting", f"did you mean {match}?")
    return Problem(name, "there is no such setting", "see docs/settings.md for those there are")


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or type(error).__name__).lower() if isinstance(error, OSError) else "not UTF-8"


# -- fields in words -----------------------------------------------------------------------------------------------------


def _variable(path: tuple[str, ...], field: FieldInfo) -> Variable:
    base, limits, optional = _unwrap(field.annotation, list(field.metadata))
    default = field.get_default(call_default_factory=True)
    allowed = _allowed(base, limits)
    return Variable(
        name=variable_name(path),
        path=path,
        allowed=f"{allowed}, or nothing" if optional else allowed,
        default=_written(default),
        description=field.description or "",
        secret=base is SecretStr,
        is_list=get_origin(base) is list,
    )


def _unwrap(annotation: Any, limits: list[Any]) -> tuple[Any, list[Any], bool]:
    """The type itself, the limits on it, and whether it may be absent."""
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        optional = True
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            limits = limits + (item.metadata if isinstance(item, FieldInfo) else [item])
    return annotation, limits, optional


def _allowed(base: Any, limits: list[Any]) -> str:
    if get_origin(base) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(base))
    if base is bool:
        return "true or false"
    if base is int or base is float:
        return ("an integer" if base is int else "a number") + _range(limits)
    if base is Path:
        return "a path"
    if get_origin(base) is list:
        return 'a JSON list of texts, as in ["a", "b"]'
    return "text"


def _range(limits: list[Any]) -> str:
    bounds = {name: getattr(item, name) for item in limits for name in ("gt", "ge", "lt", "le") if hasattr(item, name)}
    low, high = bounds.get("ge"), bounds.get("le")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    return "".join(f" {words[name]} {value}" for name, value in bounds.items())


def _written(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return json.dumps(default)
    return str(default)
