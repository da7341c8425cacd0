"""What the configuration parser says of a value of the wrong type, in the user's words."""

from __future__ import annotations

import re

_EXPECTED = re.compile(
    r"(?:- )?Expected a (?:<class '(?P<kind>int|float|bool|str|list|dict|NoneType)'>"
    r"|typing\.Literal\[(?P<choices>.*)\])(?:\. Got value: (?P<value>.*))?"
)
_FRAME = re.compile(
    r"(?:- )?(?:Does not validate against any of the Union subtypes|Subtypes: .*|Errors:"
    r"|Problem with given class_path .*|Given value type: .*)?"
)
_KEY = re.compile(r'Parser key "([\w.]+)":?')
_GIVEN = re.compile(r"Given value: (.*)")
_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


def wrong_type(text: str) -> tuple[str, str, str] | None:
    """Take a message about types apart.

    Args:
        text: of the parser, with the types it tried and the value it was given.

    Returns:
        The key in full, the value, and what would have been accepted; None if the message says
        something else.
    """
    keys: list[str] = []
    allowed: dict[str, int] = {}  # text -> how far its line is indented
    inner = 0  # indentation of the last key: what stands left of it is said of a key around it
    value: str | None = None
    for raw in text.splitlines():
        line = raw.strip()
        indented = len(raw) - len(raw.lstrip())
        expected, key, given = _EXPECTED.fullmatch(line), _KEY.match(line), _GIVEN.fullmatch(line)
        if expected is not None:
            name = expected["choices"] or _NAMES[expected["kind"]]
            allowed[name] = max(indented, allowed.get(name, 0))
            value = value or expected["value"]
        elif key is not None:
            keys.append(key[1])
            inner = indented
            rest = line[key.end() :].strip().lstrip(":").strip()
            if rest and not _FRAME.fullmatch(rest) and not _EXPECTED.fullmatch(rest):
                return None
        elif given is not None:
            value = value or given[1]  # that of the innermost comes first
        elif not _FRAME.fullmatch(line):
            return None
    own = [name for name, indented in allowed.items() if indented >= inner]
    if not (keys and own and value):
        return None
    return ".".join(keys), value, ", ".join(sorted(own, key="null".__eq__))
