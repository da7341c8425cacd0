"""Log the size of the model while it shrinks."""

from __future__ import annotations

from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from plprune.count import Tally, tally
from plprune.describe import describe
from plprune.errors import ConfigError
from plprune.lit import guard, measured
from plprune.unwrap import find_model, unwrap


@final
class SizeMonitor(Callback):
    """Log ratios to the dense model through `pl_module.log`, counted from tensors.

    Logged under `plprune/`: the share of parameters left of the prunable linears, the blocks and
    the whole model, non-embedding parameters, FLOPs a token, KV-cache bytes a token.
    """

    def __init__(self, *, context: int = 2048, attribute: str | None = None) -> None:
        """Set up.

        Args:
            context: tokens attended to, for FLOPs.
            attribute: where the language model hangs in the module; default the only one in it.

        Raises:
            ConfigError: if the context is empty.
        """
        if context < 1:
            raise ConfigError(
                "empty monitor.context", given=str(context), allowed="1 or more tokens"
            )
        self.context, self.attribute = context, attribute
        self.dense: Tally | None = None
        self.current: dict[str, float] = {}
        self._model: nn.Module | None = None
        self._seen: tuple[str, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the dense model, once: a later `fit` of the same model compares to the first."""
        if stage != "fit":
            return
        guard.ensure_model(pl_module)
        model = unwrap(find_model(pl_module, self.attribute))
        if self._model is not model:
            self._model, self._seen = model, None
            self.dense = measured.dense_tally(model, self.context)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the size a step is made at, beside its loss; counts again only after a cut."""
        if self.dense is None:
            return
        mark = self._mark(trainer)
        if mark != self._seen:
            self.current, self._seen = ratios(self._tally(trainer, pl_module), self.dense), mark
        for name, value in self.current.items():
            pl_module.log(
                f"plprune/{name}", value, on_step=True, on_epoch=False, rank_zero_only=False
            )

    def _tally(self, trainer: Trainer, pl_module: LightningModule) -> Tally:
        model = find_model(pl_module, self.attribute)
        progressive = guard.progressive_of(trainer)
        spec = describe(model) if progressive is None else progressive.spec
        return tally(model, spec, context=self.context)

    def _mark(self, trainer: Trainer) -> tuple[str, int]:
        progressive = guard.progressive_of(trainer)
        return ("", 0) if progressive is None else (progressive.spec.fingerprint, progressive.done)


def ratios(now: Tally, dense: Tally) -> dict[str, float]:
    """What is left, as shares of the dense model and as absolute numbers.

    Args:
        now: counts of the model.
        dense: counts it started from.

    Returns:
        Numbers by name.
    """
    bases = ("prunable", "blocks", "model")
    return {
        **{f"params_kept_{base}": now.params.of(base) / dense.params.of(base) for base in bases},
        "params_non_embedding": now.params.non_embedding,
        "flops_per_token": now.flops.model,
        "kv_cache_bytes_per_token": now.kv_cache,
        "adapter_params": float(now.adapter_params),
    }
