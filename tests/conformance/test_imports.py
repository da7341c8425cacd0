"""Who may import whom, checked on the syntax tree and once in a bare interpreter.

    errors <- spec, count <- stats, select, allocate, compensate, plan <- methods
                                    plan <- modules, surgery <- drivers <- lit, callbacks

Four rules, and one that closes the way round them:

1. only `plprune.lit` and `plprune.callbacks` import Lightning; heavy packages are imported inside
   functions, everywhere;
2. a method imports no surgery, no driver, no `dist`, no other method: it cannot touch a model even
   by accident;
3. surgery imports no method;
4. `plprune.lit` imports no callback, except the command line: callbacks are thin, what they call
   in `plprune.lit` must work without them;
5. the engine imports neither of the two, except the programs in `PROGRAMS`, inside functions.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# The folders of the repository and the names they are imported by.
SOURCES = {
    "plprune": "plprune",
    "callbacks": "plprune.callbacks",
    "configs": "plprune.configs",
}

LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
HEAVY = ("datasets", "deepspeed", "gguf", "lm_eval", "matplotlib", "peft", "transformers")
# What the engine must import without. Of third-party packages this leaves torch with its own
# dependencies, and safetensors.
BLOCKED = (*LIGHTNING, *HEAVY, "accelerate", "jsonargparse", "rich", "torchmetrics")

OUTER = ("plprune.lit", "plprune.callbacks")
PROGRAMS = ("plprune.__main__", "plprune.quickstart")
COMMAND_LINE = "plprune.lit.cli"  # and `plprune.lit.<name>_command`
FORBIDDEN_TO_METHODS = ("plprune.surgery", "plprune.drivers", "plprune.dist", "transformers")


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` is `a.b.c`."""

    name: str
    line: int
    deferred: bool
    types_only: bool


def module_of(path: Path) -> str:
    """Name by which a source file is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([SOURCES[folder], *rest]).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    """Every module of the package, by name."""
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_of(path): path for path in files}


MODULES = modules()


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def is_type_checking(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def is_deferred(node: ast.AST) -> bool:
    """Whether what stands inside does not run when the module is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "__name__ == '__main__'"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def imports_of(source: str) -> list[Import]:
    """All imports of a module. Relative ones are refused by the linter and fail here."""

    def walk(node: ast.AST, deferred: bool, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, deferred, types_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, deferred, types_only)
        deferred |= is_deferred(node)
        body = node.body if is_type_checking(node) else ()
        for child in ast.iter_child_nodes(node):
            yield from walk(child, deferred, types_only or child in body)

    return list(walk(ast.parse(source), deferred=False, types_only=False))


def lightning_outside(module: str, found: Import) -> bool:
    return within(found.name, *LIGHTNING) and not within(module, *OUTER)


def heavy_at_import(module: str, found: Import) -> bool:
    return within(found.name, *HEAVY) and not (found.deferred or found.types_only)


def method_reaches_out(module: str, found: Import) -> bool:
    if not within(module, "plprune.methods"):
        return False
    if within(found.name, *FORBIDDEN_TO_METHODS):
        return True
    if within(found.name, "plprune.methods"):
        return not within(found.name, "plprune.methods.base", module)
    # `from plprune import apply` would lead round the rule: take names from where they are defined.
    return within(found.name, "plprune") and ".".join(found.name.split(".")[:2]) not in MODULES


def surgery_knows_method(module: str, found: Import) -> bool:
    return within(module, "plprune.surgery") and within(found.name, "plprune.methods")


def lit_knows_callback(module: str, found: Import) -> bool:
    if module == COMMAND_LINE or module.endswith("_command"):
        return False
    return within(module, "plprune.lit") and within(found.name, "plprune.callbacks")


def engine_looks_up(module: str, found: Import) -> bool:
    if within(module, *OUTER) or not within(found.name, *OUTER):
        return False
    return not (module in PROGRAMS and found.deferred)


RULES = {
    "only plprune.lit and plprune.callbacks import Lightning": lightning_outside,
    "heavy packages are imported inside functions": heavy_at_import,
    "a method imports no surgery, driver, dist, transformers or other method": method_reaches_out,
    "surgery imports no method": surgery_knows_method,
    "plprune.lit imports no callback, except the command line": lit_knows_callback,
    "the engine does not import plprune.lit or plprune.callbacks": engine_looks_up,
}


def violations(module: str, source: str) -> list[str]:
    return [
        f"{module}, line {found.line}: imports {found.name}; rule: {rule}"
        for found in imports_of(source)
        for rule, broken in RULES.items()
        if broken(module, found)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module: str):
    broken = violations(module, MODULES[module].read_text(encoding="utf-8"))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plprune.plan", "def f():\n    from lightning.pytorch import Trainer"),
        ("plprune.plan", "import lightning as L"),
        ("plprune.export", "import transformers"),
        ("plprune.lit.model", "try:\n    from peft import Lora\nexcept ImportError:\n    ..."),
        ("plprune.callbacks.export", "class A:\n    import deepspeed"),
        ("plprune.methods.wanda", "from plprune.surgery.apply import apply"),
        ("plprune.methods.wanda", "def f():\n    from plprune import drivers"),
        ("plprune.methods.wanda", "import plprune.dist"),
        ("plprune.methods.wanda", "from plprune.methods.flap import Flap"),
        ("plprune.methods.wanda", "from plprune.methods import base, flap"),
        ("plprune.methods.wanda", "from plprune import apply_everything"),
        ("plprune.methods.wanda", "def f():\n    import transformers"),
        ("plprune.surgery.apply", "from plprune.methods.base import Method"),
        ("plprune.lit.recut", "from plprune.callbacks.prune import Prune"),
        ("plprune.drivers.whole", "def f():\n    import plprune.lit.recut"),
        ("plprune.quickstart", "from plprune.lit.cli import main"),
    ],
)
def test_rules_catch_a_violation(module: str, source: str):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plprune.export", "def f():\n    import transformers"),
        ("plprune.export", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("plprune.lit.model", "import lightning as L"),
        ("plprune.callbacks.prune", "from lightning.pytorch import Callback"),
        ("plprune.callbacks.prune", "from plprune.callbacks.masks import KeepMasks"),
        ("plprune.callbacks.prune", "from plprune.lit.recut import recut"),
        ("plprune.lit.cli", "from plprune.callbacks.prune import Prune"),
        ("plprune.methods.wanda", "from plprune.methods.base import Method, View"),
        ("plprune.methods.wanda", "import torch\nfrom plprune.errors import PlanError"),
        ("plprune.drivers.whole", "from plprune.methods.base import Method"),
        ("plprune.quickstart", "def main():\n    from plprune.lit.cli import main"),
        ("plprune.quickstart", "if __name__ == '__main__':\n    from plprune.lit.cli import main"),
        ("plprune.literature", "from plprune.methods.base import Method"),
    ],
)
def test_rules_allow_what_they_should(module: str, source: str):
    assert violations(module, source) == []


IMPORT_ALL = """
import importlib, sys
blocked, names = (argument.split(",") for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))  # None makes `import name` raise ModuleNotFoundError
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        sys.exit(f"{name} cannot be imported without {error.name}")
"""


def import_bare(*names: str) -> subprocess.CompletedProcess[str]:
    """Import modules in a fresh interpreter in which the heavy packages do not exist."""
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(BLOCKED), ",".join(names)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_engine_imports_with_torch_alone():
    # `plprune.__main__` would run the program.
    engine = [m for m in MODULES if not within(m, *OUTER) and m != "plprune.__main__"]
    assert "plprune" in engine
    result = import_bare(*engine)
    assert result.returncode == 0, result.stderr


def test_blocked_packages_are_really_blocked():
    result = import_bare("plprune", "peft")
    assert result.returncode == 1
    assert "peft cannot be imported without peft" in result.stderr


def test_every_package_is_shipped():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(tomllib.loads(text)["tool"]["setuptools"]["packages"])
    packages = {m for m, path in MODULES.items() if path.name == "__init__.py"}
    assert packages <= listed, "add it to [tool.setuptools] packages"
    # A folder of data files is a package to setuptools and importlib.resources without a module.
    assert listed - packages <= {"plprune.templates"}
