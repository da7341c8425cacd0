"""Errors of the configuration parser in plprune's words."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, get_args

from plprune.errors import ConfigError, PlpruneError
from plprune.lit.wrong_types import wrong_type

_UNKNOWN = re.compile(r"(?:does not accept option|unrecognized arguments:|Key) '?(?:--)?([\w.]+)")
_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '?([\w.]+)")
_CLASS = re.compile(r"(?:class_path|Expected a dot import path string:) '?([\w.]+)'?")
_OPTION = re.compile(
    r"class_path '([\w.]+)':\s*"
    r"(?:Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+))"
)
_KEY = re.compile(r'Parser key "([\w.]+)"')
_TYPES = re.compile(r"Subtypes: (.*)")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Set by launchers of several processes: torchrun, Lightning, SLURM."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting, and takes no prefix for an option."""

    def __init__(self, **settings: Any) -> None:
        """Make a parser.

        Args:
            settings: of `argparse.ArgumentParser`.
        """
        super().__init__(**{"allow_abbrev": False, **settings})

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
    key = _KEY.search(text)
    if key is None:
        group, unknown = _GROUP.search(text), _UNKNOWN.search(text)
        if group is not None or unknown is not None:
            name = _joined(*group.groups()) if group is not None else (unknown or [""])[1]
            return _unknown_key(name.removeprefix(f"{command}."), hint, list(keys))
        return ConfigError("cannot read the configuration", given=_reasons(text), fix=hint)
    mistyped = wrong_type(text)
    if mistyped is not None:
        name, value, allowed = mistyped
        return ConfigError(f"cannot use the setting {name}", given=value, allowed=allowed, fix=hint)
    near, option = _nearest_option(key[1], text), _OPTION.search(text)
    if option is not None and near.startswith(key[1]):
        below = f"{key[1]}.init_args" if near.startswith(f"{key[1]}.init_args.") else key[1]
        name = (option[2] or option[3]).removeprefix("init_args.")
        return ConfigError(
            "unknown key", given=f"{below}.{name}", fix=f"did you mean {near}? {hint}"
        )
    near = near or _nearest_class(text)
    reasons = _reasons(text)
    if _CLASS.search(reasons) is not None:
        hint = f"check the spelling of class_path and of its init_args; {hint}"
    return ConfigError(
        f"cannot use the setting {key[1]}",
        given=reasons,
        fix=(f"did you mean {near}? " if near else "") + hint,
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
        top = name.split(".")[0]
        near = [] if top in tops else difflib.get_close_matches(top, tops, n=1, cutoff=0.75)
        # Or it is right, and what it belongs to is left out.
        whole = [key for key in keys if key.endswith(f".{top}")] if not near else []
        near = near or ([whole[0] + name.removeprefix(top)] if len(whole) == 1 else [])
    return ConfigError(
        "unknown key",
        given=name,
        fix=(f"did you mean {near[0]}? " if near else "") + hint,
    )


def _joined(group: str, option: str) -> str:
    """A key in full, whether or not the parser named its group twice."""
    return option if option.startswith(f"{group}.") else f"{group}.{option}"


def _nearest_option(key: str, text: str) -> str:
    """The argument of a class that a key below a setting was meant to be, or nothing."""
    found = _OPTION.search(text)
    kind = _resolved(found[1]) if found is not None else None
    if found is None or kind is None:
        return ""
    first, _, rest = (found[2] or found[3]).removeprefix("init_args.").partition(".")
    near = difflib.get_close_matches(first, _parameters(kind), n=1)
    if not near:
        return ""
    # A setting of one fixed class has its arguments right below, others below init_args.
    below = key if kind in _declared(text) else f"{key}.init_args"
    below = "init_args" if "Subtypes: [list[" in text else below  # of which item is not said
    return f"{below}.{near[0]}" + (f".{rest}" if rest else "")


def _nearest_class(text: str) -> str:
    """The known class of the right type that a class_path was meant to be, or nothing."""
    wrong = _CLASS.search(text)
    if wrong is None or _resolved(wrong[1]) is not None:
        return ""
    known = {
        one.__name__: f"{one.__module__}.{one.__qualname__}"
        for kind in _declared(text)
        for one in _concrete(kind)
    }
    near = difflib.get_close_matches(wrong[1].rpartition(".")[2], known, n=1)
    return known[near[0]] if near else ""


def _declared(text: str) -> list[type]:
    """Classes that a setting takes, from the parser's list of types."""
    types = _TYPES.search(text)
    found = [_resolved(name) for name in _DOTTED.findall(types[1])] if types else []
    return [kind for kind in found if kind is not None]


def _resolved(path: str) -> type | None:
    """The class at a dotted path; the parser has imported what exists."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _concrete(kind: type) -> Iterator[type]:
    """A class and what was derived from it, without abstract ones."""
    if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
        yield kind
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        yield from _concrete(child)


def _parameters(kind: type) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name != "self"]


def _reasons(text: str) -> str:
    """The lines of a message that say why, without the list of types and the whole value."""
    body = _KEY.sub("", text, count=1).lstrip(": \n")
    if "Errors:" in body:
        body = body.split("Errors:", 1)[1].split("Given value type:", 1)[0]
    lines = dict.fromkeys(line.strip().removeprefix("- ") for line in body.splitlines())
    return " ".join(line for line in lines if line and "<class 'NoneType'>" not in line)


def known_keys(parser: Any) -> list[str]:
    """Dotted names of all settings of a parser, and of the arguments of plprune's classes below.

    Args:
        parser: an argparse parser.
    """
    keys: dict[str, None] = {}  # a set that keeps its order
    for action in parser._actions:
        name = action.dest
        if not action.option_strings or name.split(".")[-1] in ("help", "print_config"):
            continue
        keys[name] = None
        kinds = getattr(action, "_typehint", None)
        for kind in (kinds, *get_args(kinds)):
            if isinstance(kind, type) and kind.__module__.startswith("plprune."):
                names = (n for one in _concrete(kind) for n in _parameters(one))
                keys.update(dict.fromkeys(f"{name}.{n}" for n in names))
    return list(keys)


def is_first_process() -> bool:
    """Whether this process should speak for a run of several: the first, or the only one."""
    return all(os.environ.get(name) in (None, "", "0") for name in _RANKS)
