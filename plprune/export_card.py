"""The model card of an export: front matter that hubs read, and what a user has to know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plprune.export_config import Target
from plprune.families.base import Family
from plprune.report import spans


@dataclass(frozen=True, kw_only=True)
class CardInfo:
    """What is known about an exported model beyond its tensors; everything may be left out."""

    name: str = ""
    """Title of the card; the folder's name by default."""
    base_model: str = ""
    """Hub id of the dense model. Of a path only the last part is written."""
    licence: str = ""
    """SPDX-like id the hub knows, e.g. `apache-2.0`; inherited from the base model."""
    method: str = ""
    """Name of the pruning method."""
    hyper: Mapping[str, Any] = field(default_factory=dict)
    """The method's settings."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """The budget that was asked for, from `Budget.to_dict`."""
    got: Mapping[str, Any] = field(default_factory=dict)
    """What came out, in any words: parameters before and after, shares."""
    seed: int | None = None
    """Seed of the run."""
    data_hash: str = ""
    """sha256 of the calibration tokens."""
    training: str = ""
    """Training between and after the cuts, e.g. `200 steps of 8 x 512 tokens`."""
    protocol: str = ""
    """How the scores were measured."""
    dataset: str = ""
    """Text the perplexity was measured on."""
    perplexity: float | None = None
    """Perplexity of this model."""
    dense_perplexity: float | None = None
    """Perplexity of the dense model under the same protocol."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Other scores by name."""
    adapters: str = ""
    """Folder in the export with LoRA adapters that are not merged."""

    def facts(self) -> dict[str, Any]:
        """What goes into the structure file, empty values left out."""
        names = ("method", "hyper", "budget", "got", "seed", "data_hash", "training", "protocol")
        values = {name: getattr(self, name) for name in names} | {
            "base_model": _basename(self.base_model)
        }
        return {
            k: dict(v) if isinstance(v, Mapping) else v
            for k, v in values.items()
            if v not in ("", None, {})
        }


def card_text(
    info: CardInfo, *, structure: Mapping[str, Any], family: Family, target: Target
) -> str:
    """Write the model card.

    Args:
        info: what is known.
        structure: from `structure_of`.
        family: its family.
        target: what it is saved as.

    Returns:
        Markdown with YAML front matter.
    """
    sections = [
        _front_matter(info),
        f"# {info.name}\n\n{_opening(info)}",
        "## What changed\n\n" + _changes(structure),
        "## How it was made\n\n" + _making(info),
        "## Scores\n\n" + _scores(info),
        "## Loading\n\n"
        + _loading(info.name, family, target.mode == "per_layer", target.architecture),
        _adapters(info),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(info: CardInfo) -> str:
    lines: dict[str, Any] = {}
    if _is_hub_id(info.base_model):
        lines |= {"base_model": info.base_model, "base_model_relation": "finetune"}
    if info.licence:
        lines["license"] = info.licence
    lines |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    methods = [part.lower() for part in info.method.split(" + ") if part]
    lines["tags"] = ["pruned", "plprune", *methods]
    if info.perplexity is not None:
        data = info.dataset or "unnamed"
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": data, "name": data},
            "metrics": [{"type": "perplexity", "value": info.perplexity}],
        }
        lines["model-index"] = [{"name": info.name, "results": [result]}]
    # JSON values are YAML values, and quoted ones are safe whatever the name holds.
    body = "\n".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in lines.items()
    )
    return f"---\n{body}\n---"


def _opening(info: CardInfo) -> str:
    base = _basename(info.base_model)
    kind = f"version of `{base}`" if base else "model"
    return (
        f"A structurally pruned {kind}, made with plprune"
        + (f" by the method {info.method}" if info.method else "")
        + ". The removed parts are gone from the files; nothing is masked."
    )


def _changes(structure: Mapping[str, Any]) -> str:
    before, after = structure["dense_blocks"], structure["blocks"]
    columns = (("query heads", "heads"), ("KV heads", "kv_heads"), ("MLP channels", "ffn"))
    removed = _removed(after)
    there = [(b, a) for b, a in zip(before, after, strict=True) if a["heads"] or a["ffn"]]
    before, after = [b for b, _ in there], [a for _, a in there]
    changed = [
        column
        for column in columns
        if any(a[column[1]] != b[column[1]] for a, b in zip(after, before, strict=True))
    ]
    if not changed:
        return removed or "Nothing was removed."
    rows = [
        ("all" if _uniform(before, after) else str(i), b, a)
        for i, (b, a) in enumerate(zip(before, after, strict=True))
    ]
    if _uniform(before, after):
        rows = rows[:1]
    lines = [["layer", *(title for title, _ in changed)], ["---"] * (len(changed) + 1)]
    for label, old, new in rows:
        cells = [f"{old[k]} -> {new[k]}" if old[k] != new[k] else str(new[k]) for _, k in changed]
        lines.append([label, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = "Which units were kept is listed in `plprune_structure.json`."
    return "\n\n".join(part for part in (removed, table, note) if part)


def _removed(blocks: Sequence[Mapping[str, int]]) -> str:
    """Layers of which nothing is left, and where that shows."""
    gone = [number for number, block in enumerate(blocks) if not (block["heads"] or block["ffn"])]
    if not gone:
        return ""
    return (
        f"Whole layers were removed: {spans(gone)} of the base's {len(blocks)}, counted from 0. "
        "Those after them moved up."
    )


def _uniform(before: list[dict[str, int]], after: list[dict[str, int]]) -> bool:
    return all(block == blocks[0] for blocks in (before, after) for block in blocks)


def _making(info: CardInfo) -> str:
    facts = {
        "method": info.method,
        "settings": _words(info.hyper),
        "budget asked": _words(info.budget),
        "budget got": _words(info.got),
        "training": info.training,
        "seed": "" if info.seed is None else str(info.seed),
        "calibration set of the last cut, sha256": info.data_hash,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    return "\n".join(lines) or "Not recorded."


def _scores(info: CardInfo) -> str:
    lines = []
    if info.perplexity is not None:
        dense = (
            "" if info.dense_perplexity is None else f" (dense model: {info.dense_perplexity:.2f})"
        )
        lines.append(
            f"- perplexity on {info.dataset or 'an unnamed text'}: {info.perplexity:.2f}{dense}"
        )
    lines += [f"- {name}: {value:.4g}" for name, value in info.scores.items()]
    if not lines:
        return "Not measured."
    return "\n".join(lines) + "\n\n" + f"Protocol: {info.protocol or 'not recorded'}."


def _loading(name: str, family: Family, per_layer: bool, architecture: str) -> str:
    trust = ", trust_remote_code=True" if per_layer else ""
    code = (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        "```"
    )
    if not per_layer:
        return f"{code}\n\nThe class is transformers' own `{architecture}`; plprune is not needed."
    targets = sorted({projection.path.rpartition(".")[2] for projection in family.roles.values()})
    return (
        f"{code}\n\nThe layers differ from what the stock class builds: `modeling_plprune.py` in "
        f"this folder does it (`{architecture}`, on top of transformers' own); plprune is not "
        "needed. vLLM: Transformers backend with `--trust-remote-code`.\n\n"
        f"PEFT does not know the model type: give `target_modules={json.dumps(targets)}`."
    )


def _adapters(info: CardInfo) -> str:
    if not info.adapters:
        return ""
    return (
        "## Adapters\n\nThe weights are those of the base; the LoRA adapters trained on them "
        f"are in `{info.adapters}/`, and scores above are with them:\n\n```python\n"
        "from peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(model, "{info.name}/{info.adapters}")\n```'
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value}" for key, value in values.items() if value not in (None, {}, [])
    )


def _is_hub_id(name: str) -> bool:
    return (
        bool(name)
        and not name.startswith((".", "/", "~"))
        and "\\" not in name
        and name.count("/") <= 1
    )


def _basename(name: str) -> str:
    return name if _is_hub_id(name) else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
