"""Configuration files: YAML mappings, checked one by one so that a message can name the file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plprune.errors import ConfigError

_SECTIONS = ("trainer", "model", "data", "prune", "lora", "monitor", "report", "export")


def read_config(name: str) -> dict[str, Any]:
    """A configuration file.

    Args:
        name: path of a YAML file.

    Returns:
        Its keys and values.

    Raises:
        ConfigError: if there is no such file, or it holds no mapping.
    """
    import yaml

    path = Path(name).expanduser()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(
            "a configuration is read more than once, by every process",
            given=f"{name}, which can be read only once",
            allowed="a YAML file",
            fix="write it to a file",
        )
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        near = (
            sorted(p.name for p in path.parent.glob("*.yaml"))[:5] if path.parent.is_dir() else []
        )
        raise ConfigError(
            "cannot read the configuration file",
            given=f"{name} ({error.strerror})",
            allowed="a YAML file" + (f"; in its folder are {', '.join(near)}" if near else ""),
            fix="check the path",
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        place = getattr(error, "problem_mark", None)
        line = "" if place is None else f", line {place.line + 1}, column {place.column + 1}"
        why = getattr(error, "problem", None) or "not UTF-8 text"
        raise ConfigError(
            "the configuration file is not YAML",
            given=f"{name}{line}: {why}",
            allowed="lines such as `key: value`, indented by spaces",
            fix="mend that line",
        ) from error
    if not isinstance(value, dict):
        found = "an empty file" if value is None else f"a {type(value).__name__}"
        raise ConfigError(
            "not a configuration",
            given=f"{name}, {found}",
            allowed="a YAML mapping of keys to values",
            fix="see configs/recipes for examples",
        )
    return value


def require_spelled(config: Mapping[str, Any], name: str) -> None:
    """Refuse sections whose names look like a known one: nobody would read them.

    Other names may belong to a command line of the user's own.

    Args:
        config: of a file.
        name: of the file, for the message.

    Raises:
        ConfigError: naming the section.
    """
    for key in config:
        near = difflib.get_close_matches(str(key), _SECTIONS, n=1, cutoff=0.7)
        if near and key not in _SECTIONS:
            raise ConfigError(
                "unknown key",
                given=f"{key} in {name}",
                allowed=", ".join(_SECTIONS),
                fix=f"did you mean {near[0]}?",
            )


def require_configs(args: Sequence[str]) -> None:
    """Refuse files of `--config` that cannot be used, before a parser words it without their names.

    Args:
        args: a command line.

    Raises:
        ConfigError: naming the file.
    """
    for name in _files(args):
        read_config(name)


def _files(args: Sequence[str]) -> Iterator[str]:
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name = option.removeprefix("--config=") if option.startswith("--config=") else ""
        name = value if option == "--config" else name
        # The parser also takes YAML itself in the place of a file, and addresses of remote files.
        if name and not name.startswith("-") and not set("{\n") & set(name) and "://" not in name:
            yield name
