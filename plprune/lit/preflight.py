"""What a run is refused for before its loggers, its processes and its weights are touched."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import nn

from plprune import cuts as planned
from plprune.cuts import Cut
from plprune.describe import describe
from plprune.errors import ModelError
from plprune.lit import guard, outputs
from plprune.lit.run_length import limits, reads_text, run_length
from plprune.lit.run_parts import Run
from plprune.lit.trainable import require_trainable
from plprune.load import local_folder
from plprune.load_check import check_folder
from plprune.lora_config import require_mergeable, require_whole
from plprune.schedule import Length
from plprune.skeleton import config_of, skeleton
from plprune.spec import Spec


def require_possible(trainer: Trainer, run: Run) -> None:
    """Refuse a run of the command line, as far as its configuration and files alone say.

    Weights are not loaded, no text is read. What a script's run is refused for in `fit` is found
    here too, when a logger has not deleted anything yet and processes wait for nobody.

    Args:
        trainer: made, with the path of the checkpoint to go on from.
        run: what it will do.

    Raises:
        PlpruneError: for whatever cannot work.
    """
    # Of processes that a launcher started, one alone must not stop, or the others wait for it:
    # what each finds on its own disk is looked at when they have met.
    alone = trainer.num_nodes == 1 and (trainer.num_devices == 1 or bool(trainer.strategy.launcher))
    folder = None
    if alone:
        outputs.require_targets(trainer)
        corpus = getattr(run.data, "corpus", None)  # of data modules of others nothing is known
        if corpus is not None and local_folder(corpus.tokenizer, "tokenizer files") is not None:
            run.data.loaded_tokenizer()
        folder = local_folder(run.model.pretrained, "config.json and safetensors")
    if folder is not None:
        check_folder(folder, trust_remote_code=run.model.trust_remote_code)
    try:
        model, spec = described(run)
    except ModelError:
        if folder is None:  # nobody knows the shape before the model is downloaded
            return
        raise
    require_parts(run, model, spec)
    position, limit = outputs.position_of(trainer.ckpt_path), limits(run.trainer)[0]
    if position is not None:
        outputs.require_not_past(position.step, limit)
    if run.pruner is None or reads_text(run.trainer, run.pruner.schedule):
        return
    cuts = planned_cuts(run, spec, run_length(run.trainer, run.data, run.pruner.schedule))
    if position is not None and position.step == limit:
        outputs.require_all_cuts(position.step, position.cuts, len(cuts))


def described(run: Run) -> tuple[nn.Module, Spec]:
    """The dense model of a run on the meta device, and its spec.

    Args:
        run: with the name of the model.
    """
    remote, name = run.model.trust_remote_code, run.model.dtype_name
    model = skeleton(
        config_of(run.model.pretrained, trust_remote_code=remote),
        dtype=None if name == "auto" else getattr(torch, name),
        attn_implementation=run.model.attn_implementation,
        trust_remote_code=remote,
    )
    return model, describe(model)


def require_parts(run: Run, model: nn.Module, spec: Spec) -> None:
    """Refuse a budget that nothing meets, and methods and adapters that the strategy rules out.

    Args:
        run: its parts.
        model: dense, perhaps without data.
        spec: its spec.

    Raises:
        PlpruneError: naming the setting.
    """
    pruner, lora = run.pruner, run.lora
    if pruner is not None:
        pruner.method.widths(spec, pruner.budget)
        require_trainable(pruner.method, spec, divided=run.divided)
    if lora is not None:
        if lora.merge_at_end:
            require_mergeable(model, lora.config)
        require_whole(model, lora.config, divided=pruner is not None and run.divided)


def planned_cuts(run: Run, spec: Spec, length: Length) -> tuple[Cut, ...]:
    """The cuts of a run; none for a dense one.

    Args:
        run: its parts.
        spec: the dense model.
        length: of the run.

    Raises:
        PlpruneError: for a schedule without room, and adapters that cannot be trained in it.
    """
    pruner, lora = run.pruner, run.lora
    if pruner is None:
        return ()
    found = planned.cuts(spec, pruner.method, pruner.budget, pruner.schedule, length)
    if lora is not None and lora.start == "fit" and lora.config.get("use_dora"):
        guard.refuse_dora(pruner.method, pruner.commit, len(found))
    return found
