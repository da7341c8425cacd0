"""Errors of the configuration parser in plprune's words."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from plprune.errors import ConfigError, PlpruneError

_UNKNOWN = re.compile(r"(?:does not accept option|unrecognized arguments:|Key) '?(?:--)?([\w.]+)")
_CLASS = re.compile(r"class_path '?([\w.]+)'?")
_KEY = re.compile(r'Parser key "([\w.]+)"')


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message, fix=f"see {self.prog} --help")


def readable(error: BaseException, command: str, keys: Iterable[str] = ()) -> PlpruneError:
    """One message for what the parser of `fit` refused.

    Args:
        error: from jsonargparse.
        command: as the user calls it, e.g. `fit`.
        keys: keys that exist, to suggest one.

    Returns:
        Our own error if one is at the bottom of it, else a `ConfigError` with the parser's words.
    """
    own = ours(error)
    if own is not None:
        return own
    text = str(error)
    hint = f"plprune {command} --help lists every key"
    unknown = _UNKNOWN.search(text)
    if unknown is not None and "Parser key" not in text:
        return _unknown_key(unknown[1], hint, list(keys))
    key = _KEY.search(text)
    reasons = _reasons(text)
    wrong = _CLASS.search(reasons)
    if wrong is not None:
        hint = f"check the spelling of class_path and of its init_args; {hint}"
    return ConfigError(
        f"cannot use the setting {key[1]}" if key else "cannot read the configuration",
        given=reasons,
        fix=hint,
    )


def ours(error: BaseException | None) -> PlpruneError | None:
    """The error of plprune that another one was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PlpruneError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def is_refused_value(error: BaseException) -> bool:
    """Whether a ValueError is jsonargparse's, about a value that no type accepts."""
    return str(error).startswith("Does not validate against any of the Union subtypes")


def _unknown_key(name: str, hint: str, keys: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    if not near:  # a top-level key that is misspelled takes all keys below it along
        tops = sorted({key.split(".")[0] for key in keys})
        near = difflib.get_close_matches(name.split(".")[0], tops, n=1, cutoff=0.75)
    return ConfigError(
        "unknown key",
        given=name,
        fix=(f"did you mean {near[0]}? " if near else "") + hint,
    )


def _reasons(text: str) -> str:
    """The lines of a message that say why, without the list of types and the whole value."""
    body = _KEY.sub("", text, count=1).lstrip(": \n")
    if "Errors:" in body:
        body = body.split("Errors:", 1)[1].split("Given value type:", 1)[0]
    kept = [line.strip().removeprefix("- ") for line in body.splitlines()]
    return " ".join(line for line in kept if line and "<class 'NoneType'>" not in line)


def known_keys(parser: Any) -> list[str]:
    """Dotted names of all options of a parser.

    Args:
        parser: an argparse parser.
    """
    return [action.dest for action in parser._actions if action.option_strings]
