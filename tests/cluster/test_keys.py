from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.keys import authorization, with_keys


def test_files_variables_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    config = ServeConfig(api_key_file=str(file), admin_read_key="given")
    environ = {"EMOE_API_KEY": "no", "EMOE_ADMIN_API_KEY": "from-variable", "EMOE_ADMIN_READ_KEY": "no"}
    resolved = with_keys(config, environ)
    assert (resolved.api_key, resolved.admin_api_key, resolved.admin_read_key) == (
        "from-file",
        "from-variable",
        "given",
    )
    # an actor on another node must not look for the file
    assert resolved.api_key_file is None
    assert with_keys(resolved, {}) == resolved
    assert authorization(resolved) == {"Authorization": "Bearer given"}
    assert authorization(ServeConfig()) == {}


def test_an_empty_variable_is_none() -> None:
    assert with_keys(ServeConfig(), {"EMOE_API_KEY": ""}).api_key is None


@pytest.mark.parametrize("text", ["", " \n", "two words", "tab\tbed", "clé", "two\nlines"])
def test_keys_that_no_client_could_send(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ConfigError, match="admin_api_key_file"):
        with_keys(ServeConfig(admin_api_key_file=str(file)), {})
    if text:
        with pytest.raises(ConfigError, match="EMOE_API_KEY") as caught:
            with_keys(ServeConfig(), {"EMOE_API_KEY": text})
        assert not text.strip() or text not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key_file: /no/such/file: No such file"):
        with_keys(ServeConfig(api_key_file="/no/such/file"), {})
    with pytest.raises(ConfigError, match="api_key_file"):
        with_keys(ServeConfig(api_key_file=str(tmp_path)), {})
    with pytest.raises(ConfigError, match="given too"):
        with_keys(ServeConfig(api_key="a", api_key_file="/no/such/file"), {})
