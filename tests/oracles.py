"""Second ways to compute what the engine computes; `unit/test_oracles.py` makes each fail once.

The mask oracle multiplies the inputs of consuming linears by 0 and 1 in plain forward pre-hooks;
the statistics oracle keeps every activation and computes at the end. Neither shares code with what
it checks.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from plprune import methods
from plprune.budget import Budget
from plprune.describe import describe
from plprune.drivers import whole
from plprune.methods.base import Method
from plprune.methods.depth import Depth
from plprune.plan import Keep, Plan
from plprune.sparse import SparseMethod
from plprune.spec import Entry, Spec
from plprune.structured import StructuredMethod
from plprune.surgery.apply import Applied, apply
from plprune.surgery.lower import lower
from plprune.unwrap import unwrap

RTOL, ATOL = 1e-9, 1e-11
"""Float64: a cut changes the order of sums, nothing else."""


def close(actual: Any, expected: Any, what: str = "") -> None:
    """Equal up to rounding in float64."""
    torch.testing.assert_close(
        actual, expected, rtol=RTOL, atol=ATOL, msg=lambda text: f"{what}: {text}"
    )


# --- plans ---------------------------------------------------------------------------------------


def plan_of(spec: Spec, kept: Mapping[str, Sequence[int]], method: str = "test") -> Plan:
    """A plan of `Keep` edits."""
    edits = tuple(Keep(axis=name, kept=torch.as_tensor(units)) for name, units in kept.items())
    return Plan(edits=edits, fingerprint=spec.fingerprint, method=method)


def random_plan(spec: Spec, seed: int, kinds: Iterable[str] | None = None) -> Plan:
    """Keep random units of every axis, another width in every block; attention axes cross.

    Args:
        spec: any spec, cut and masked ones too.
        seed: of the draw.
        kinds: axis kinds to cut; None for all.

    Returns:
        A plan that changes something and leaves at least one unit per group.
    """
    generator = torch.Generator().manual_seed(seed)

    def below(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    kept: dict[str, list[int]] = {}
    for name, axis in spec.axes.items():
        if kinds is not None and axis.kind not in kinds:
            continue
        members = [torch.nonzero(axis.group == label)[:, 0] for label in axis.group.unique()]
        share = below(max(1, len(members[0]) - 1))
        if share < len(members[0]):
            chosen = [m[torch.randperm(len(m), generator=generator)[:share]] for m in members]
            kept[name] = torch.cat(chosen).sort().values.tolist()
    assert kept, "nothing left to cut"
    return plan_of(spec, kept)


def uniform_plan(spec: Spec, widths: Mapping[str, int], seed: int = 0) -> Plan:
    """Keep random units, the same number in every block (and group)."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, axis in spec.axes.items():
        if axis.kind in widths:
            members = [torch.nonzero(axis.group == label)[:, 0] for label in axis.group.unique()]
            chosen = [
                m[torch.randperm(len(m), generator=generator)[: widths[axis.kind]]] for m in members
            ]
            kept[name] = torch.cat(chosen).sort().values.tolist()
    return plan_of(spec, kept)


# --- masked = cut --------------------------------------------------------------------------------


@contextmanager
def masked(model: nn.Module, lowered: Mapping[Entry, Tensor]) -> Iterator[None]:
    """Multiply the inputs of consuming linears by 0 and 1."""
    plain = unwrap(model)
    with ExitStack() as stack:
        for (path, side), keep in lowered.items():
            if side == "in":

                def hook(
                    _: nn.Module, args: tuple[Tensor, ...], keep: Tensor = keep
                ) -> tuple[Tensor, ...]:
                    return (args[0] * keep.to(args[0].dtype), *args[1:])

                stack.callback(plain.get_submodule(path).register_forward_pre_hook(hook).remove)
            elif not keep.any():  # a removed sublayer adds no bias either

                def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                    return out * 0

                stack.callback(plain.get_submodule(path).register_forward_hook(after).remove)
        yield


def masked_logits(model: nn.Module, lowered: Mapping[Entry, Tensor], ids: Tensor) -> Tensor:
    """Logits of the model with masks on its consumers' inputs."""
    with masked(model, lowered):
        return unwrap(model)(input_ids=ids).logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss."""
    logits = unwrap(model)(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by parameter name in the plain model."""
    plain = unwrap(model)
    plain.zero_grad(set_to_none=True)
    loss_of(plain, ids).backward()
    return {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}


def kept_part(tensor: Tensor, cuts: Iterable[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a cut keeps, and the tensor with the kept entries set to zero."""
    keep = torch.ones(tensor.shape, dtype=torch.bool)
    shape = list(tensor.shape)
    for dim, index in cuts:
        along = torch.zeros(tensor.shape[dim], dtype=torch.bool)
        along[index] = True
        keep &= along.view([-1 if d == dim else 1 for d in range(tensor.dim())])
        shape[dim] = len(index)
    return tensor[keep].reshape(shape), tensor.masked_fill(keep, 0)


def assert_masked_equals_cut(
    model: nn.Module, plan: Plan, spec: Spec | None = None
) -> tuple[nn.Module, Applied]:
    """The masked model and the cut model have the same logits and gradients.

    Args:
        model: float64, plain or peft-wrapped; left as it is.
        plan: for `spec`.
        spec: of the model; None describes it.

    Returns:
        The cut copy and what was applied to it.
    """
    spec, ids = describe(model) if spec is None else spec, tiny.tokens()
    # A deepcopy of a module whose gradients are set copies them too.
    unwrap(model).zero_grad(set_to_none=True)
    small = copy.deepcopy(model)
    lowered = lower(plan, spec)
    with masked(model, lowered):
        expected_logits, expected = masked_logits(model, lowered, ids), gradients(model, ids)
    applied = apply(small, plan, spec)
    logits, actual = masked_logits(small, {}, ids), gradients(small, ids)
    close(logits, expected_logits, "logits")
    assert actual.keys() == expected.keys() - applied.gone.keys()
    now = dict(unwrap(small).named_parameters())
    for name, before in unwrap(model).named_parameters():
        if name in applied.gone:
            assert name not in now
            assert name not in expected or not expected[name].any(), f"{name} has a gradient"
            continue
        cuts = applied.table.get(name, ())
        grad = expected.get(name)
        is_magnitude = "lora_magnitude_vector" in name
        if not is_magnitude:
            torch.testing.assert_close(now[name], kept_part(before, cuts)[0], rtol=0, atol=0)
        if grad is not None:
            kept, removed = kept_part(grad, cuts)
            # A DoRA magnitude is rescaled with the norm of its row: what stays is
            # magnitude times gradient.
            scale = now[name] / kept_part(before, cuts)[0] if is_magnitude else 1.0
            close(actual[name] * scale, kept, f"gradient of {name}")
            assert not removed.any(), f"removed entries of {name} have a gradient"
    return small, applied


# --- statistics in two passes --------------------------------------------------------------------


@contextmanager
def recorded(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep every input of some modules as [B, T, C]."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    plain = unwrap(model)
    with ExitStack() as stack:
        for path, into in seen.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], into: list[Tensor] = into) -> None:
                into.append(args[0].detach().clone())

            stack.callback(plain.get_submodule(path).register_forward_pre_hook(hook).remove)
        yield seen


def two_pass(inputs: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """All sums a statistic may hold, from all rows at once.

    Args:
        inputs: [B, T, C] activations.
        masks: [B, T] for each, True for tokens that count.

    Returns:
        `n`, `x_C`, `xx_C`, `xx_CC`, `mean_C`, `variance_C` in float64.
    """
    rows = [x.reshape(-1, x.shape[-1]).double() for x in inputs]
    if masks is not None:
        rows = [x[mask.reshape(-1).bool()] for x, mask in zip(rows, masks, strict=True)]
    x_NC = torch.cat(rows)
    return {
        "n": torch.tensor(float(len(x_NC)), dtype=torch.float64),
        "x_C": x_NC.sum(0),
        "xx_C": x_NC.square().sum(0),
        "xx_CC": torch.einsum("nc,nd->cd", x_NC, x_NC),
        "mean_C": x_NC.mean(0),
        "variance_C": x_NC.var(0, correction=0),
    }


def assert_two_pass(
    stat: Any, inputs: Sequence[Tensor], masks: Sequence[Tensor] | None = None, rtol: float = 1e-10
) -> None:
    """Every field of a streamed statistic, and what follows from it, equals the two-pass value."""
    expected = two_pass(inputs, masks)
    names = [*vars(stat), *(name for name in ("mean_C", "variance_C") if hasattr(stat, name))]
    for name in names:
        torch.testing.assert_close(
            getattr(stat, name),
            expected[name],
            rtol=rtol,
            atol=rtol,
            msg=lambda t, n=name: f"{n}: {t}",
        )


# --- methods -------------------------------------------------------------------------------------

METHOD_FOLDER = Path(inspect.getfile(methods)).parent


def collect() -> list[type[Method]]:
    """Every concrete method defined in a file of `plprune/methods`."""
    found = []
    for path in sorted(METHOD_FOLDER.glob("*.py")):
        module = importlib.import_module(f"{methods.__name__}.{path.stem}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Method) and not inspect.isabstract(value):
                found.append(value)
    return found


METHODS = collect()
STRUCTURED = [kind for kind in METHODS if issubclass(kind, (StructuredMethod, Depth))]
"""Methods that remove units."""
SPARSE = [kind for kind in METHODS if issubclass(kind, SparseMethod)]
"""Methods that set single weights to zero."""


def by_whole(
    model: nn.Module, spec: Spec, method: Method, budget: Budget, batches: list[Any]
) -> Plan:
    """Observe the whole model, then decide."""
    return whole.decide(model, spec, method, budget, whole.calibrate(model, spec, method, batches))


DRIVERS: dict[str, Callable[..., Plan]] = {"whole": by_whole}
"""`Method.order` -> how a plan is made."""


def plan_by(method: Method, model: nn.Module, budget: Budget, batches: Any = None) -> Plan:
    """The plan a method makes of a model, by default on `tiny.batches()`."""
    calibration = tiny.batches() if batches is None else batches
    return DRIVERS[method.order](model, describe(model), method, budget, calibration)
