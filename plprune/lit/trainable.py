"""Methods and compensations that work on files, but not on a model while it is trained."""

from __future__ import annotations

from plprune.drivers.compensated import new_biases, parts
from plprune.drivers.looks import needs_complete
from plprune.errors import ConfigError
from plprune.methods.base import Method
from plprune.spec import Spec


def require_trainable(method: Method, spec: Spec, *, divided: bool) -> None:
    """Refuse what would fail at the first cut, before anything is measured.

    Args:
        method: as `Prune` holds it, with its compensation.
        spec: the model.
        divided: whether the strategy divides weights.

    Raises:
        ConfigError: if the method needs complete weights and the strategy divides them, or if the
            compensation follows the dense model or gives linears a bias that have none.
    """
    if divided:
        stats = {tap.stat for tap in method.taps(spec)}
        if any(stat.backward for stat in stats):
            raise needs_complete("gradients of single blocks", method.label)
        if any(stat.measured for stat in stats):
            raise needs_complete("losses of single cuts", method.label)
    selects, compensation = parts(method)
    if compensation is not None and compensation.follows_dense:
        raise ConfigError(
            "this compensation needs the dense model beside the one that is cut",
            given=f"{type(compensation).__name__} {compensation.hyper()} in a run that trains",
            allowed="drift: 0",
            fix="leave compensation.drift out, or cut before training: plprune prune",
        )
    without = new_biases(spec, selects, compensation)
    if without:
        raise ConfigError(
            "this compensation gives linears a bias, which a model that is trained cannot take",
            given=f"{type(compensation).__name__}, and {without[0]} without bias",
            allowed="plprune.compensate.LeastSquares without add_bias",
            fix="choose that one, or cut before training: plprune prune",
        )
