"""Settings come from the environment, and a wrong one is told in a line."""

from pathlib import Path

import pytest

from session_sidecar.settings import Settings, SettingsError, memory_bytes


def test_everything_has_a_default() -> None:
    settings = Settings.load({})
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "live")


def test_the_environment_sets_and_an_option_comes_on_top() -> None:
    environ = {"SIDECAR_PORT": "9000", "SIDECAR_HOME": "/data", "PATH": "/bin"}
    assert Settings.load(environ).port == 9000
    assert Settings.load(environ, port=9001, home=None).port == 9001
    assert Settings.load(environ).database_file == Path("/data/sidecar.db")


def test_tags_have_days_of_their_own_or_none() -> None:
    settings = Settings.load({"SIDECAR_RETENTION_TAGS": " checkpoint : 90, on hold:1.5,pinned:never,"})
    assert settings.days_of_tags == {"checkpoint": 90, "on hold": 1.5, "pinned": None}


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"SIDECAR_PORT": "high"}, "SIDECAR_PORT: "),
        ({"SIDECAR_PORT": "70000"}, "SIDECAR_PORT: "),
        ({"SIDECAR_MODEL": "dead"}, "SIDECAR_MODEL: "),
        ({"SIDECAR_PROT": "9000"}, r"SIDECAR_PROT: no such setting; did you mean SIDECAR_PORT\?"),
        ({"SIDECAR_COLOUR": "red"}, "SIDECAR_COLOUR: no such setting; the README lists them all"),
        ({"SIDECAR_PING_SECONDS": "0"}, "SIDECAR_PING_SECONDS: "),
        ({"SIDECAR_RETENTION_TAGS": "pinned"}, "SIDECAR_RETENTION_TAGS: 'pinned' is no tag with its days"),
        ({"SIDECAR_RETENTION_TAGS": "a:b:90"}, "SIDECAR_RETENTION_TAGS: 'a:b:90' is no tag with its days"),
        ({"SIDECAR_RETENTION_TAGS": "a:0"}, "SIDECAR_RETENTION_TAGS: "),
        ({"SIDECAR_RETENTION_TAGS": "a:nan"}, "SIDECAR_RETENTION_TAGS: "),
        ({"SIDECAR_RETENTION_TAGS": ":90"}, "SIDECAR_RETENTION_TAGS: "),
        ({"SIDECAR_RETENTION_TAGS": "a:1,a:never"}, "SIDECAR_RETENTION_TAGS: 'a' is there twice"),
        ({"SIDECAR_WARM_MEMORY": "4GB"}, "SIDECAR_WARM_MEMORY: '4GB' is no size; one is like 4GiB or 512MiB"),
        ({"SIDECAR_WARM_MEMORY": "4294967296"}, "SIDECAR_WARM_MEMORY: '4294967296' is no size"),
        ({"SIDECAR_WARM_MEMORY": "0.5GiB"}, "SIDECAR_WARM_MEMORY: '0.5GiB' is no size"),
        ({"SIDECAR_WARM_MEMORY": "129MiB"}, "SIDECAR_WARM_MEMORY: is less than one process takes, 130MiB"),
    ],
)
def test_a_wrong_setting_or_a_name_that_is_none_is_refused_by_name(environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as caught:
        Settings.load(environ)
    assert "\n" not in str(caught.value)


def test_what_the_command_line_finds_its_sidecar_by_is_no_setting_of_the_server() -> None:
    assert Settings.load({"SIDECAR_URL": "http://localhost:8001", "SIDECAR_TOKEN": "x"}) == Settings.load({})


@pytest.mark.parametrize(
    ("environ", "most"),
    [
        ({}, memory_bytes() // 4),
        ({"SIDECAR_WARM_SESSIONS": "3"}, None),
        ({"SIDECAR_WARM_MEMORY": "512MiB"}, 512 * 2**20),
        ({"SIDECAR_WARM_MEMORY": "4GiB", "SIDECAR_WARM_SESSIONS": "3"}, 4 * 2**30),
    ],
    ids=lambda given: "+".join(given) if isinstance(given, dict) else None,
)
def test_memory_bounds_what_stays_connected_unless_only_a_number_is_given(
    environ: dict[str, str], most: int | None
) -> None:
    assert Settings.load(environ).most_warm_bytes == most
