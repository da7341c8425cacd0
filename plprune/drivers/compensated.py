"""A method whose cuts are compensated: selection by one, new weights by the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from plprune import dist
from plprune.budget import Budget
from plprune.compensate import Compensation
from plprune.count import price
from plprune.errors import BudgetError, ConfigError
from plprune.methods.base import Method, View
from plprune.plan import Plan, Write
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.surgery.lower import lower


@dataclass(frozen=True, kw_only=True)
class Compensated(Method):
    """Let a method decide what goes, and refit what reads from it."""

    method: Method
    """Selects."""
    compensation: Compensation
    """Writes."""

    def __post_init__(self) -> None:
        """Refuse methods after which no linear is left to be refitted.

        Raises:
            ConfigError: for methods that remove whole sublayers.
        """
        if not self.method.compensable:
            raise ConfigError(
                "there is nothing to compensate",
                given=f"{self.label}: what reads a removed unit goes with it",
                allowed="compensation for methods that cut widths",
                fix="leave prune.compensation out",
            )

    @property
    def skip_first_tokens(self) -> int:  # type: ignore[override]
        """That of the method."""
        return self.method.skip_first_tokens

    @property
    def label(self) -> str:
        """Both names."""
        return f"{self.method.label} + {type(self.compensation).__name__}"

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """What the method needs, and a statistic of every input it can take units from."""
        selects = self.method.taps(spec)
        looked_at = _consumers(selects, spec)
        return (*selects, *(Tap(module=n, stat=self.compensation.stat) for n in looked_at))

    def widths(self, spec: Spec, budget: Budget) -> dict[str, list[int]] | None:
        """Those of the method."""
        return self.method.widths(spec, less_biases(spec, self.method, self.compensation, budget))

    def sizes_like(self, spec: Spec, budget: Budget) -> dict[str, int] | None:
        """Those of the method."""
        return self.method.sizes_like(spec, budget)

    def hyper(self) -> dict[str, Any]:
        """Those of both."""
        own = {"class": type(self.compensation).__name__, **self.compensation.hyper()}
        return {**self.method.hyper(), "compensation": own}

    def plan(self, view: View, budget: Budget) -> Plan:
        """The method's plan, and a `Write` for every linear that loses inputs."""
        left = less_biases(view.spec, self.method, self.compensation, budget)
        plan = replace(self.method.plan(view, left), asked=budget)
        edits = (*plan.edits, *self._writes(view, plan))
        return replace(plan, edits=edits, method=self.label, hyper=self.hyper())

    def _writes(self, view: View, plan: Plan) -> Iterator[Write]:
        losing = (
            (module, keep)
            for (module, side), keep in lower(plan, view.spec).items()
            if side == "in" and not bool(keep.all())
        )
        for number, (module, keep) in enumerate(losing):
            # Divided weights are put together by all ranks; then they take turns with the solving.
            weight = view.weight(module)
            bias = view.bias(module)
            seen = view.stats[Tap(module=module, stat=self.compensation.stat)]
            new_weight, new_bias = weight, bias
            exact = torch.promote_types(weight.dtype, torch.float32)
            owner = number % dist.world_size()
            with dist.together():
                if dist.rank() == owner:
                    new_weight, new_bias = self.compensation.solve(weight, bias, seen, keep)
            yield Write(
                module=module,
                weight=dist.sent(new_weight.to(exact), owner),
                bias=None if new_bias is None else dist.sent(new_bias.to(exact), owner),
            )


def _consumers(selects: Iterable[Tap], spec: Spec) -> list[str]:
    """Linears that a method takes inputs from, as far as its taps say."""
    seen, every = {tap.module for tap in selects}, spec.consumers()
    return [name for name in every if name in seen] or list(every)


def new_biases(spec: Spec, method: Method, compensation: Compensation | None) -> list[str]:
    """Linears without bias that a compensation may give one.

    Args:
        spec: the model.
        method: selects.
        compensation: follows.
    """
    if compensation is None or not compensation.gives_biases:
        return []
    found = _consumers(method.taps(spec), spec)
    return [name for name in found if not spec.linears[name].bias]


def less_biases(
    spec: Spec, method: Method, compensation: Compensation | None, budget: Budget
) -> Budget:
    """A budget less the biases that a compensation adds, so that the result stays within it.

    Args:
        spec: the model.
        method: selects.
        compensation: follows.
        budget: of the result.

    Returns:
        The budget of the selection: every consumer without bias may get one.

    Raises:
        BudgetError: if biases alone exceed the budget.
    """
    if budget.keep is None or budget.keep == 1 or budget.of != "params":
        return budget
    biases = sum(spec.linears[name].rows for name in new_biases(spec, method, compensation))
    if not biases:
        return budget
    left = budget.keep - biases / float(price(spec, budget))
    if left <= 0:
        raise BudgetError(
            "the biases of the compensation alone exceed the budget",
            given=f"keep {budget.keep} of {budget.base}, {biases} biases",
            fix="raise budget.keep, or choose a compensation that adds none",
        )
    return replace(budget, keep=left)


def parts(method: Method) -> tuple[Method, Compensation | None]:
    """What selects, and what writes.

    Args:
        method: compensated or not.
    """
    if isinstance(method, Compensated):
        return method.method, method.compensation
    return method, None
