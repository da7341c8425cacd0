"""Measure before and after, note what happened, write the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from plprune import dist
from plprune.budget import is_whole
from plprune.callbacks.export import require_writable
from plprune.count import Tally, tally
from plprune.describe import describe
from plprune.dist import together
from plprune.errors import ConfigError
from plprune.evaluate import PerplexityResult, perplexity
from plprune.lit import carry, guard, measured, outputs, progress, protocol
from plprune.report import Report, same_run
from plprune.report_html import FILES, read, write
from plprune.report_parts import Sample, SpeedPair
from plprune.sharded import any_sharded
from plprune.spec import Spec
from plprune.timing import greedy_samples, speed
from plprune.unwrap import find_model, unwrap

log = logging.getLogger(__name__)

PROMPTS = (
    "The history of the region begins with",
    "In a large bowl, mix the flour with",
    "The main reason why water boils is",
)
"""Default prompts for samples."""


@final
class PruneReport(Callback):
    """Write report.html, report.json and report.md at the end of `fit`."""

    def __init__(
        self,
        directory: str,
        *,
        prompts: Sequence[str] | None = None,
        measure_speed: bool = True,
        context: int = 2048,
        overwrite: bool = False,
        attribute: str | None = None,
    ) -> None:
        """Set up; the target is checked before training starts.

        Args:
            directory: where to write.
            prompts: for greedy samples before and after; default three short ones, empty for none.
            measure_speed: measure prefill and decode of dense and pruned model side by side at the
                end; needs a module that knows its base model (`pretrained`), which is loaded once
                more.
            context: tokens attended to, for FLOPs.
            overwrite: replace an existing report.
            attribute: where the language model hangs in the module; default the only one in it.

        Raises:
            ConfigError: for a context below 1, or prompts that are one text.
        """
        if not (is_whole(context) and context >= 1):
            raise ConfigError(
                "report.context out of range", given=repr(context), allowed="tokens, 1 or more"
            )
        if isinstance(prompts, str):
            raise ConfigError(
                "report.prompts is one text",
                given=repr(prompts),
                allowed="a list of texts",
                fix=f"say [{prompts!r}]",
            )
        self.directory, self.context, self.overwrite = Path(directory), context, overwrite
        self.prompts = PROMPTS if prompts is None else tuple(prompts)
        self.measure_speed, self.attribute = measure_speed, attribute
        self.report: Report | None = None
        self._log = _fresh()
        self._dense: Tally | None = None
        self._started = 0.0
        self._resumed = self._known = False

    @property
    def writes(self) -> Path:
        """The folder that is replaced."""
        return self.directory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a target that cannot be written; count the dense model."""
        if stage != "fit":
            return
        outputs.require_last(trainer, self)
        outputs.require_apart(trainer)
        outputs.end_complete_runs(trainer)
        with together():
            if trainer.is_global_zero and (trainer.ckpt_path or not read(self.directory)):
                self.require_target(trainer)  # a script's path is not known before `on_fit_start`
        guard.ensure_model(pl_module)
        model, known = find_model(pl_module, self.attribute), self._log
        self._log, self._resumed, self._known = _fresh(), False, self._goes_on(trainer, model)
        if self._known:
            self._log |= {key: known[key] for key in ("dense", "samples")}
        else:
            self._dense = measured.dense_tally(model, self.context)
        carry.carry(trainer, pl_module, "report", self._save, self._load)

    def require_target(self, trainer: Trainer) -> None:
        """Refuse a folder that is there or cannot be made; a run's own report may be there.

        Args:
            trainer: with the path of the checkpoint it goes on from.
        """
        if not self.overwrite and read(self.directory) and outputs.only_ends(trainer):
            return  # compared with the run's when that is complete
        require_writable(
            self.directory,
            overwrite=self.overwrite,
            ours=lambda names: names <= set(FILES),
            key="report.overwrite: true",
        )

    def _goes_on(self, trainer: Trainer, model: Any) -> bool:
        """Whether the model was cut by an earlier fit of these callbacks, which saw it dense."""
        pruner = guard.pruner_of(trainer)
        progressive = None if pruner is None else pruner.progressive
        cut = progressive is not None and progressive.model is model and progressive.done > 0
        return cut and self._dense is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the dense model first."""
        with together():
            if trainer.is_global_zero:
                self.require_target(trainer)
        self._started = time.perf_counter()
        # Weights of a checkpoint are there, or will be: not the dense model's.
        self._resumed = self._resumed or trainer.ckpt_path is not None
        if self._resumed or self._known:
            return
        self._log["dense"] = self._score(trainer, pl_module, "dense perplexity")
        self._log["samples"] = self._generate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of every optimizer step."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        rows = self._log["loss"]
        done = rows[-1][0] if rows else 0
        if torch.is_tensor(loss) and trainer.global_step > done:
            rows.append([trainer.global_step, float(loss) * trainer.accumulate_grad_batches])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation perplexity."""
        value = trainer.callback_metrics.get("val_perplexity")
        if value is not None and not trainer.sanity_checking:
            self._log["val"].append([trainer.global_step, float(value)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure again and write, unless the run was interrupted."""
        if trainer.interrupted:
            return
        seconds = None if self._resumed else time.perf_counter() - self._started
        after = self._score(trainer, pl_module, "pruned perplexity")
        self.report = self._build(trainer, pl_module, after, seconds)
        if trainer.is_global_zero:
            there = None if self.overwrite else read(self.directory)
            if there is not None and same_run(there, self.report):
                log.info("the report of this run is there already: %s", self.directory)
                return
            path = write(self.report, self.directory, overwrite=self.overwrite)
            log.info("report: %s", path / "report.html")

    def _build(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        after: dict[str, Any] | None,
        seconds: float | None,
    ) -> Report:
        assert self._dense is not None, "setup ran"
        self._save()
        model: Any = find_model(pl_module, self.attribute)
        pruner = guard.pruner_of(trainer)
        progressive = None if pruner is None else pruner.progressive
        spec = describe(model) if progressive is None else progressive.spec
        asked, got = (
            measured.asked_and_got(pruner) if pruner is not None else ("nothing", "the dense model")
        )
        base = str(
            getattr(pl_module, "pretrained", "")
            or getattr(unwrap(model).config, "_name_or_path", "")
        )
        return Report(
            title=f"Pruning {Path(base).name or type(unwrap(model)).__name__}",
            base_model=base,
            method="none" if pruner is None else f"{pruner.method.label} {pruner.method.hyper()}",
            asked=asked,
            got=got,
            protocol=protocol.protocol(trainer, pl_module, after),
            config=protocol.config_of(trainer),
            sizes=measured.sizes(self._dense, tally(model, spec, context=self.context)),
            perplexity=measured.perplexities(
                self._log["dense"], after, trained=trainer.global_step > 0
            ),
            speed=self._speed(trainer, pl_module, model, spec),
            layers=() if progressive is None else measured.layers(progressive),
            scores=() if progressive is None else measured.scores(progressive),
            cuts=() if progressive is None else measured.cut_records(progressive, seconds),
            curves=measured.curves(self._log["loss"], self._log["val"]),
            samples=self._samples(trainer, pl_module),
            notes=measured.notes(self._log["dense"], after) if self._resumed else (),
        )

    def _score(
        self, trainer: Trainer, pl_module: LightningModule, title: str
    ) -> dict[str, Any] | None:
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "windows") or data.corpus.val is None:
            return None
        model = unwrap(find_model(pl_module, self.attribute))
        result: PerplexityResult = perplexity(
            model, data.windows(), progress=progress.shown(trainer, title), shared=True
        )
        log.info("%s: %.3f on %d windows", title, result.perplexity, result.protocol.windows)
        return {**result.to_dict(), "nll_N": list(result.nll_N)}

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        data: Any = getattr(trainer, "datamodule", None)
        if not self.prompts or not hasattr(data, "loaded_tokenizer"):
            return []
        model = unwrap(find_model(pl_module, self.attribute))
        return list(greedy_samples(model, data.loaded_tokenizer(), self.prompts))

    def _samples(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Sample, ...]:
        before, after = self._log["samples"], self._generate(trainer, pl_module)
        return tuple(
            Sample(prompt=p, dense=a, pruned=b)
            for p, a, b in zip(self.prompts, before, after, strict=False)
        )

    def _speed(
        self, trainer: Trainer, pl_module: LightningModule, model: Any, spec: Spec
    ) -> tuple[SpeedPair, ...]:
        from plprune.load import load_hf

        base = getattr(pl_module, "pretrained", None)
        # One process measures. A model that is divided cannot run on one alone.
        if not self.measure_speed or base is None or not trainer.is_global_zero:
            return ()
        if any_sharded(model.parameters()):
            return ()
        plain: Any = unwrap(model)
        parameter = next(plain.parameters())
        remote = bool(getattr(pl_module, "trust_remote_code", False))
        dense: Any = load_hf(base, dtype=parameter.dtype, trust_remote_code=remote).to(
            parameter.device
        )
        log.info("measuring speed, dense and pruned side by side")
        result = speed(dense, plain, prompt_len=128, rounds=3)
        return measured.speed_pairs(result, describe(dense), spec)

    def _save(self) -> dict[str, Any]:
        """What was noted, with the losses of all ranks averaged; all ranks must call."""
        rows = self._log["loss"]
        if rows and dist.world_size() > 1:
            values = dist.summed(torch.tensor([value for _, value in rows], dtype=torch.float64))
            values /= dist.world_size()
            self._log["loss"] = [[row[0], float(v)] for row, v in zip(rows, values, strict=True)]
        return self._log

    def _load(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self._log, self._resumed = dict(state), True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's own hooks."""
        carry.release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same after an error, when Lightning calls no `teardown`."""
        carry.release(pl_module)


def _fresh() -> dict[str, Any]:
    return {"loss": [], "val": [], "dense": None, "samples": []}
