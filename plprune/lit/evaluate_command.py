"""`plprune evaluate`: perplexity of a saved model under a protocol that is printed with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plprune.errors import ConfigError, FamilyError, first_line
from plprune.lit.messages import Parser
from plprune.lit.progress import counted
from plprune.lit.tables import lines, put_json, require_place, share, short, show

DTYPES = ("float32", "bfloat16", "float16")


def run(args: Sequence[str]) -> None:
    """Measure and print.

    Args:
        args: command line after `evaluate`.
    """
    from plprune.load import local_folder
    from plprune.text import source_kind

    given = _parser().parse_args(list(args))
    windows = _windows(given.windows)
    # All paths first: a mistyped one must not be found after minutes of measuring another model.
    source_kind(given.text)
    for path in (given.model, given.dense, given.tokenizer):
        if path is not None:
            local_folder(path, "a model")
    _require_device(given.device)
    require_place(given.json)
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    measured = {}
    if given.dense is not None:
        measured["dense"] = _measure(given, given.dense, windows)
    measured["model"] = _measure(given, given.model, windows)
    result = {**measured, "comparison": _compare(measured)}
    if given.json != "-":
        _show(result)
    if given.json is not None:
        put_json(given.json, result)


def _measure(given: Any, directory: str, windows: int | None) -> dict[str, Any]:
    """Perplexity and sizes of one model as plain values."""
    import torch

    from plprune.evaluate import perplexity, windows_from_source
    from plprune.load import load_hf, load_tokenizer
    from plprune.positions import require_positions

    remote = {"trust_remote_code": given.trust_remote_code}
    tokenizer = load_tokenizer(given.tokenizer or directory, **remote)
    blocks = windows_from_source(
        given.text,
        tokenizer,
        given.seq_len,
        windows,
        text_field=given.text_field,
        rows=given.rows,
    )
    model: Any = load_hf(directory, dtype=getattr(torch, given.dtype), **remote)
    require_positions(model, given.seq_len, "--seq_len")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    result = perplexity(
        model,
        blocks,
        batch_size=given.batch_size,
        progress=counted(f"perplexity of {directory}", "windows"),
    )
    return {"model": directory, **result.to_dict(), "sizes": _sizes(model, given.seq_len)}


def _sizes(model: Any, context: int) -> dict[str, Any]:
    from plprune.count import tally
    from plprune.describe import describe

    try:
        return tally(model, describe(model), context=context).to_dict()
    except FamilyError:  # nobody described this architecture: its tensors can still be counted
        parameters = list(model.parameters())
        return {
            "params": {"model": sum(p.numel() for p in parameters)},
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
        }


def _compare(measured: dict[str, Any]) -> dict[str, Any] | None:
    """Ratios to the dense model; None without one."""
    if "dense" not in measured:
        return None
    dense, model = measured["dense"], measured["model"]
    same = dense["protocol"]["token_sha256"] == model["protocol"]["token_sha256"]
    ratio = model["perplexity"] / dense["perplexity"] if same else None
    shares = {
        base: model["sizes"]["params"][base] / count
        for base, count in dense["sizes"]["params"].items()
        if base in model["sizes"]["params"]
    }
    return {"same_tokens": same, "perplexity_ratio": ratio, "params_kept": shares}


def _show(result: dict[str, Any]) -> None:
    found = [result[key] for key in ("dense", "model") if key in result]
    head = ("model", "perplexity", "nll", "parameters", "non-embedding", "weights here", "KV/token")
    rows = [head]
    for one in found:
        sizes = one["sizes"]
        rows.append(
            (
                one["model"],
                f"{one['perplexity']:.4f}",
                f"{one['mean_nll']:.5f}",
                short(sizes["params"]["model"]),
                short(sizes["params"].get("non_embedding")),
                " ".join(filter(None, (short(sizes["bytes"], "B"), sizes.get("formats")))),
                short(sizes.get("kv_cache"), "B"),
            )
        )
    show("Perplexity", rows)
    comparison = result["comparison"]
    if comparison is not None:
        same = comparison["same_tokens"]
        kept = ", ".join(f"{share(v)} of {base}" for base, v in comparison["params_kept"].items())
        ratio = f"{comparison['perplexity_ratio']:.4f}" if same else "none: other tokens"
        lines("Against the dense model", [("perplexity ratio", ratio), ("parameters kept", kept)])
    last = found[-1]
    protocol = [(name.replace("_", " "), value) for name, value in last["protocol"].items()]
    lines("Protocol", [*protocol, ("seconds", f"{last['seconds']:.1f}")])


def _require_device(name: str | None) -> None:
    """Refuse a device that is not there."""
    import torch

    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "--device cannot be used",
            given=f"{name} ({first_line(error)})",
            allowed="cpu, or a device that torch sees, such as cuda or cuda:1",
        ) from error


def _windows(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError("--windows out of range", given=text, allowed="a number >= 1, or all")
    return int(text)


def _parser() -> Parser:
    parser = Parser(
        prog="plprune evaluate",
        description="Perplexity of a saved model with its protocol: windows from the start of the "
        "text, no special tokens, exp of the mean loss over the predictions of all windows.",
    )
    add = parser.add_argument
    add("model", metavar="DIR", help="folder or hub id of the model")
    add("--text", required=True, metavar="SOURCE", help=".txt, .jsonl, .parquet, folder, hub data")
    add("--windows", default="40", metavar="N", help="windows from the start, or all; default 40")
    add("--seq_len", type=int, default=1024, metavar="T", help="tokens of a window; default 1024")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights; default float32")
    add("--dense", metavar="DIR", help="also measure this model, first, and print ratios")
    add("--tokenizer", metavar="DIR", help="default that of the model")
    add("--batch_size", type=int, default=1, metavar="B", help="windows at a time; default 1")
    add("--device", help="default cuda if there is one, else cpu")
    add("--rows", choices=("blank_joined", "plain"), default="blank_joined", help="of .txt files")
    add("--text_field", default="text", metavar="NAME", help="field of rows; default text")
    add("--trust_remote_code", action="store_true", help="run Python code of the folder")
    add("--json", metavar="FILE", help="also write the numbers there; - for standard output only")
    return parser
