"""Authentication: what is let in, what is refused and in which words, and that no token is ever repeated."""

import base64
import hashlib
import hmac
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from kimera_stream.api.auth import (
    ANONYMOUS,
    TokenAuthenticator,
    add_api_key,
    create_api_key,
    extract_token,
    host_allowed,
    origin_allowed,
    revoke_api_key,
    split_subprotocols,
)
from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.infrastructure import secrets as secrets_module
from kimera_stream.infrastructure.secrets import hash_secret, verify_secret
from kimera_stream.infrastructure.settings import SecuritySettings, SettingsError
from kimera_stream.protocol.errors import UnauthorizedError

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:EdDSA is deprecated"),  # the name that identity providers still use
    pytest.mark.filterwarnings("ignore:Key size should be"),
]

NOW = 1_800_000_000
SECRET = "0123456789abcdef0123456789abcdef"
ED = OKPKey.generate_key("Ed25519")
OTHER_ED = OKPKey.generate_key("Ed25519")
RSA = RSAKey.generate_key(2048)
EC = ECKey.generate_key("P-256")
with warnings.catch_warnings(action="ignore"):
    SHORT_RSA = RSAKey.generate_key(1024).as_pem(private=False)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


class CountingThreads:
    def __init__(self) -> None:
        self.calls = 0

    async def run(self, purpose: str, fn: Callable[..., Any], *args: Any) -> Any:
        assert purpose == "io"
        self.calls += 1
        return await anyio.to_thread.run_sync(fn, *args)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def claims(**changed: Any) -> dict[str, Any]:
    base = {"sub": "ada", "iss": "https://login.example", "aud": "kimera-stream", "exp": NOW + 60, "roles": ["publish"]}
    return {name: value for name, value in (base | changed).items() if value is not ...}


def signed(key: Any, algorithm: str, header: dict[str, Any] | None = None, **changed: Any) -> str:
    registry = JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    return jwt.encode({"alg": algorithm, **(header or {})}, claims(**changed), key, registry=registry)


NESTED = base64.urlsafe_b64encode(b'{"alg":' + b"[" * 5_000).decode()
"""A header that decoders descend into until the stack ends."""


async def in_thread(fn: Callable[..., Any], *args: Any) -> Any:
    """What the command line does, which may block."""
    return await anyio.to_thread.run_sync(fn, *args)


async def ready(
    clock: Clock, tmp_path: Path, key: Any = None, *, open_access: bool = False, **given: Any
) -> TokenAuthenticator:
    fields: dict[str, Any] = {"jwt_issuer": "https://login.example", "jwt_leeway": 10} | given
    if key is not None:
        path = tmp_path / "key"
        path.write_bytes(key if isinstance(key, bytes) else key.as_pem(private=False))
        fields["jwt_key_file"] = path
    authenticator = TokenAuthenticator(
        SecuritySettings(**fields), open_access=open_access, threads=CountingThreads(), clock=clock
    )
    await authenticator.load()
    return authenticator


async def refusal(authenticator: TokenAuthenticator, token: str | None) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        await authenticator.authenticate(token)
    message = caught.value.message
    if token:
        assert token not in message
        assert all(part not in message for part in token.split(".") if len(part) > 8)
        assert caught.value.__cause__ is None
    assert caught.value.code == "unauthorized"
    return message


# -- access ----------------------------------------------------------------------------------------------------------


async def test_without_a_token(clock: Clock, tmp_path: Path) -> None:
    closed = await ready(clock, tmp_path, ED)
    assert closed.required
    assert "a token is required" in await refusal(closed, None)
    assert "a token is required" in await refusal(closed, "")
    opened = await ready(clock, tmp_path, open_access=True)
    assert not opened.required
    assert await opened.authenticate(None) == ANONYMOUS == Principal("anonymous", ALL_ROLES, None)


async def test_open_access_still_judges_tokens_it_can_judge(clock: Clock, tmp_path: Path) -> None:
    without = await ready(clock, tmp_path, open_access=True)
    assert await without.authenticate("anything") == ANONYMOUS
    with_key = await ready(clock, tmp_path, ED, open_access=True)
    assert (await with_key.authenticate(signed(ED, "EdDSA"))).id == "ada"
    assert "signature" in await refusal(with_key, signed(OTHER_ED, "EdDSA"))


# -- JSON Web Tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "algorithm"), [(ED, "EdDSA"), (RSA, "RS256"), (EC, "ES256")])
async def test_each_kind_of_key(clock: Clock, tmp_path: Path, key: Any, algorithm: str) -> None:
    authenticator = await ready(clock, tmp_path, key)
    principal = await authenticator.authenticate(signed(key, algorithm, {"kid": "any", "x-unknown": 1}))
    assert principal == Principal("ada", frozenset({"publish"}), NOW + 60)


async def test_shared_secret(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, jwt_secret=SECRET)
    assert (await authenticator.authenticate(signed(OctKey.import_key(SECRET), "HS256"))).id == "ada"
    wrong = OctKey.import_key("x" * 32)
    assert await refusal(authenticator, signed(wrong, "HS256")) == "token: its signature cannot be verified"


async def test_key_set_chooses_by_kid_and_ignores_encryption_keys(clock: Clock, tmp_path: Path) -> None:
    first, second = ED.as_dict(private=False, kid="a", use="sig"), EC.as_dict(private=False, kid="b")
    other = RSA.as_dict(private=False, kid="c", use="enc")
    document = json.dumps({"keys": [first, second, other]}).encode()
    authenticator = await ready(clock, tmp_path, document)
    assert (await authenticator.authenticate(signed(ED, "EdDSA", {"kid": "a"}))).id == "ada"
    assert (await authenticator.authenticate(signed(EC, "ES256", {"kid": "b"}))).id == "ada"
    assert "signature" in await refusal(authenticator, signed(ED, "EdDSA", {"kid": "z"}))
    assert "signature" in await refusal(authenticator, signed(ED, "EdDSA"))
    assert await refusal(authenticator, signed(RSA, "RS256", {"kid": "c"})) == "token: its signature cannot be verified"


async def test_single_jwk(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, json.dumps(ED.as_dict(private=False)).encode())
    assert (await authenticator.authenticate(signed(ED, "EdDSA"))).id == "ada"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"exp": NOW - 11}, "it has expired"),
        ({"exp": ...}, "its claim exp is missing"),
        ({"exp": "tomorrow"}, "its claim exp is not accepted"),
        ({"exp": float("nan")}, "its claim exp is not accepted"),
        ({"exp": float("inf")}, "its claim exp is not accepted"),
        ({"exp": 10**400}, "its claim exp is not accepted"),
        ({"exp": True}, "its claim exp is not accepted"),
        ({"nbf": NOW + 20}, "its claim nbf is not accepted"),
        ({"iat": NOW + 20}, "its claim iat is not accepted"),
        ({"aud": "another"}, "its claim aud is not accepted"),
        ({"aud": ["another", "more"]}, "its claim aud is not accepted"),
        ({"aud": ...}, "its claim aud is missing"),
        ({"iss": "https://evil.example"}, "its claim iss is not accepted"),
        ({"iss": ...}, "its claim iss is missing"),
        ({"iss": ["https://login.example"]}, "its claim iss is not accepted"),
        ({"sub": ...}, "its claim sub is missing"),
        ({"sub": ""}, "its claim sub is not accepted"),
        ({"sub": "a\nb"}, "its claim sub is not accepted"),
        ({"sub": "x" * 256}, "its claim sub is not accepted"),
        ({"roles": "publish"}, "its claim roles is no list of texts"),
        ({"roles": ["publish", 1]}, "its claim roles is no list of texts"),
        ({"roles": {"publish": True}}, "its claim roles is no list of texts"),
        ({"roles": ..., "scope": ["publish"]}, "its claim scope is no text"),
    ],
)
async def test_claims_that_are_refused(clock: Clock, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    assert await refusal(authenticator, signed(ED, "EdDSA", **changed)) == f"token: {says}"


async def test_leeway_and_the_exact_second_of_expiry(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    token = signed(ED, "EdDSA", nbf=NOW + 10)
    clock.now = NOW + 69.0
    assert (await authenticator.authenticate(token)).expires == NOW + 60
    clock.now = NOW + 70.0
    assert "expired" in await refusal(authenticator, token)


@pytest.mark.parametrize(
    ("changed", "roles"),
    [
        ({"roles": ["admin", "subscribe", "billing"]}, {"admin", "subscribe"}),
        ({"roles": ["PUBLISH"]}, set()),
        ({"roles": ..., "scope": "openid publish  resolve"}, {"publish", "resolve"}),
        ({"roles": ...}, set()),
        ({"roles": [], "scope": "admin"}, set()),
    ],
)
async def test_roles_of_a_token(clock: Clock, tmp_path: Path, changed: dict[str, Any], roles: set[str]) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    assert (await authenticator.authenticate(signed(ED, "EdDSA", **changed))).roles == roles


def forged(header: dict[str, Any], body: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(body).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", "HS512", "RS384", ["EdDSA"], None, 7])
async def test_algorithms_that_are_not_pinned(clock: Clock, tmp_path: Path, algorithm: Any) -> None:
    authenticator = await ready(clock, tmp_path, ED, jwt_secret=SECRET)
    message = await refusal(authenticator, forged({"alg": algorithm}, claims()))
    assert message in ("token: its algorithm is not accepted", "token: it is malformed")


@pytest.mark.parametrize("with_secret", [True, False])
async def test_public_key_as_shared_secret(clock: Clock, tmp_path: Path, with_secret: bool) -> None:
    """The classic confusion: sign by HS256 with the public key that everybody knows."""
    authenticator = await ready(clock, tmp_path, RSA, **({"jwt_secret": SECRET} if with_secret else {}))
    unsigned = forged({"alg": "HS256"}, claims()).rsplit(".", 1)[0]
    mac = hmac.new(RSA.as_pem(private=False), unsigned.encode(), hashlib.sha256).digest()
    token = unsigned + "." + base64.urlsafe_b64encode(mac).rstrip(b"=").decode()
    expected = "its signature cannot be verified" if with_secret else "its algorithm is not accepted"
    assert await refusal(authenticator, token) == f"token: {expected}"


async def test_algorithm_of_another_kind_of_key(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    assert await refusal(authenticator, signed(RSA, "RS256")) == "token: its signature cannot be verified"


async def test_hs256_is_not_accepted_without_a_secret_even_if_listed(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, ED, jwt_algorithms=["HS256", "EdDSA", "none"])
    token = signed(OctKey.import_key(SECRET), "HS256")
    assert await refusal(authenticator, token) == "token: its algorithm is not accepted"
    assert "algorithm" in await refusal(authenticator, forged({"alg": "none"}, claims()))


async def test_without_any_key_every_token_is_refused(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path)
    assert "algorithm" in await refusal(authenticator, signed(ED, "EdDSA"))
    assert "not valid" in await refusal(authenticator, create_api_key("x", ["admin"])[0])


async def test_a_changed_payload_and_a_critical_header(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    header, _, signature = signed(ED, "EdDSA").split(".")
    body = base64.urlsafe_b64encode(json.dumps(claims(roles=["admin"])).encode()).rstrip(b"=").decode()
    assert "signature" in await refusal(authenticator, f"{header}.{body}.{signature}")
    assert "malformed" in await refusal(authenticator, forged({"alg": "EdDSA", "crit": ["exp"], "exp": 1}, claims()))


@pytest.mark.parametrize(
    "token",
    ["x", "a.b", "a.b.c", "a.b.c.d.e", "..", "é.é.é", "x" * 9000, "\x00.\x00.\x00", "e30.e30.e30", f"{NESTED}.e30.e30"],
)
async def test_what_is_no_token(clock: Clock, tmp_path: Path, token: str) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    assert "malformed" in await refusal(authenticator, token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
HEADER = st.fixed_dictionaries(
    {},
    optional={"alg": st.sampled_from(["EdDSA", "ES256", "RS256", "HS256", "none"]) | JSON}
    | dict.fromkeys(("kid", "typ", "crit", "b64", "jwk", "jku", "x5c", "cty"), JSON),
)


@settings(max_examples=300, deadline=None)
@given(header=HEADER | JSON, body=JSON, signature=st.binary(max_size=80))
def test_any_three_parts_are_refused_and_nothing_else_happens(header: Any, body: Any, signature: bytes) -> None:
    token = forged(header, body, signature)
    authenticator = FUZZED[0]

    async def attempt() -> None:
        with pytest.raises(UnauthorizedError):
            await authenticator.authenticate(token)

    anyio.run(attempt)


@settings(max_examples=200, deadline=None)
@given(
    body=JSON
    | st.dictionaries(st.sampled_from(["sub", "exp", "aud", "iss", "nbf", "iat", "roles", "scope", "jti"]), JSON)
)
def test_any_payload_with_a_good_signature_is_judged_by_its_claims(body: Any) -> None:
    unsigned = forged({"alg": "EdDSA"}, body).rsplit(".", 1)[0]
    signature = ED.raw_value.sign(unsigned.encode())
    token = unsigned + "." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()

    async def attempt() -> None:
        with pytest.raises(UnauthorizedError):
            await FUZZED[0].authenticate(token)

    anyio.run(attempt)


FUZZED: list[TokenAuthenticator] = []


@pytest.fixture(scope="module", autouse=True)
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    async def make() -> TokenAuthenticator:
        return await ready(Clock(), tmp_path_factory.mktemp("keys"), ED, jwt_secret=SECRET)

    FUZZED.append(anyio.run(make))
    yield
    FUZZED.clear()


# -- the key file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nonsense", "no public key as PEM, JWK or JWKS"),
        (b"{}", "no public key as PEM, JWK or JWKS"),
        (b'{"keys": []}', "no public key as PEM, JWK or JWKS"),
        (b'{"keys": 7}', "no public key as PEM, JWK or JWKS"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key as PEM, JWK or JWKS"),
        (json.dumps(OctKey.generate_key(256).as_dict()).encode(), "holds a shared secret"),
        (json.dumps(KeySet([OctKey.generate_key(256)]).as_dict(private=True)).encode(), "holds a shared secret"),
        (ED.as_pem(private=True), "holds a private key"),
        (RSA.as_pem(private=True), "holds a private key"),
        (SHORT_RSA, "fewer than 2048 bits"),
    ],
)
async def test_key_files_that_stop_the_start(clock: Clock, tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        await ready(clock, tmp_path, content)
    assert says in str(caught.value)
    assert str(caught.value).startswith("KIMERA_SECURITY__JWT_KEY_FILE: ")
    assert "\n" not in str(caught.value)


async def test_missing_files_stop_the_start(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="JWT_KEY_FILE: the file of the JWT key cannot be read"):
        await ready(clock, tmp_path, jwt_key_file=tmp_path / "absent")
    with pytest.raises(SettingsError, match="API_KEYS_FILE: the file of API keys cannot be read"):
        await ready(clock, tmp_path, api_keys_file=tmp_path / "absent")


async def test_rotated_keys_are_picked_up_and_a_broken_file_changes_nothing(clock: Clock, tmp_path: Path) -> None:
    authenticator = await ready(clock, tmp_path, ED)
    token = signed(OTHER_ED, "EdDSA", exp=NOW + 1000)
    assert "signature" in await refusal(authenticator, token)
    (tmp_path / "key").write_bytes(OTHER_ED.as_pem(private=False))
    clock.now += 10
    assert (await authenticator.authenticate(token)).id == "ada"
    (tmp_path / "key").write_bytes(b"half a fi")
    clock.now += 10
    assert (await authenticator.authenticate(token)).id == "ada"
    (tmp_path / "key").unlink()
    clock.now += 10
    assert (await authenticator.authenticate(token)).id == "ada"


# -- API keys --------------------------------------------------------------------------------------------------------


async def test_an_api_key_from_creation_to_revocation(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "etc" / "keys.jsonl"
    token, key = create_api_key("ci", ["publish", "subscribe"], note="for tests")
    other_token, other = create_api_key("ops", ["admin"])
    await in_thread(add_api_key, path, key)
    await in_thread(add_api_key, path, other)
    assert path.stat().st_mode & 0o777 == 0o600
    secret = token.split("_", 2)[2]
    assert secret not in path.read_text()
    assert token.startswith("kst_")

    authenticator = await ready(clock, tmp_path, api_keys_file=path)
    assert await authenticator.authenticate(token) == Principal("ci", frozenset({"publish", "subscribe"}), None)
    assert (await authenticator.authenticate(other_token)).may("resolve")

    assert await in_thread(revoke_api_key, path, key.id) is True
    assert await in_thread(revoke_api_key, path, key.id) is False
    clock.now += 1
    assert await refusal(authenticator, token) == "token: the API key is not valid"
    assert (await authenticator.authenticate(other_token)).id == "ops"

    path.unlink()
    clock.now += 1
    assert "not valid" in await refusal(authenticator, other_token)
    await in_thread(add_api_key, path, other)
    clock.now += 1
    assert (await authenticator.authenticate(other_token)).id == "ops"


async def test_the_file_is_looked_at_once_a_second_not_once_a_command(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    token, key = create_api_key("ci", ["publish"])
    await in_thread(add_api_key, path, key)
    threads = CountingThreads()
    authenticator = TokenAuthenticator(
        SecuritySettings(api_keys_file=path), open_access=False, threads=threads, clock=clock
    )
    await authenticator.load()
    for _ in range(100):
        await authenticator.authenticate(token)
    assert threads.calls == 1
    clock.now += 1
    await authenticator.authenticate(token)
    assert threads.calls == 2


async def test_an_api_key_that_expires(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    token, key = create_api_key("ci", ["publish"], expires=NOW + 5)
    await in_thread(add_api_key, path, key)
    authenticator = await ready(clock, tmp_path, api_keys_file=path)
    assert (await authenticator.authenticate(token)).expires == NOW + 5
    clock.now = NOW + 5.0
    assert await refusal(authenticator, token) == "token: the API key has expired"
    assert await refusal(authenticator, token[:-4] + "AAAA") == "token: the API key is not valid"


@pytest.mark.parametrize("wrong", ["kst_", "kst_abc_def", "kst_0123456789ab_short", "kst_0123456789AB_" + "a" * 43])
async def test_malformed_api_keys(clock: Clock, tmp_path: Path, wrong: str) -> None:
    authenticator = await ready(clock, tmp_path, jwt_secret=SECRET)
    assert await refusal(authenticator, wrong) == "token: the API key is not valid"


async def test_secrets_are_compared_in_constant_time_known_or_not(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.jsonl"
    token, key = create_api_key("ci", ["publish"])
    await in_thread(add_api_key, path, key)
    authenticator = await ready(clock, tmp_path, api_keys_file=path)
    compared: list[tuple[int, int]] = []
    genuine = secrets_module.hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return genuine(a, b)

    monkeypatch.setattr(secrets_module.hmac, "compare_digest", spy)
    await authenticator.authenticate(token)
    await refusal(authenticator, token[:-4] + "AAAA")
    await refusal(authenticator, "kst_000000000000_" + "a" * 43)
    assert compared == [(32, 32)] * 3


def line(**changed: Any) -> str:
    _, key = create_api_key("ci", ["publish"])
    record = {"id": key.id, "hash": key.hash, "principal": "ci", "roles": ["publish"]}
    return json.dumps({name: value for name, value in (record | changed).items() if value is not ...})


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("not json", "JSON is malformed"),
        (line(roles=["root"]), "Invalid enum value 'root'"),
        (line(hash=...), "Object missing required field `hash`"),
        (line(hash="plain-text-secret"), "hash: expected blake2b"),
        (line(id="short"), "id: expected 12 hexadecimal digits"),
        (line(expire=1), "Object contains unknown field `expire`"),
        (line(principal=""), "principal: expected a name"),
    ],
)
async def test_a_bad_line_stops_the_start_and_later_costs_that_key_alone(
    clock: Clock, tmp_path: Path, bad: str, says: str
) -> None:
    path = tmp_path / "keys.jsonl"
    token, key = create_api_key("ci", ["publish"])
    path.write_text(f"# keys\n\n{bad}\n")
    with pytest.raises(SettingsError) as caught:
        await ready(clock, tmp_path, api_keys_file=path)
    assert f"KIMERA_SECURITY__API_KEYS_FILE: line 3 of the file of API keys: {says}" in str(caught.value)
    assert "plain-text-secret" not in str(caught.value)

    path.write_text("# none yet\n")
    authenticator = await ready(clock, tmp_path, api_keys_file=path)
    path.write_text(f"{bad}\n")
    await in_thread(add_api_key, path, key)
    clock.now += 1
    assert (await authenticator.authenticate(token)).id == "ci"


async def test_the_same_id_twice_stops_the_start(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    _, key = create_api_key("ci", ["publish"])
    await in_thread(add_api_key, path, key)
    await in_thread(add_api_key, path, key)
    with pytest.raises(SettingsError, match=r"line 2 of the file of API keys: the id '[0-9a-f]{12}' is there twice"):
        await ready(clock, tmp_path, api_keys_file=path)


@pytest.mark.parametrize(("principal", "roles"), [("", ["publish"]), ("  ", ["publish"]), ("ci", []), ("ci", ["root"])])
def test_keys_that_are_not_made(principal: str, roles: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        create_api_key(principal, roles)


@given(st.text(max_size=50), st.text(max_size=50))
def test_hashes_verify_their_own_secret_alone(secret: str, other: str) -> None:
    stored = hash_secret(secret)
    assert verify_secret(secret, stored)
    assert verify_secret(other, stored) is (other == secret)
    assert hash_secret(secret) != stored
    assert not verify_secret(secret, None)
    assert not verify_secret(secret, "blake2b$00$00")


async def test_tokens_are_never_logged(clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.jsonl"
    token, key = create_api_key("ci", ["publish"])
    await in_thread(add_api_key, path, key)
    expired = signed(ED, "EdDSA", exp=1)
    with structlog.testing.capture_logs() as records, caplog.at_level(logging.DEBUG):
        authenticator = await ready(clock, tmp_path, ED, api_keys_file=path, jwt_secret=SECRET)
        await authenticator.authenticate(token)
        for wrong in (expired, token[:-4] + "AAAA", "nonsense"):
            await refusal(authenticator, wrong)
    written = repr(records) + caplog.text
    assert [record["event"] for record in records].count("authentication_refused") == 3
    for hidden in (
        token,
        token.split("_", 2)[2],
        expired,
        expired.split(".")[1],
        expired.split(".")[2],
        SECRET,
        key.hash,
    ):
        assert hidden not in written


# -- transport -------------------------------------------------------------------------------------------------------


def test_where_a_token_is_found() -> None:
    header = {"authorization": "bEaReR  abc.def"}
    assert extract_token() is None
    assert extract_token({}) is None
    assert extract_token(header) == "abc.def"
    assert extract_token({}, ["kimera.v1.json", "kimera.token.xyz"]) == "xyz"
    assert extract_token(header, ["kimera.token.xyz"]) == "abc.def"
    assert extract_token(header, ["kimera.token.xyz"], "from-connect") == "from-connect"
    assert extract_token({}, ["kimera.token."]) is None
    assert split_subprotocols(["kimera.token.xyz", "kimera.v1.msgpack"]) == (["kimera.v1.msgpack"], "xyz")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer a b", "abc"])
def test_other_authorization_headers_are_refused_without_repeating_them(header: str) -> None:
    with pytest.raises(UnauthorizedError, match="expected `Authorization: Bearer TOKEN`") as caught:
        extract_token({"authorization": header})
    assert "dXNlcjpwYXNz" not in str(caught.value)


def test_two_tokens_as_subprotocols_are_refused() -> None:
    with pytest.raises(UnauthorizedError, match="one token at most"):
        extract_token({}, ["kimera.token.a", "kimera.token.b"])


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "expected"),
    [
        (None, "kimera.example", [], True),
        ("https://kimera.example", "kimera.example", [], True),
        ("https://kimera.example", "kimera.example:443", [], True),
        ("http://127.0.0.1:8765", "127.0.0.1:8765", [], True),
        ("http://[::1]:8765", "[::1]:8765", [], True),
        ("http://LOCALHOST:8765", "localhost:8765", [], True),
        ("http://localhost:3000", "localhost:8765", [], False),
        ("https://evil.example", "kimera.example", [], False),
        ("https://kimera.example.evil", "kimera.example", [], False),
        ("https://evil.example", "kimera.example", ["https://app.example"], False),
        ("https://app.example", "kimera.example", ["https://app.example:443"], True),
        ("https://APP.example", "kimera.example", ["https://app.example"], True),
        ("http://app.example", "kimera.example", ["https://app.example"], False),
        ("https://app.example:444", "kimera.example", ["https://app.example"], False),
        ("https://any.example", "kimera.example", ["*"], True),
        ("null", "kimera.example", [], False),
        ("null", "kimera.example", ["null"], True),
        ("null", "null", [], False),
        ("", "kimera.example", [], False),
        ("https://", "", [], False),
        ("https://a.example:port", "a.example:port", [], False),
        ("https://[broken", "[broken", [], False),
        ("https://kimera.example", None, [], False),
        ("https://evil.example", "x@evil.example", [], False),
    ],
)
def test_origins(origin: str | None, host: str | None, allowed: list[str], expected: bool) -> None:
    assert origin_allowed(origin, host, allowed) is expected


@pytest.mark.parametrize(
    ("host", "bound", "expected"),
    [
        ("127.0.0.1:8765", "127.0.0.1", True),
        ("localhost:8765", "127.0.0.1", True),
        ("[::1]:8765", "::1", True),
        ("evil.example:8765", "127.0.0.1", False),
        (None, "127.0.0.1", False),
        ("", "localhost", False),
        ("127.0.0.1@evil.example", "127.0.0.1", False),
        ("anything.example", "0.0.0.0", True),
    ],
)
def test_a_loopback_server_is_called_by_a_loopback_name(host: str | None, bound: str, expected: bool) -> None:
    assert host_allowed(host, bound) is expected
