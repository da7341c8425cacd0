"""Every folder of tests is collected."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_no_folder_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest passes folders of certain names by without a word; `dist` is one by default."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert Path("dist") in folders
    for folder in folders:
        for name in folder.parts:
            assert not any(fnmatch(name, pattern) for pattern in skipped), f"{folder} is left out"
