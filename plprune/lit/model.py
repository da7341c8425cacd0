"""A causal language model as a LightningModule, with learning rates that know about cuts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from plprune.errors import ConfigError, first_line
from plprune.lit.carry import KEY
from plprune.lit.guard import length_of, progressive_of, require_structure
from plprune.lit.strategies.fsdp2 import shard
from plprune.lit.streamed import streamed
from plprune.load import load_hf
from plprune.positions import require_positions
from plprune.schedule import Phase, learning_rate
from plprune.skeleton import store_block_inputs

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up, then a cosine, over the whole run or again after every cut."""

    peak: float = 1e-4
    """Base learning rate."""
    warmup: float = 0.1
    """Share of the run (or phase) that warms up."""
    floor: float = 0.0
    """The cosine ends at this share of the peak."""
    per_phase: bool = False
    """Start over after every cut, with the peaks of the schedule's phases (TransAct); default one
    curve."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: for a peak that is not positive or shares outside [0, 1].
        """
        if not self.peak > 0 or not 0 <= self.warmup <= 1 or not 0 <= self.floor <= 1:
            raise ConfigError(
                "impossible learning rate",
                given=f"peak {self.peak}, warmup {self.warmup}, floor {self.floor}",
                allowed="peak > 0, warmup and floor in [0, 1]",
            )


class LitCausalLM(LightningModule):
    """Any Hugging Face causal language model, trained on next-token prediction."""

    def __init__(
        self,
        pretrained: str,
        *,
        learning_rate: LearningRate | None = None,
        optimizer: OptimizerCallable | None = None,
        dtype: Dtype = "float32",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Remember what to load; weights come in `configure_model`.

        Args:
            pretrained: directory or hub id of the base model.
            learning_rate: schedule of the learning rate.
            optimizer: class and arguments; default AdamW with betas (0.9, 0.95) and no weight
                decay.
            dtype: of the weights; with `bf16-true` precision Lightning casts them anyway.
            attn_implementation: as in transformers.
            gradient_checkpointing: trade compute for activation memory.
            compile: `torch.compile` the model's forward; compiled again after every cut.
            trust_remote_code: needed for models with their own code, such as per-layer exports.

        Raises:
            ConfigError: for an unknown dtype.
        """
        super().__init__()
        if dtype not in get_args(Dtype):
            raise ConfigError(
                "unknown model.dtype", given=repr(dtype), allowed=", ".join(get_args(Dtype))
            )
        # No save_hyperparameters: the command line would let a checkpoint's values override the
        # config it is given.
        self.pretrained, self.dtype_name, self.attn_implementation = (
            pretrained,
            dtype,
            attn_implementation,
        )
        self.rate, self.optimizer_class = learning_rate or LearningRate(), optimizer
        self.checkpointed, self.compiled, self.trust_remote_code = (
            gradient_checkpointing,
            compile,
            trust_remote_code,
        )
        self.model: nn.Module | None = None
        self.val_perplexity = Perplexity(ignore_index=-100)
        self.test_perplexity = Perplexity(ignore_index=-100)

    def setup(self, stage: str) -> None:
        """Load the model once; callbacks that change it run right after and may rely on it."""
        self.configure_model()
        corpus = getattr(getattr(self.trainer, "datamodule", None), "corpus", None)
        if corpus is not None:
            lengths = ("seq_len", "calibration_seq_len") if stage == "fit" else ()
            for name in (*lengths, *(["val_seq_len"] if corpus.val is not None else [])):
                require_positions(self.model, getattr(corpus, name), f"data.{name}")

    def configure_model(self) -> None:
        """Load the base model once, in the configured dtype: on the CPU, or each process its share.

        Under FSDP2 and ZeRO-3 no process holds the whole model, also while it loads.
        """
        if self.model is None:
            self.model = self._load()
        mesh = self.device_mesh
        if mesh is not None:
            shard(self.model.to(self.trainer.strategy.root_device), mesh["data_parallel"])

    def _load(self) -> nn.Module:
        dtype = None if self.dtype_name == "auto" else getattr(torch, self.dtype_name)
        remote, attention = self.trust_remote_code, self.attn_implementation
        model: Any = streamed(
            self, self.pretrained, dtype=dtype, attn_implementation=attention,
            trust_remote_code=remote,
        )  # fmt: skip
        if model is None:
            model = load_hf(self.pretrained, dtype=dtype, trust_remote_code=remote)
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                "cannot use model.attn_implementation",
                given=f"{attention} ({first_line(error)})",
                allowed="eager, sdpa, or a kernel that is installed, such as flash_attention_2",
            ) from error
        model.config.use_cache = False
        if self.checkpointed:
            store_block_inputs(model)
        if self.compiled:
            model.compile()
        return cast(nn.Module, model.train())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another structure before torch lists every size that differs.

        Raises:
            CheckpointError: if callbacks did not bring the model to the checkpoint's structure.
        """
        self.configure_model()
        assert self.model is not None, "configure_model made it"
        require_structure(self.model, checkpoint.get(KEY, {}), pruned=self._pruned())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 1 for tokens; None without padding.

        Returns:
            [B, T, V].
        """
        assert self.model is not None, "configure_model runs first"
        return cast(Tensor, self.model(input_ids=input_ids, attention_mask=attention_mask).logits)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token loss; a step whose loss is not finite stops the run with a message."""
        assert self.model is not None, "configure_model runs first"
        loss = cast(Tensor, self.model(**batch).loss)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Perplexity over the validation windows."""
        self._score(batch, self.val_perplexity)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True, on_step=False, on_epoch=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Perplexity over the test windows."""
        self._score(batch, self.test_perplexity)
        self.log("test_perplexity", self.test_perplexity, on_step=False, on_epoch=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Negative log-likelihood of every predicted token.

        Returns:
            [B, T - 1] float32.
        """
        logits = self(batch["input_ids"], batch.get("attention_mask"))[:, :-1].float()
        return nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        )

    def _score(self, batch: dict[str, Tensor], metric: Perplexity) -> None:
        logits = self(batch["input_ids"], batch.get("attention_mask"))[:, :-1].float()
        metric.update(logits, batch.get("labels", batch["input_ids"])[:, 1:])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer over what is trainable, and the learning-rate schedule."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = self._optimizer(trainable)
        phases, rate = self._phases(), self.rate

        def factor(step: int) -> float:
            return learning_rate(step, phases, warmup=rate.warmup, floor=rate.floor)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        each_step: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": each_step}

    def _pruned(self) -> bool:
        """True if a pruning callback takes care of masks."""
        return self._trainer is not None and progressive_of(self._trainer) is not None

    def _optimizer(self, trainable: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer_class is None:
            return torch.optim.AdamW(
                trainable, lr=self.rate.peak, betas=(0.9, 0.95), weight_decay=0.0
            )
        try:
            optimizer = self.optimizer_class(trainable)
        except (TypeError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                "the optimizer cannot be made",
                given=f"model.optimizer ({first_line(error)})",
                allowed="an optimizer of all trainable parameters, such as torch.optim.AdamW",
                fix="change model.optimizer",
            ) from error
        for group in optimizer.param_groups:
            group["lr"] = self.rate.peak
        return optimizer

    def _phases(self) -> tuple[Phase, ...]:
        """Phases of the Prune callback, or one over the whole run."""
        pruner = next((c for c in self.trainer.callbacks if hasattr(c, "phases")), None)  # type: ignore[attr-defined]
        if self.rate.per_phase and pruner is None:
            raise ConfigError(
                "learning_rate.per_phase without a schedule of cuts",
                given="no Prune callback",
                fix="add plprune.callbacks.Prune, or set per_phase: false",
            )
        if self.rate.per_phase and pruner is not None:
            return cast("tuple[Phase, ...]", pruner.phases(self.trainer))
        return (Phase(start=0, steps=length_of(self.trainer).steps, peak=1.0),)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop a run that diverged instead of training on NaN."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if torch.is_tensor(loss) and not bool(torch.isfinite(loss)):
            raise ConfigError(
                "the training loss is not finite",
                given=f"{float(loss)} at optimizer step {self.trainer.global_step}",
                allowed="a finite loss",
                fix="lower learning_rate.peak, clip gradients, or use float32 or bfloat16",
            )
