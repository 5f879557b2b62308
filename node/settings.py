"""The settings file: TOML whose keys are the long flags' names, and the order in which settings win.

flag > SWARMNODE_* environment variable > file > default. The file is --config, else SWARMNODE_CONFIG, else config.toml
in the user's configuration folder. A key nobody knows is an error: a misspelt setting must not silently do nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from ..protocol.errors import ConfigError

MAX_BYTES: Final = 256 * 1024


def default_path() -> Path:
    """Where the settings file is looked for when none is named."""
    import platformdirs

    return Path(platformdirs.user_config_dir("swarmnode")) / "config.toml"


def load(path: Path | None, known: Collection[str]) -> dict[str, object]:
    """The settings in a file, keyed by option name; empty if the default file does not exist.

    Raises ConfigError naming the file and what is wrong with it.
    """
    chosen = path or default_path()
    try:
        text = _read(chosen)
    except FileNotFoundError:
        if path is None:
            return {}
        raise ConfigError(f"there is no settings file {chosen}: check --config") from None
    except OSError as exc:
        raise ConfigError(f"cannot read settings {chosen}: {exc.strerror}; check --config") from exc
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"settings file {chosen} is not valid TOML: {exc}") from exc
    return _checked(values, known, chosen)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"settings file {path} is over {MAX_BYTES} bytes: is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"settings file {path} is not UTF-8 text: {exc.reason}") from exc


def _checked(values: Mapping[str, object], known: Collection[str], path: Path) -> dict[str, object]:
    checked = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"unknown setting {key!r} in {path}: known are {', '.join(sorted(known))}")
        if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"setting {key!r} in {path}: use a text, a number, true or false, or a list of texts")
        checked[name] = value
    return checked
