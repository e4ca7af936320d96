"""Settings: what is read, what is refused and how that reads, what is shown."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.infrastructure import settings_docs
from kimera_stream.infrastructure.secrets import MASK, mask_url
from kimera_stream.infrastructure.settings import (
    Problem,
    Settings,
    SettingsError,
    access_is_open,
    check_environment,
    check_files,
    config_check,
    config_show,
    database_url,
    is_loopback,
    load_settings,
    masked,
    node_name,
    read_settings,
)
from kimera_stream.infrastructure.settings_loading import variables

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cret-that-must-never-be-seen-in-any-message"


def load(**environ: str) -> Settings:
    return load_settings(environ, None)


def refusal(**environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, None)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- reading ---------------------------------------------------------------------------------------------------------


def test_defaults_without_any_variable() -> None:
    assert load() == Settings()


def test_values_are_read_into_their_groups() -> None:
    settings = load(
        KIMERA_API__PORT="0",
        kimera_api__dashboard="false",
        KIMERA_STREAM__TICK="0.5",
        KIMERA_SECURITY__ALLOWED_ORIGINS='["https://a.example"]',
        KIMERA_PATHS__DATA_DIR="/srv/data",
        KIMERA_SCORING__THRESHOLD="0.75",
        OTHER__VARIABLE="ignored",
    )
    assert settings.api.port == 0
    assert settings.api.dashboard is False
    assert settings.stream.tick == 0.5
    assert settings.security.allowed_origins == ["https://a.example"]
    assert settings.paths.data_dir == Path("/srv/data")
    assert settings.scoring.threshold == 0.75


def test_built_directly_they_do_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMERA_API__PORT", "1")
    assert Settings().api.port == 8765
    assert load_settings(env_file=None).api.port == 1


def test_environment_goes_before_the_file_and_empty_counts_as_not_set(tmp_path: Path) -> None:
    file = tmp_path / "some.env"
    file.write_text("# comment\nKIMERA_API__PORT=1\nexport KIMERA_API__HOST='::1'\nKIMERA_NODE=\nPOSTGRES_DB=other\n")
    read = read_settings({"KIMERA_API__PORT": "2", "KIMERA_SECURITY__JWT_KEY_FILE": " "}, file)
    assert read.settings.api.port == 2
    assert read.settings.api.host == "::1"
    assert read.settings.security.jwt_key_file is None
    assert read.origins["KIMERA_API__PORT"] == "environment"
    assert read.origins["KIMERA_API__HOST"] == "env file"
    assert read.origins["KIMERA_NODE"] == "default"


def test_default_env_file_may_be_missing_but_a_named_one_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({}) == Settings()
    (tmp_path / ".env").write_text("KIMERA_NODE=here\n")
    assert load_settings({}).node == "here"
    with pytest.raises(SettingsError, match=r"absent\.env: cannot be read \(no such file or directory\)"):
        load_settings({}, "absent.env")


def test_secret_from_a_file_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"postgresql+asyncpg://u:{SECRET}@db/kimera\n")
    read = read_settings({"KIMERA_DATABASE__URL_FILE": str(file)}, None)
    assert database_url(read.settings).endswith("@db/kimera")
    assert read.origins["KIMERA_DATABASE__URL"] == "secret file"
    assert "KIMERA_DATABASE__URL is given as well" in refusal(
        KIMERA_DATABASE__URL_FILE=str(file), KIMERA_DATABASE__URL="sqlite+aiosqlite:///x"
    )
    assert "cannot be read" in refusal(KIMERA_DATABASE__URL_FILE=str(tmp_path / "absent"))
    assert "there is no such setting" in refusal(KIMERA_API__PORT_FILE=str(file))


def test_values_are_read_only() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.api.port = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.node = "x"


# -- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("KIMERA_API__PORT", "eighty", "'eighty' is not allowed; expected an integer from 0 to 65535"),
        ("KIMERA_API__PORT", "65536", "'65536' is not allowed; expected an integer from 0 to 65535"),
        ("KIMERA_ENVIRONMENT", "prod", "'prod' is not allowed; expected one of development, staging, production"),
        ("KIMERA_STREAM__TICK", "-1", "expected a number from 0 to 1"),
        ("KIMERA_STREAM__PING_INTERVAL", "0", "expected a number above 0"),
        ("KIMERA_STREAM__PING_INTERVAL", "inf", "expected a number above 0"),
        ("KIMERA_SCORING__THRESHOLD", "nan", "expected a number from 0 to 1, or nothing"),
        ("KIMERA_API__DASHBOARD", "perhaps", "expected true or false"),
        ("KIMERA_API__MAX_COMMAND_BYTES", "10", "expected an integer of at least 1024"),
        ("KIMERA_SECURITY__ALLOWED_ORIGINS", "https://a.example", 'expected a JSON list of texts, as in ["a", "b"]'),
        ("KIMERA_SECURITY__ALLOWED_ORIGINS", '["a", 1]', 'expected a JSON list of texts, as in ["a", "b"]'),
        ("KIMERA_SECURITY__ALLOWED_ORIGINS", '{"a": 1}', 'expected a JSON list of texts, as in ["a", "b"]'),
    ],
)
def test_a_wrong_value_is_one_line_with_variable_value_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    text = refusal(**{variable: value})
    assert text.startswith(f"{variable}: ")
    assert allowed in text
    assert value in text


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("KIMERA_API_PORT", "KIMERA_API__PORT"),
        ("KIMERA_DATABSE__URL", "KIMERA_DATABASE__URL"),
        ("KIMERA_EMBEDDING__DEVCE", "KIMERA_EMBEDDING__DEVICE"),
    ],
)
def test_unknown_variable_gets_a_near_match(variable: str, meant: str) -> None:
    assert refusal(**{variable: "1"}) == f"{variable}: there is no such setting; did you mean {meant}?"


def test_unknown_variable_without_a_near_match_and_whole_groups() -> None:
    assert "see docs/settings.md" in refusal(KIMERA_FLUX_CAPACITOR="1.21")
    assert "there is no such setting" in refusal(KIMERA_API='{"port": 1}')


def test_variables_of_tests_client_and_build_are_left_alone() -> None:
    load(KIMERA_TEST_POSTGRES_URL="x", KIMERA_CLIENT_TOKEN="y", KIMERA_BUILD_EXT="force")


def test_all_problems_are_kept_and_the_others_named() -> None:
    with pytest.raises(SettingsError) as caught:
        load(KIMERA_API__PORT="x", KIMERA_STREAM__TICK="y", KIMERA_NOPE="z")
    assert {problem.variable for problem in caught.value.problems} == {
        "KIMERA_API__PORT",
        "KIMERA_STREAM__TICK",
        "KIMERA_NOPE",
    }
    assert str(caught.value).endswith("(also wrong: KIMERA_API__PORT, KIMERA_STREAM__TICK)")


def test_secrets_are_masked_in_every_refusal() -> None:
    texts = [
        refusal(KIMERA_SECURITY__JWT_SECRET=SECRET[:10]),
        refusal(KIMERA_DATABASE__URL=f"mysql://u:{SECRET}@h/d"),
        refusal(KIMERA_BUS__URL=f"http://:{SECRET}@h"),
        refusal(KIMERA_EMBEDDING__API_KEY=SECRET, KIMERA_API__PORT="x"),
    ]
    assert all(SECRET not in text and SECRET[:10] not in text for text in texts)
    assert MASK in texts[0]
    assert f"mysql://u:{MASK}@h/d" in texts[1]


@given(st.text(max_size=300))
def test_any_value_of_any_kind_is_one_bounded_line(value: str) -> None:
    for name in ("KIMERA_API__PORT", "KIMERA_ENVIRONMENT", "KIMERA_API__TRUSTED_PROXIES", "KIMERA_STREAM__TICK"):
        text = refused(name, value)
        if text is not None:
            assert len(text.splitlines()) == 1
            assert text.startswith(f"{name}: ")
            assert len(text) < 1_000


def refused(name: str, value: str) -> str | None:
    try:
        read_settings({name: value}, None)
    except SettingsError as error:
        return str(error)
    return None


# -- together --------------------------------------------------------------------------------------------------------

SAFE = {
    "KIMERA_ENVIRONMENT": "production",
    "KIMERA_PATHS__DATA_DIR": "/var/lib/kimera-stream",
    "KIMERA_SECURITY__API_KEYS_FILE": "/etc/kimera/keys.jsonl",
}


def test_production_with_what_it_needs_is_accepted() -> None:
    assert load(**SAFE).environment == "production"


@pytest.mark.parametrize("environment", ["staging", "production"])
@pytest.mark.parametrize(
    ("changed", "says", "next_step"),
    [
        ({"KIMERA_SECURITY__AUTH": "none"}, "KIMERA_SECURITY__AUTH: 'none' is not allowed in", "set it to required"),
        (
            {"KIMERA_SECURITY__API_KEYS_FILE": ""},
            "there is nothing to check tokens against",
            "set KIMERA_SECURITY__API_KEYS_FILE",
        ),
        ({"KIMERA_PATHS__DATA_DIR": "data"}, "KIMERA_PATHS__DATA_DIR: 'data' depends on where", "set an absolute path"),
        (
            {"KIMERA_SECURITY__JWT_SECRET": "x" * 31, "KIMERA_SECURITY__JWT_ISSUER": "i"},
            f"KIMERA_SECURITY__JWT_SECRET: {MASK} has 31 bytes; expected at least 32",
            "openssl rand",
        ),
        (
            {"KIMERA_SECURITY__JWT_KEY_FILE": "/k.pem"},
            "KIMERA_SECURITY__JWT_ISSUER: is empty",
            "set it to the `iss` of your tokens",
        ),
        ({"KIMERA_SECURITY__ALLOWED_ORIGINS": '["*"]'}, "'*' is not allowed in", "list the origins you serve"),
    ],
)
def test_deployments_refuse_what_is_right_in_development_only(
    environment: str, changed: dict[str, str], says: str, next_step: str
) -> None:
    text = refusal(**SAFE | {"KIMERA_ENVIRONMENT": environment} | changed)
    assert says in text
    assert next_step in text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"KIMERA_SECURITY__JWT_ALGORITHMS": '["none"]'}, "'none' is not allowed"),
        ({"KIMERA_SECURITY__JWT_ALGORITHMS": '["HS256"]'}, "'HS256' needs a shared secret"),
        (
            {"KIMERA_SECURITY__JWT_ALGORITHMS": "[]", "KIMERA_SECURITY__JWT_KEY_FILE": "k"},
            "none of them goes with KIMERA_SECURITY__JWT_KEY_FILE",
        ),
        ({"KIMERA_API__TLS_KEY": "k"}, "KIMERA_API__TLS_CERTIFICATE: is missing"),
        ({"KIMERA_API__TLS_CERTIFICATE": "c"}, "KIMERA_API__TLS_KEY: is missing"),
        ({"KIMERA_SECURITY__ALLOWED_ORIGINS": '["a.example"]'}, "'a.example' is no origin"),
        ({"KIMERA_SECURITY__ALLOWED_ORIGINS": '["https://a.example/"]'}, "'https://a.example/' is no origin"),
        ({"KIMERA_DATABASE__URL": "sqlite:///x"}, "expected sqlite+aiosqlite:///FILE"),
        ({"KIMERA_EMBEDDING__PROVIDER": "http"}, "KIMERA_EMBEDDING__URL: '' is not allowed with the provider http"),
        ({"KIMERA_EMBEDDING__DIMENSION": "128"}, "KIMERA_EMBEDDING__DIMENSION: 128 is not allowed: minilm has 384"),
        ({"KIMERA_SECURITY__AUTH": "none", "KIMERA_API__HOST": "0.0.0.0"}, "public address '0.0.0.0'"),
        ({"KIMERA_API__HOST": "0.0.0.0"}, "set KIMERA_API__HOST=127.0.0.1"),
        ({"KIMERA_SECURITY__AUTH": "required"}, "authentication is required, and there is nothing to check"),
    ],
)
def test_combinations_refused_everywhere(changed: dict[str, str], says: str) -> None:
    assert says in refusal(**changed)


def test_advice_does_not_stop_the_start() -> None:
    environ = SAFE | {"KIMERA_API__HOST": "0.0.0.0", "KIMERA_TELEMETRY__LOG_LEVEL": "debug"}
    settings = load(**environ)
    problems = check_environment(settings)
    assert [(problem.variable, problem.fatal) for problem in problems] == [
        ("KIMERA_API__TLS_CERTIFICATE", False),
        ("KIMERA_TELEMETRY__LOG_LEVEL", False),
    ]
    assert all(problem.next_step for problem in problems)


@pytest.mark.parametrize(
    ("environment", "host", "auth", "is_open"),
    [
        ("development", "127.0.0.1", "auto", True),
        ("development", "::1", "auto", True),
        ("development", "localhost", "none", True),
        ("development", "127.0.0.1", "required", False),
        ("development", "0.0.0.0", "auto", False),
        ("development", "0.0.0.0", "none", False),
        ("staging", "127.0.0.1", "auto", False),
        ("production", "127.0.0.1", "none", False),
    ],
)
def test_access_is_open_only_in_development_on_a_loopback_address(
    environment: str, host: str, auth: str, is_open: bool
) -> None:
    settings = load_settings(
        {"KIMERA_ENVIRONMENT": environment, "KIMERA_API__HOST": host, "KIMERA_SECURITY__AUTH": auth}, None, check=False
    )
    assert access_is_open(settings) is is_open


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("localhost", True),
        ("", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_files_that_cannot_be_read_are_found_by_config_check(tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    environ = {"KIMERA_SECURITY__API_KEYS_FILE": str(keys)}
    (problem,) = config_check(environ, None)
    assert problem.variable == "KIMERA_SECURITY__API_KEYS_FILE"
    assert "no file that this user can read" in problem.line
    keys.touch()
    assert config_check(environ, None) == []
    assert check_files(load(**environ)) == []
    (wrong,) = config_check({"KIMERA_API__PORT": "x"}, None)
    assert wrong.line == "KIMERA_API__PORT: 'x' is not allowed; expected an integer from 0 to 65535"


def test_a_problem_is_one_line() -> None:
    assert Problem("V", "is\nwrong", "do\nthis").line == "V: is wrong; do this"


# -- resolved and shown ----------------------------------------------------------------------------------------------


def test_database_url_and_node_have_defaults(tmp_path: Path) -> None:
    assert database_url(load(KIMERA_PATHS__DATA_DIR="/srv/d")) == "sqlite+aiosqlite:////srv/d/kimera.sqlite3"
    assert database_url(load()).startswith("sqlite+aiosqlite:////")
    assert node_name(load(KIMERA_NODE="n1")) == "n1"
    assert node_name(load())


def test_nothing_secret_is_shown() -> None:
    environ = {
        "KIMERA_SECURITY__JWT_SECRET": SECRET,
        "KIMERA_EMBEDDING__API_KEY": SECRET,
        "KIMERA_EMBEDDING__URL": f"https://u:{SECRET}@e.example/v1",
        "KIMERA_DATABASE__URL": f"postgresql+asyncpg://u:{SECRET}@db:5432/kimera?password={SECRET}&ssl=require",
    }
    settings = load(**environ)
    shown = masked(settings)
    assert SECRET not in repr(shown)
    assert SECRET not in repr(settings)
    assert shown["security"]["jwt_secret"] == MASK
    assert shown["database"]["url"] == f"postgresql+asyncpg://u:{MASK}@db:5432/kimera?password={MASK}&ssl=require"
    lines = config_show(environ, None)
    assert SECRET not in "\n".join(lines)
    assert [f"KIMERA_SECURITY__JWT_SECRET={MASK}", "#", "environment"] in [line.split() for line in lines]


def test_a_bus_between_nodes_needs_a_database_that_they_share() -> None:
    for database in ("", "sqlite+aiosqlite:///here.db"):
        with pytest.raises(SettingsError, match=r"KIMERA_BUS__URL: .*PostgreSQL") as refused:
            load(KIMERA_BUS__URL=f"redis://:{SECRET}@cache/0", KIMERA_DATABASE__URL=database)
        assert SECRET not in str(refused.value)
    url = "postgresql+asyncpg://db/kimera"
    assert load(KIMERA_BUS__URL="redis://cache/0", KIMERA_DATABASE__URL=url, KIMERA_ROLE="edge").role == "edge"


def test_first_results_outlive_the_wait_for_an_answer() -> None:
    url = "postgresql+asyncpg://db/kimera"
    with pytest.raises(SettingsError, match=r"KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW: .*60"):
        load(KIMERA_BUS__URL="redis://cache/0", KIMERA_DATABASE__URL=url, KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW="59")
    assert load(KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW="1").performance.idempotency_window == 1


@pytest.mark.parametrize("later", ["LEASE", "CLAIM_AFTER"])
def test_a_wait_that_ends_before_work_is_taken_over_is_warned_of(later: str) -> None:
    environ = {
        "KIMERA_BUS__URL": "redis://cache/0",
        "KIMERA_DATABASE__URL": "postgresql+asyncpg://db/kimera",
        "KIMERA_BUS__ANSWER_WITHIN": "8",
    }

    def warned(**changes: str) -> list[str]:
        return [problem.variable for problem in check_environment(load(**environ, **changes)) if not problem.fatal]

    assert "KIMERA_BUS__ANSWER_WITHIN" not in warned()
    assert "KIMERA_BUS__ANSWER_WITHIN" in warned(**{f"KIMERA_BUS__{later}": "8"})


@pytest.mark.parametrize("role", ["edge", "engine"])
def test_a_part_of_a_node_is_no_node_without_a_bus(role: str) -> None:
    with pytest.raises(SettingsError, match=r"KIMERA_ROLE: .*no bus"):
        load(KIMERA_ROLE=role)
    assert load(KIMERA_ROLE="all").role == "all"


def test_config_show_has_a_line_for_every_setting_and_its_origin() -> None:
    lines = config_show({"KIMERA_API__PORT": "1"}, None)
    by_name = {line.split("=")[0]: line for line in lines}
    assert set(by_name) == set(variables())
    assert by_name["KIMERA_API__PORT"].split() == ["KIMERA_API__PORT=1", "#", "environment"]
    assert by_name["KIMERA_API__DASHBOARD"].split() == ["KIMERA_API__DASHBOARD=true", "#", "default"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("sqlite+aiosqlite:///relative.db", "sqlite+aiosqlite:///relative.db"),
        ("sqlite+aiosqlite:////srv/a.db", "sqlite+aiosqlite:////srv/a.db"),
        ("https://user@host/path?x=1", "https://user@host/path?x=1"),
        ("https://user:p%40ss@host", f"https://user:{MASK}@host"),
        ("https://user:a@b@host", f"https://user:{MASK}@host"),
        ("not a url", MASK),
        ("https://[broken", MASK),
    ],
)
def test_mask_url(url: str, shown: str) -> None:
    assert mask_url(url) == shown


# -- documents and templates -----------------------------------------------------------------------------------------


def test_reference_is_the_generated_one() -> None:
    stored = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert stored == settings_docs.render(), (
        "run: python -m kimera_stream.infrastructure.settings_docs > docs/settings.md"
    )


def test_reference_names_every_setting_with_a_description() -> None:
    for variable in variables().values():
        assert variable.description.strip(), variable.name
        assert f"`{variable.name}`" in settings_docs.render()


def test_the_generator_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kimera_stream.infrastructure.settings_docs"], capture_output=True, check=True, cwd=ROOT
    )
    assert result.stdout.decode() == settings_docs.render()


@pytest.mark.parametrize("environment", ["development", "staging", "production"])
def test_template_is_fit_to_start(environment: str) -> None:
    settings = load_settings({}, ROOT / "deploy" / "env" / f"{environment}.env")
    assert settings.environment == environment
    assert check_environment(settings) == []
    assert access_is_open(settings) is (environment == "development")


@pytest.mark.parametrize("environment", ["development", "staging", "production"])
def test_what_a_template_offers_in_comments_exists(environment: str) -> None:
    text = (ROOT / "deploy" / "env" / f"{environment}.env").read_text()
    offered = [line[2:].split("=")[0] for line in text.splitlines() if line.startswith("# KIMERA_") and "=" in line]
    assert all(name in variables() or name.removesuffix("_FILE") in variables() for name in offered)
    assert offered
