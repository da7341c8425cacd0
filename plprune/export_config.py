"""Which class a pruned model is saved as, and its config.json.

Two forms: *plain* is a class that transformers already has; *per_layer* is that class with every
layer built to its own width by the short file in `templates/`. Both are checked against the tensors
before anything is written: the class, built on the meta device, must ask for exactly what there is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from plprune.errors import ExportError
from plprune.export_depth import Closed, skipped
from plprune.families.base import Family
from plprune.sharded import full_shape
from plprune.spec import Spec
from plprune.unwrap import family_of

Mode = Literal["auto", "plain", "per_layer"]
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

MODELING_FILE = "modeling_plprune.py"
_PER_LAYER_KEYS = (
    "per_layer_config",
    "auto_map",
    "allow_global_per_layer_attribute_access",
    "serialize_explicit_per_layer_config",
    "plprune_base_model_type",
    "plprune_extra_bias",
    "skip",
    "_name_or_path",  # may hold a path of this machine
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the model is saved as."""

    mode: Literal["plain", "per_layer"]
    """The form."""
    architecture: str
    """Class name."""
    config: Mapping[str, Any]
    """Content of config.json."""
    zeros: Shapes = field(default_factory=dict)
    """Biases the class has and the model has not: written as zeros."""


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How the tensors fit a class."""

    reason: str = ""
    """Why they do not; empty when they do."""
    zeros: Shapes = field(default_factory=dict)
    """Missing biases."""
    extra: tuple[str, ...] = ()
    """Tensors the class has no place for."""


def target_for(
    model: nn.Module, spec: Spec, tensors: Mapping[str, Tensor], *, mode: Mode, tied: bool
) -> Target:
    """Choose the class and write its config.

    Args:
        model: plain Hugging Face model, pruned.
        spec: its spec.
        tensors: what will be written, a tied output head left out.
        mode: `auto` takes a stock class where one fits.
        tied: whether the output head shares the embedding's tensor.

    Returns:
        The target; its class accepts exactly `tensors` and `zeros`.

    Raises:
        ExportError: for an unknown mode, `plain` where no stock class fits, or a model with parts
            that its family does not know.
    """
    if mode not in get_args(Mode):
        raise ExportError(
            "unknown export mode", given=repr(mode), allowed=", ".join(get_args(Mode))
        )
    shapes = {name: tuple(full_shape(tensor)) for name, tensor in tensors.items()}
    draft = _Draft(model, spec, shapes, tied)
    if mode == "per_layer":
        return draft.per_layer()
    found = draft.plain()
    if isinstance(found, Target):
        return found
    if mode == "plain":
        raise ExportError(
            "no stock class can hold the pruned model",
            given=found,
            allowed="equal widths in all layers and a head count the stock class can load",
            fix="set `mode: per_layer`, or prune to other widths",
        )
    return draft.per_layer()


class _Draft:
    """The parts both forms are made of."""

    def __init__(self, model: nn.Module, spec: Spec, shapes: Shapes, tied: bool) -> None:
        self.family: Family = family_of(model)
        closed = Closed.of(spec, self.family)
        self.spec = closed.spec(spec)
        self.shapes = {closed.name(name): shape for name, shape in shapes.items()}
        source: Any = model.config
        self.base_type = str(getattr(source, "plprune_base_model_type", None) or source.model_type)
        self.stock = _stock_class(self.base_type)
        self.tied_name = f"{self.family.head}.weight" if tied else ""
        stated = {k: v for k, v in source.to_diff_dict().items() if k not in _PER_LAYER_KEYS}
        # Training switches the cache off; what is exported is for generation.
        self.base: dict[str, Any] = closed.config(stated, source) | {
            "model_type": self.base_type,
            "tie_word_embeddings": tied,
            "use_cache": True,
        }

    def plain(self) -> Target | str:
        """A stock class, or why there is none."""
        if len(set(self.spec.blocks)) > 1:
            return "layers differ: " + ", ".join(self._ranges())
        config = self.base | self._widths(vars(self.spec.blocks[0])) | self._bias_flags()
        if self.family.head_rule == "fixed":
            config.pop("head_dim", None)  # the stock class derives it
        candidates = [(self.stock, config)]
        if self.family.export_as is not None:
            other = _stock_class(self.family.export_as[0])
            candidates.append((other, _translated(config, self.stock, other)))
        reasons = []
        for cls, candidate in candidates:
            candidate["architectures"] = [cls.__name__]
            fit = self._fit(cls, candidate)
            if not fit.reason:
                return Target(
                    mode="plain", architecture=cls.__name__, config=candidate, zeros=fit.zeros
                )
            reasons.append(f"{cls.__name__}: {fit.reason}")
        return "; ".join(reasons)

    def per_layer(self) -> Target:
        """The class of the modeling file."""
        name = f"Plprune{self.stock.__name__}"
        cls = getattr(_modeling(), name, None)
        if cls is None:
            raise ExportError(
                "no per-layer class for this architecture",
                given=self.base_type,
                allowed="the architectures of plprune/templates",
                fix="add its three classes to modeling_plprune.py.txt, see docs/add_a_family.md",
            )
        names = {"architectures": [name], "model_type": f"plprune_{self.base_type}"}
        names["plprune_base_model_type"] = self.base_type
        config = self.base | self._varying() | _auto_map(name) | names
        fit = self._fit(cls, config)
        extra_bias = self._extra_bias(fit.extra)
        if extra_bias:
            config["plprune_extra_bias"] = extra_bias
            fit = self._fit(cls, config)
        if fit.reason:
            raise ExportError(
                "the model has parts that the export cannot hold",
                given=fit.reason,
                allowed=f"the modules of {self.stock.__name__}, at any width",
                fix="remove what was added to the model, or extend the modeling file",
            )
        return Target(mode="per_layer", architecture=name, config=config, zeros=fit.zeros)

    def _widths(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Of what is there: a removed sublayer has none."""
        dims = {"head_dim": "head_dim", **self.family.dims}
        return {attribute: numbers[q] for q, attribute in dims.items() if numbers[q]}

    def _varying(self) -> dict[str, Any]:
        """The widest value of every width, and what single layers have instead."""
        layers = [self._widths(vars(block)) for block in self.spec.blocks]
        known = {attribute: 0 for layer in layers for attribute in layer}
        config: dict[str, Any] = {k: max(one.get(k, 0) for one in layers) for k in known}
        per_layer = {
            str(number): own
            for number, (layer, block) in enumerate(zip(layers, self.spec.blocks, strict=True))
            if (own := {k: v for k, v in layer.items() if v != config[k]} | skipped(block))
        }
        if per_layer:
            config["per_layer_config"] = per_layer
            heads = {self.family.dims["heads"], self.family.dims["kv_heads"]}
            if any(heads & set(own) for own in per_layer.values()):
                # Generic code reads global head counts: it shall get the widest, and not stop.
                config["allow_global_per_layer_attribute_access"] = True
        return config

    def _bias_flags(self) -> dict[str, bool]:
        """Switch on the stock class's own biases where the model has got some."""
        flags = {}
        for name, linear in self.spec.linears.items():
            inside = name.removeprefix(f"{self.family.blocks}.{linear.block}.")
            flag = (
                "attention_bias" if inside.startswith(f"{self.family.attention}.") else "mlp_bias"
            )
            if linear.bias and flag in self.base:
                flags[flag] = True
        return flags

    def _extra_bias(self, extra: tuple[str, ...]) -> list[str]:
        own = {
            f"{name}.bias": linear.block
            for name, linear in self.spec.linears.items()
            if linear.bias
        }
        found = {
            name.removeprefix(f"{self.family.blocks}.{own[name]}.").removesuffix(".bias")
            for name in extra
            if name in own
        }
        return sorted(found)

    def _ranges(self) -> list[str]:
        names, blocks = ("heads", "kv_heads", "ffn"), self.spec.blocks
        values = {name: [vars(block)[name] for block in blocks] for name in names}
        return [f"{k} {min(v)}..{max(v)}" for k, v in values.items() if min(v) < max(v)]

    def _fit(self, cls: Any, config: dict[str, Any]) -> _Fit:
        """Build the class without memory and compare what it asks for with what there is."""
        try:
            with torch.device("meta"):
                empty = cls(cls.config_class.from_dict(dict(config)))
        except Exception as error:  # it may refuse with anything; its words are the reason
            return _Fit(reason=str(error).strip().splitlines()[-1].strip())
        asked = {n: tuple(t.shape) for n, t in empty.state_dict().items() if n != self.tied_name}
        extra = tuple(sorted(set(self.shapes) - set(asked)))
        missing = {name: shape for name, shape in asked.items() if name not in self.shapes}
        wrong = [n for n, shape in self.shapes.items() if n in asked and asked[n] != shape]
        biases = {f"{name}.bias" for name in self.spec.linears}
        zeros = {name: shape for name, shape in missing.items() if name in biases}
        problems = [
            f"no place for {_first(extra)}" if extra else "",
            f"needs {_first(sorted(set(missing) - set(zeros)))}"
            if len(missing) > len(zeros)
            else "",
            f"{_first(wrong)} has {self.shapes[wrong[0]]} and needs {asked[wrong[0]]}"
            if wrong
            else "",
        ]
        return _Fit(reason=", ".join(filter(None, problems)), zeros=zeros, extra=extra)


def modeling_source() -> str:
    """The modeling file of per-layer exports, verbatim."""
    return files("plprune.templates").joinpath(f"{MODELING_FILE}.txt").read_text("utf-8")


@functools.cache
def _modeling() -> ModuleType:
    module = ModuleType("plprune_modeling_template")
    sys.modules[module.__name__] = module  # where transformers looks a class's module up
    exec(compile(modeling_source(), MODELING_FILE, "exec"), module.__dict__)
    return module


def _stock_class(model_type: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _translated(config: dict[str, Any], source: Any, target: Any) -> dict[str, Any]:
    """The same numbers for another class: without fields it does not know, its own window off."""
    known, wanted = ({f.name for f in fields(cls.config_class)} for cls in (source, target))
    config = {name: value for name, value in config.items() if name not in known - wanted}
    config["model_type"] = target.config_class.model_type
    if "sliding_window" in wanted - known:
        config["sliding_window"] = None
    return config


def _auto_map(name: str) -> dict[str, dict[str, str]]:
    stem, prefix = MODELING_FILE.removesuffix(".py"), name.removesuffix("ForCausalLM")
    classes = {
        "AutoConfig": f"{prefix}Config",
        "AutoModel": f"{prefix}Model",
        "AutoModelForCausalLM": name,
    }
    return {"auto_map": {auto: f"{stem}.{cls}" for auto, cls in classes.items()}}


def _first(names: list[str] | tuple[str, ...]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
