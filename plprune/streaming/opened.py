"""Open a folder for block-wise work, where an earlier run left it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plprune.errors import ModelError
from plprune.load import note_structure
from plprune.load_check import check_folder
from plprune.plan import Keep, Plan
from plprune.skeleton import config_of, skeleton
from plprune.stream import Stored, as_loaded, matched, stored_in
from plprune.streaming.blocks import FromFiles
from plprune.streaming.work import Work
from plprune.surgery.apply import apply
from plprune.surgery.rebuild import keep_edits


def open_model(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Stored]]:
    """A model on the meta device and where its tensors are.

    Args:
        folder: Hugging Face folder with safetensors.
        trust_remote_code: allow Python code of the folder to run.

    Returns:
        The model with real buffers, and stored tensors by its names.

    Raises:
        ModelError: if the folder cannot be used, or transformers converts its files on loading.
    """
    check_folder(folder, trust_remote_code=trust_remote_code)
    config = config_of(str(folder), trust_remote_code=trust_remote_code)
    model = skeleton(config, trust_remote_code=trust_remote_code, buffers=True)
    found = matched(model, stored_in(folder))
    if found is None:
        raise ModelError(
            "the files cannot be read block by block",
            given=f"{folder}, whose tensors transformers converts while it loads",
            allowed="tensors under the names and in the shapes of the model",
            fix="AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), then give NEW",
        )
    note_structure(model, folder)
    as_loaded(model, str(folder))
    return model.eval(), found


def facts_of(source: FromFiles, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a rerun and a report must know of a finished block.

    Args:
        source: its spec is up to date.
        number: of the block.
        tensors: of the block, by name.

    Returns:
        Plain values: units kept by axis, linears with a bias, zeros counted by linear.
    """
    part = source.spec.of_block(number)
    return {
        "kept": {name: axis.origin.tolist() for name, axis in part.axes.items()},
        "biases": [name for name, linear in part.linears.items() if linear.bias],
        "zeros": {name: int((tensors[f"{name}.weight"] == 0).sum()) for name in part.linears},
    }


def restore(source: FromFiles, work: Work) -> int:
    """Bring a freshly opened model to where an earlier run left it.

    Args:
        source: of the dense model.
        work: with its finished blocks.

    Returns:
        Number of finished blocks.

    Raises:
        ModelError: if a file is damaged.
    """
    finished = work.finished()
    for number in range(finished):
        facts = work.facts(number)
        spec = source.spec
        edits: tuple[Keep, ...] = keep_edits(spec, facts["kept"])
        plan = Plan(edits=edits, fingerprint=spec.fingerprint, method="finished")
        source.spec = apply(source.model, plan, spec).spec
        source.forget_removed()
        source.gain_biases(facts["biases"])
        source.places.update(work.places(number))
    return finished
