"""Text documents from files, folders, hub data sets and the interpreter's own manual.

A source is one string:

- `pydoc`: the topics of Python's help system, which ship with the interpreter; always there, for
  tests and quick tries;
- a `.txt` file (one document), a `.jsonl` or `.parquet` file (a document a row);
- a folder: the files of these kinds in it, by name, not in its sub-folders;
- a hub data set, `id`, `id:split` or `id:name:split` (the split defaults to `train`); it must be
  cached if the machine is offline.

Existing paths win over hub ids.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from plprune.errors import DataError, first_line

PYDOC = "pydoc"
EXTENSIONS = (".txt", ".jsonl", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.+-]+){0,2}")

Rows = Literal["blank_joined", "plain"]
Kind = Literal["pydoc", "file", "folder", "hub"]


def source_kind(source: str) -> Kind:
    """Say what a source is without reading it.

    Raises:
        DataError: a file or folder that does not exist, an extension nobody reads, or a string that
            is no source at all.
    """
    if source == PYDOC:
        return "pydoc"
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder"
    if path.is_file():
        if path.suffix not in EXTENSIONS:
            raise _unusable("unknown kind of text file", source)
        return "file"
    # A mistyped path must not become a question to the hub: what looks like a path is one.
    looks_like_path = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_like_path or path.suffix in EXTENSIONS or re.fullmatch(r"\.[a-z]+", path.suffix):
        raise _unusable("text file or folder not found", source)
    if not HUB_ID.fullmatch(source):
        raise _unusable("not a text source", source)
    return "hub"


def _unusable(what: str, source: str) -> DataError:
    return DataError(
        what,
        given=repr(source),
        allowed=f"an existing {', '.join(EXTENSIONS)} file, a folder of them, {PYDOC!r}, or a hub "
        "data set `id`, `id:split` or `id:name:split`",
        fix="correct the path or name",
    )


def read_texts(source: str, *, text_field: str = "text", rows: Rows = "blank_joined") -> list[str]:
    """Read the documents of a source.

    Args:
        source: see the top of this module.
        text_field: field of `.jsonl`, `.parquet` and hub rows that holds the text. Default "text".
        rows: how a `.txt` file becomes its document. `blank_joined` (default): the lines as
            WikiText rows, see `joined_rows`; `plain`: as it is.

    Returns:
        At least one document that is not empty.

    Raises:
        DataError: the source is missing, unreadable, without the field, or empty.
    """
    kind = source_kind(source)
    if kind == "pydoc":
        from pydoc_data.topics import topics

        return [topics[key] for key in sorted(topics)]
    if kind == "hub":
        texts = _hub_texts(source, text_field)
    else:
        texts = []
        for path in _files(source, kind):
            texts += _file_texts(path, text_field, rows)
    if not any(text.strip() for text in texts):
        raise DataError(
            "the source holds no text",
            given=f"{source!r}, {len(texts)} documents, all blank",
            fix="choose another source or text field",
        )
    return texts


def joined_rows(text: str) -> str:
    r"""WikiText as the papers feed it: the lines as rows, blank ones empty, joined by a blank line.

    >>> joined_rows(" = Title = \n \nOne .\n")
    ' = Title = \n\n\n\n\nOne .\n'
    """
    # Split at \n only: str.splitlines would also split inside lines, at U+2028 for one.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def text_hash(texts: Sequence[str]) -> str:
    """Sha256, in hex, of the texts in UTF-8 with a zero byte between two of them."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def pieces(source: str) -> set[str]:
    """What a source reads: the paths of its files, or its own name.

    Args:
        source: see the top of this module.

    Returns:
        Resolved paths, `pydoc`, or the name of a hub data set with its split.
    """
    kind = source_kind(source)
    if kind in ("file", "folder"):
        return {str(path.resolve()) for path in _files(source, kind)}
    return {source if kind == "pydoc" or ":" in source else f"{source}:train"}


def _files(source: str, kind: Kind) -> list[Path]:
    """Files of a source, sorted by name."""
    path = Path(source).expanduser()
    if kind == "file":
        return [path]
    files = sorted(entry for entry in path.iterdir() if entry.suffix in EXTENSIONS)
    if not files:
        raise _unusable("the folder holds no text file", source)
    return files


def _file_texts(path: Path, text_field: str, rows: Rows) -> list[str]:
    """Documents of one file."""
    try:
        if path.suffix == ".parquet":
            return _parquet_texts(path, text_field)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the text file cannot be read",
            given=f"{path} ({error})",
            allowed="UTF-8 text",
            fix="convert the file",
        ) from error
    if path.suffix == ".txt":
        return [joined_rows(text) if rows == "blank_joined" else text]
    return _jsonl_texts(path, text, text_field)


def _jsonl_texts(path: Path, text: str, text_field: str) -> list[str]:
    """Documents of JSON lines; blank lines are skipped."""
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError("not a line of JSON", given=f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise DataError("a row must be a JSON object", given=f"{where}: {type(row).__name__}")
        texts.append(_field(row, text_field, where))
    return texts


def _field(row: Mapping[str, Any], text_field: str, where: str) -> str:
    """Text of one row."""
    value = row.get(text_field)
    if not isinstance(value, str):
        missing = text_field not in row
        raise DataError(
            f"a row has no text field {text_field!r}",
            given=where if missing else f"{where}: a value of type {type(value).__name__}",
            allowed=f"fields there: {', '.join(sorted(row)) or 'none'}",
            fix="set `text_field`",
        )
    return value


def _column(data: Any, text_field: str, where: str) -> list[str]:
    """Texts of one column of a `datasets.Dataset`."""
    names: Iterable[str] = data.column_names
    if text_field not in names:
        _field(dict.fromkeys(names), text_field, where)
    return [_field({text_field: value}, text_field, where) for value in data[text_field]]


def _parquet_texts(path: Path, text_field: str) -> list[str]:
    """Documents of a parquet file."""
    from datasets import Dataset

    # The reader writes an Arrow copy into its cache: into a folder that goes away, not the user's.
    with tempfile.TemporaryDirectory() as cache:
        try:
            data = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # the reader wraps what it meets in errors of its own
            raise OSError(f"{type(error).__name__}: {first_line(error)}") from error
        return _column(data, text_field, str(path))


def _hub_texts(source: str, text_field: str) -> list[str]:
    """Documents of a hub data set."""
    from datasets import load_dataset

    name, *rest = source.split(":")
    split = rest.pop() if rest else "train"
    try:
        data = load_dataset(name, *rest, split=split)
    except Exception as error:  # many kinds: offline, unknown name, unknown split, ...
        raise DataError(
            "the hub data set cannot be loaded",
            given=f"{source!r} ({type(error).__name__}: {first_line(error)})",
            allowed="a data set that is cached, or a reachable hub",
            fix="check name and split, or use a local file",
        ) from error
    return _column(data, text_field, repr(source))
