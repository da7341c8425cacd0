"""LoRA recovery: adapters on a model that is, or will be, cut; merged at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from plprune.callbacks.export import require_writable
from plprune.describe import describe
from plprune.dist import together
from plprune.errors import CheckpointError, ConfigError
from plprune.lit import carry, guard, outputs
from plprune.lit.kept_zeros import count_zeros, share_of_zeros
from plprune.lit.strategies import adapter_for, divides
from plprune.lora import Injected, inject, merge
from plprune.lora_config import (
    plain_config,
    require_mergeable,
    require_pairs,
    require_same_adapters,
    require_whole,
)
from plprune.lora_files import adapter_state, holds, save_adapter
from plprune.sharded import any_sharded
from plprune.unwrap import find_model, unwrap

log = logging.getLogger(__name__)

_SPARSE = 0.01
"""Share of zeros from which on a model was pruned to them; trained weights are hardly ever zero."""


@final
class LoRARecovery(Callback):
    """Train LoRA adapters instead of all weights, from the start or after the last cut."""

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        *,
        start: Literal["fit", "last_cut"] = "fit",
        merge: bool = True,
        adapter_dir: str | None = None,
        overwrite: bool = False,
        attribute: str | None = None,
        keep_zeros: bool | None = None,
    ) -> None:
        """Set up; adapters are injected in `setup` or after the last cut.

        Args:
            config: arguments of `peft.LoraConfig`; default r 16, alpha 32, all linears of the
                blocks.
            start: `fit` trains adapters between cuts too (they are cut with the base), `last_cut`
                trains all weights until the last cut and adapters afterwards.
            merge: fold the adapters into the weights at the end.
            adapter_dir: also write the adapters there (before merging), with the hash of their
                structure.
            overwrite: replace an existing `adapter_dir`.
            attribute: where the language model hangs in the module; default the only one in it.
            keep_zeros: leave zeros of the weights at zero, in training and when adapters are
                merged; default if more than 1 % of the linears' weights are.

        Raises:
            ConfigError: for an unknown start, or settings that are no mapping.
        """
        if start not in ("fit", "last_cut"):
            raise ConfigError("unknown lora.start", given=repr(start), allowed="fit, last_cut")
        if not isinstance(config or {}, Mapping):
            raise ConfigError(
                "lora.config is not a mapping",
                given=repr(config),
                allowed="arguments of peft.LoraConfig, e.g. {'r': 16, 'lora_alpha': 32}",
            )
        require_pairs(config or {})
        self.config, self.start, self.merge_at_end = dict(config or {}), start, merge
        self.adapter_dir = None if adapter_dir is None else Path(adapter_dir)
        self.overwrite, self.attribute = overwrite, attribute
        self.keep_zeros = keep_zeros
        self.injected: Injected | None = None

    @property
    def writes(self) -> Path | None:
        """The folder that is replaced."""
        return self.adapter_dir

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject before optimizers exist, or get ready to."""
        if stage == "fit":
            outputs.require_apart(trainer)
            outputs.end_complete_runs(trainer)
        with together():
            early = trainer.ckpt_path or not self._has_adapters()  # see `on_fit_start`
            if stage == "fit" and trainer.is_global_zero and early:
                self.require_target(trainer)
        guard.ensure_model(pl_module)
        model = unwrap(find_model(pl_module, self.attribute))
        if self.injected is not None and self.injected.model is not model:
            self.injected = None  # of an earlier run
        # Registered after Prune, if that comes first in the list: adapters then fit the cut model.
        carry.carry(
            trainer, pl_module, "lora", self._save, lambda state: self._load(pl_module, state)
        )
        if stage == "fit":
            cutting = self._pruner(trainer)
            if self.merge_at_end:
                require_mergeable(model, self.config)
            # Without cuts peft gathers what it reads; calibration passes of a cut do not.
            require_whole(model, self.config, divided=bool(cutting) and divides(trainer.strategy))
            if self.start == "last_cut" and cutting is None:
                raise ConfigError(
                    "lora.start: last_cut without cuts",
                    given="no plprune.callbacks.Prune before this callback",
                    fix="set start: fit, or add Prune",
                )
            if self.start == "fit":
                self._inject(pl_module)

    def require_target(self, trainer: Trainer) -> None:
        """Refuse a folder that is there or cannot be made; a run's own adapters may be there.

        Args:
            trainer: with the path of the checkpoint it goes on from.
        """
        if self.adapter_dir is None or (self._has_adapters() and outputs.only_ends(trainer)):
            return  # compared with the run's when they are to be written
        require_writable(
            self.adapter_dir,
            overwrite=self.overwrite,
            ours=lambda names: "adapter_config.json" in names,
            key="lora.overwrite: true",
        )

    def _has_adapters(self) -> bool:
        there = self.adapter_dir and (self.adapter_dir / "adapter_config.json").is_file()
        return bool(there) and not self.overwrite

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again at a folder with adapters: the path of a script's checkpoint is known now."""
        with together():
            if trainer.is_global_zero:
                self.require_target(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Inject if the last cut was made before the first step."""
        self._inject_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inject right after the last cut (Prune stands before this callback)."""
        self._inject_if_due(trainer, pl_module)

    def _inject_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.injected is not None or self.start == "fit":
            return
        pruner = self._pruner(trainer)
        if pruner.progressive is not None and pruner.progressive.done == len(pruner.cuts):
            self._inject(pl_module)
            adapter_for(trainer.strategy).assert_consistent(trainer)

    def _inject(self, pl_module: LightningModule, zeros: bool | None = None) -> None:
        if self.injected is None:
            trainer = pl_module.trainer
            # Before that a model with whole weights is a plain model still.
            wrapped = bool(trainer.strategy.optimizers) or any_sharded(pl_module.parameters())
            if wrapped:
                adapter_for(trainer.strategy).rest(trainer)
            model = find_model(pl_module, self.attribute)
            self.injected = inject(
                model, self.config, zeros=self._zeros(model) if zeros is None else zeros
            )
            for parameter in pl_module.parameters():
                if not parameter.requires_grad:
                    parameter.grad = None  # no optimizer would free it any more
            if wrapped:
                adapter_for(trainer.strategy).refit(trainer)
            trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            log.info("LoRA: %d trainable parameters", trainable)

    def _zeros(self, model: Any) -> bool:
        """Whether zeros stay; collective where they have to be counted."""
        if self.keep_zeros is False:
            return False
        share = share_of_zeros(model, count_zeros(model))
        keep = share > _SPARSE or bool(self.keep_zeros)
        if keep and not self.merge_at_end:
            raise ConfigError(
                "adapters beside their base fill its zeros",
                given=f"lora.merge: false, and {100 * share:.1f} % zeros in the linears",
                allowed="lora.merge: true, which leaves zeros at zero",
                fix="set lora.merge: true, or lora.keep_zeros: false",
            )
        if keep:
            log.info("LoRA: %.3f %% of the linears' weights are zero and stay it", 100 * share)
        return keep

    def _pruner(self, trainer: Trainer) -> Any:
        earlier = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        return next(
            (c for c in earlier if hasattr(c, "progressive") and c.method is not None), None
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the adapters and fold them in."""
        if self.injected is None:
            return
        sharded = any_sharded(pl_module.parameters())
        if sharded:
            adapter_for(trainer.strategy).rest(trainer)
        if self.adapter_dir is not None:
            spec, tensors = describe(self.injected.model), adapter_state(self.injected.model)
            with together():
                if trainer.is_global_zero and not holds(self.adapter_dir, spec, tensors):
                    save_adapter(
                        self.injected, self.adapter_dir, spec, tensors, overwrite=self.overwrite
                    )
        if self.merge_at_end:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):  # the last one must hold what is trained
                    callback.on_train_end(trainer, pl_module)
            merge(self.injected)
            self.injected = None
            if sharded:
                adapter_for(trainer.strategy).finish(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's own hooks."""
        carry.release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same after an error, when Lightning calls no `teardown`."""
        carry.release(pl_module)

    def _save(self) -> dict[str, Any]:
        config = None if self.injected is None else plain_config(self.injected.config)
        zeros = self.injected is not None and self.injected.zeros
        return {"injected": self.injected is not None, "config": config, "zeros": zeros}

    def _load(self, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        if state is not None and state["injected"]:
            # The weights, and their zeros, are loaded after this.
            self._inject(pl_module, state.get("zeros", False))
            assert self.injected is not None, "just injected"
            require_same_adapters(plain_config(self.injected.config), state.get("config"))
        elif self.injected is not None:
            raise CheckpointError(
                "the checkpoint has no adapters",
                given="a run with lora.start: fit",
                allowed="a checkpoint of a run with adapters that are not merged yet",
                fix="resume without `lora`, or export the checkpoint and start a new run from it",
            )
