"""The README says what is true: its table of methods comes from their docstrings, its links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = sorted(
    p for p in (ROOT / "plprune" / "methods").glob("*.py") if p.stem not in ("__init__", "base")
)


def row(path: Path) -> str:
    """The table row a method's docstring asks for."""
    card = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraphs = [" ".join(part.split()) for part in card.split("\n\n")]
    name, _, what = paragraphs[0].rstrip(".").partition(": ")
    arxiv = re.search(r"arXiv (\d{4}\.\d{5})", card)
    source = f"[{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else "-"
    not_for = next(p.removeprefix("Not for: ") for p in paragraphs if p.startswith("Not for: "))
    return f"| {name} | {what} | {source} | {not_for} |"


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_table_of_methods(path: Path):
    assert row(path) in README, f"README.md wants this row:\n{row(path)}"


def test_a_wrong_row_is_noticed():
    assert row(METHODS[0]).replace("arxiv", "arvix") not in README


def test_no_placeholder_is_left():
    assert not re.findall(r"[A-Z]+_TABLE", README)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str):
    assert (ROOT / target).exists()


def test_the_two_commands_come_early():
    lines = README.splitlines()
    for command in ("make quickstart", "make test"):
        assert next(i for i, line in enumerate(lines) if line.startswith(command)) < 25


def test_python_of_the_readme_compiles():
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        names = compile(block, "README.md", "exec")
        assert names
        for line in block.splitlines():
            if line.startswith("from plprune"):
                exec(line, {})
