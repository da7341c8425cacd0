"""The public names, frozen: adding or removing one is a decision, made here."""

import plprune
from plprune import callbacks

ENGINE = {
    *("Axis", "Budget", "Keep", "Mask", "Plan", "Report", "Spec", "Write"),
    *("apply", "count_params", "describe", "load_hf", "observe", "rebuild", "save_hf"),
}
CALLBACKS = {
    *("ExportHF", "KeepMasks", "LoRARecovery", "Prune", "PruneReport", "SizeMonitor"),
    "Statistics",
}


def test_engine():
    submodules = {name for name, value in vars(plprune).items() if type(value).__name__ == "module"}
    found = {name for name in vars(plprune) if not name.startswith("_")} - submodules
    # `describe`, `observe` and `apply` are functions that shadow nothing a user imports by path.
    assert found | (ENGINE & submodules) == ENGINE


def test_functions_are_not_shadowed_by_their_modules():
    for name in ENGINE:
        assert callable(getattr(plprune, name)), name


def test_callbacks():
    assert set(callbacks.__all__) == CALLBACKS
