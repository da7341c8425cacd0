"""Peak memory of `plprune prune` on large models: one block at a time, whatever their number.

Writes random checkpoints of a Llama's shape in bfloat16, one file a block (7b: hidden 4096, MLP
11008, 32 blocks are about 13 GB; 70b: hidden 8192, 64 query and 8 KV heads, MLP 28672), and prunes
them in a process of its own each: Wanda to 50 %, FLAP with a least-squares refit to 80 %. The
calibration set is small (--tokens), since what is asked here does not depend on the weights' sense.
Peak memory is the process's resident set, mapped files included.

    7b    the peak is below LIMIT, and twice the blocks take no more
    70b   one block more: its time, multiplied out to 80 blocks

Times mean something on an idle machine only. Results are lines of `results.jsonl` in the output
folder; what is there is not run again.

usage: python benchmarks/stream_memory.py [--shape 7b] [--blocks 16 32] [--methods wanda flap-refit]
    [--tokens 128] [--model DIR] [--output DIR]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import common
from one_shot import run_process

LIMIT, FLAT = 4.0, 1.05
"""GiB of the 7b shape; how much more twice the blocks may take (allocators are not exact)."""
SHAPES = {"7b": (4096, 11008, 32, 32), "70b": (8192, 28672, 64, 8), "tiny": (64, 176, 4, 2)}
"""Hidden size, MLP channels, query heads, KV heads."""
WHOLE = {"7b": 32, "70b": 80, "tiny": 8}
METHODS: dict[str, dict[str, Any]] = {
    "wanda": {
        "method": {"class_path": "plprune.methods.wanda.Wanda"},
        "budget": {"keep": 0.5, "base": "prunable"},
    },
    "flap-refit": {
        "method": {"class_path": "plprune.methods.flap.FLAP"},
        "budget": {"keep": 0.8, "multiple_of": {"mlp": 1}},
        "compensation": {"class_path": "plprune.compensate.LeastSquares"},
    },
}


def main() -> int:
    """Measure every method on every number of blocks, print, judge."""
    options = _options()
    if options.model is None:
        from plprune.demo import smollm2

        options.model = smollm2()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines]
    common.say(
        f"protocol: random bfloat16 weights, shape {options.shape} {SHAPES[options.shape]}, "
        f"{options.samples} x {options.tokens} calibration tokens, float32 blocks"
    )
    for blocks in options.blocks:
        key = {"shape": options.shape, "blocks": blocks, "tokens": options.tokens}
        missing = [
            m for m in options.methods if not any(_is(line, method=m, **key) for line in found)
        ]
        if missing:
            folder = build(options, blocks)
            for method in missing:
                found.append({"method": method, **key, **measure(options, folder, method)})
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(found[-1]) + "\n")
            shutil.rmtree(folder)
    return judge(options, found)


def _is(line: dict[str, Any], **wanted: Any) -> bool:
    return all(line.get(name) == value for name, value in wanted.items())


def _options() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("runs/stream_memory"))
    return parser.parse_args()


def build(options: Any, blocks: int) -> Path:
    """Write a checkpoint, a file a block, with the tokenizer of another model.

    Args:
        options: of the command line.
        blocks: how many.

    Returns:
        Its folder.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder: Path = options.output / f"base-{options.shape}-{blocks}"
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    tokenizer.save_pretrained(folder)
    hidden, ffn, heads, kv_heads = SHAPES[options.shape]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{number}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        made = {
            n: torch.ones(shapes[n], dtype=torch.bfloat16)
            if len(shapes[n]) == 1
            else (torch.randn(shapes[n], generator=generator) * shapes[n][-1] ** -0.5).bfloat16()
            for n in names
        }
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, names in files.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config.save_pretrained(folder)  # last: the folder is complete
    return folder


def measure(options: Any, folder: Path, method: str) -> dict[str, Any]:
    """Prune once.

    Args:
        options: of the command line.
        folder: of the checkpoint.
        method: name.

    Returns:
        CPU seconds, seconds and peak GiB.
    """
    settings = options.output / f"{method}.yaml"  # JSON is YAML
    settings.write_text(json.dumps({"prune": METHODS[method]}), "utf-8")
    target = options.output / f"pruned-{method}"
    keys = {
        "model.pretrained": folder,
        "data.tokenizer": folder,
        "data.train": "pydoc",
        "data.seq_len": options.tokens,
        "data.calibration_samples": options.samples,
        "data.calibration_seq_len": options.tokens,
        "output": target,
    }
    given = [f"--{name}={value}" for name, value in keys.items()]
    program = [sys.executable, "-m", "plprune.lit.cli", "prune", "--config", str(settings), *given]
    began = time.monotonic()
    spent = run_process([*program, "--overwrite"], target.with_suffix(".log"))
    shutil.rmtree(target)
    return {**spent, "seconds": time.monotonic() - began}


def judge(options: Any, found: list[dict[str, Any]]) -> int:
    """Print all lines of the shape; 1 if a claim does not hold."""
    good, whole = True, WHOLE[options.shape]
    for method in options.methods:
        key = {"shape": options.shape, "method": method, "tokens": options.tokens}
        lines = sorted((x for x in found if _is(x, **key)), key=lambda line: line["blocks"])
        for line in lines:
            common.say(
                f"{method:11} {line['blocks']:3} blocks: peak {line['peak_gib']:.2f} GiB, "
                f"{line['cpu']:.0f} CPU s, {line['seconds']:.0f} s"
            )
        first, last = lines[0], lines[-1]
        if options.shape == "7b" and last["peak_gib"] > LIMIT:
            common.say(f"  more than {LIMIT} GiB")
            good = False
        if last is first:
            continue
        if last["peak_gib"] > FLAT * first["peak_gib"]:
            common.say(f"  memory grows with depth: {first['peak_gib']:.2f} GiB before")
            good = False
        each = (last["cpu"] - first["cpu"]) / (last["blocks"] - first["blocks"])
        rest = first["cpu"] - each * first["blocks"]
        common.say(
            f"  a block more: {each:.1f} CPU s; {whole} blocks: {(rest + whole * each) / 3600:.2f} "
            "CPU hours"
        )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
