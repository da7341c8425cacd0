"""Find the plain Hugging Face model inside wrappers (peft, DDP, torch.compile, user modules)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from plprune import families
from plprune.errors import ModelError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module has its own mode again afterwards.

    Args:
        model: any.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def few_logits(model: nn.Module) -> dict[str, int]:
    """Arguments that spare a model the product with its vocabulary, where it knows them.

    Args:
        model: plain Hugging Face model.

    Returns:
        For its forward pass: logits of the last token only; or nothing.
    """
    # The signature of what decorators wrap; the code object would be that of a decorator.
    known = inspect.signature(type(model).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def unwrap(model: nn.Module) -> nn.Module:
    """Take off `torch.compile`, data-parallel and peft wrappers.

    Args:
        model: a causal language model, possibly wrapped.

    Returns:
        The underlying Hugging Face model; with LoRA its linears are peft layers at the same paths.
    """
    while True:
        inner = model.__dict__.get("_orig_mod") or model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        if inner is None and hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            # PeftModel.get_base_model returns `base_model.model` for LoRA.
            inner = cast(Any, model).get_base_model()
        if inner is None or inner is model:
            return model
        model = cast(nn.Module, inner)


def find_model(root: nn.Module, attribute: str | None = None) -> nn.Module:
    """Find the causal language model in a user's module.

    Args:
        root: any module, e.g. a `LightningModule`.
        attribute: dotted path of the model below `root`; `None` searches for the one Hugging Face
            model.

    Returns:
        The model as it hangs in `root` (still wrapped by peft if it is).

    Raises:
        ModelError: if the path does not exist, nothing is found, or there is more than one
            candidate.
    """
    if attribute is not None:
        try:
            return root.get_submodule(attribute)
        except AttributeError as error:
            names = ", ".join(name for name, _ in root.named_children())
            raise ModelError(
                "no module under the given attribute",
                given=attribute,
                allowed=f"a module path in {type(root).__name__} (children: {names or 'none'})",
                fix="set `attribute` to where the language model hangs",
            ) from error
    found = _candidates(root)
    if len(found) != 1:
        names = ", ".join(name or "the module itself" for name in found) or "none"
        raise ModelError(
            f"need exactly one causal language model in {type(root).__name__}",
            given=f"{len(found)} ({names})",
            allowed="1",
            fix="name it with `attribute`, e.g. attribute: model",
        )
    return next(iter(found.values()))


def _candidates(root: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in root.named_modules():
        if id(module) in inside:
            continue
        plain = unwrap(module)
        config = getattr(plain, "config", None)
        if (
            config is None
            or not hasattr(config, "model_type")
            or not hasattr(plain, "get_input_embeddings")
        ):
            continue
        found[name] = module
        inside.update(id(child) for child in module.modules())
    return found


def family_of(model: nn.Module) -> families.Family:
    """Family of a model, by its config.

    Args:
        model: a causal language model, possibly wrapped.

    Returns:
        Its family.

    Raises:
        FamilyError: for an unknown architecture or a model without its expected modules.
    """
    return families.of(getattr(unwrap(model), "config", None))


def class_of(model: nn.Module) -> type[nn.Module]:
    """Class of a model as it was written.

    Args:
        model: any module; `fully_shard` gives it a class of its own that names the first one third.

    Returns:
        Its class without that of FSDP2.
    """
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
