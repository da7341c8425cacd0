"""Which linears read the same activation."""

from __future__ import annotations

from plprune.spec import Spec

_READS = {
    "q": "attention", "k": "attention", "v": "attention", "o": "heads",
    "gate": "mlp", "up": "mlp", "down": "channels",
}  # fmt: skip
"""What linears of a role read, in the order of a block."""


def readers(spec: Spec) -> tuple[tuple[str, ...], ...]:
    """Linears that read the same activation, together, in the order they are run.

    Args:
        spec: a model or a part of one.

    Returns:
        Module paths.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for name, linear in spec.linears.items():
        found.setdefault((linear.block, _READS[linear.roles[0]]), []).append(name)
    order = list(dict.fromkeys(_READS.values()))
    keys = sorted(found, key=lambda key: (key[0], order.index(key[1])))
    return tuple(tuple(found[key]) for key in keys)
