"""An export loads without plprune and computes the same; what cannot be exported says why."""

import ast
import copy
import dataclasses
import json
import os
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

import oracles
import tiny
from plprune import export, export_config, export_folder
from plprune.describe import describe
from plprune.errors import ExportError
from plprune.export import CardInfo, save_hf
from plprune.load import STRUCTURE_FILE, load_hf, read_structure
from plprune.plan import Plan, Write
from plprune.surgery.apply import Applied, apply
from plprune.surgery.lower import lower
from plprune.surgery.rebuild import structure_of

TOLERANCE = 1e-5


@dataclasses.dataclass
class Pruned:
    """A pruned model and what `save_hf` wants to know about it."""

    model: Any
    spec: Any
    structure: dict[str, Any]

    def save(self, directory: Path, **options: Any) -> Path:
        return save_hf(self.model, directory, spec=self.spec, structure=self.structure, **options)


def pruned(model: Any, plan: Plan | None = None, **widths: int) -> Pruned:
    """Cut a model, to the given widths or at random with another width in every block."""
    dense = describe(model)
    if plan is None:
        plan = oracles.uniform_plan(dense, widths) if widths else oracles.random_plan(dense, seed=1)
    applied: Applied = apply(model, plan, dense)
    return Pruned(model, applied.spec, structure_of(applied.spec, dense))


def single(name: str, **changes: Any) -> Any:
    return tiny.model(name, dtype=torch.float32, **changes)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


def difference(directory: Path, model: Any) -> float:
    """Largest difference between the logits of an export and those of the model in memory."""
    loaded = load_hf(directory, trust_remote_code=True)
    return float((logits(loaded) - logits(model)).abs().max())


def weight_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


@pytest.fixture(scope="module", autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory):
    """Modeling files are copied here instead of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_uniform_widths(name: str, tmp_path: Path):
    variant = tiny.VARIANTS[name]
    groups = min(2, variant.kv_heads)
    made = pruned(single(name), kv_group=groups, mlp=24)
    out = made.save(tmp_path / "out")
    config = config_of(out)
    heads_cut = groups < variant.kv_heads
    fixed = variant.family in ("opt", "gpt_neox") and heads_cut
    assert config["model_type"] == ("plprune_" if fixed else "") + variant.family
    assert config["tie_word_embeddings"] is variant.tied
    assert (out / "modeling_plprune.py").exists() == fixed
    if heads_cut:
        assert config["head_dim"] == tiny.HEAD_DIM
    assert ("lm_head.weight" in weight_names(out)) is not variant.tied
    assert difference(out, made.model) <= TOLERANCE


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_widths_of_every_layer(name: str, tmp_path: Path):
    made = pruned(single(name))
    out = made.save(tmp_path / "out")
    config = config_of(out)
    family = tiny.VARIANTS[name].family
    assert config["model_type"] == f"plprune_{family}"
    assert config["plprune_base_model_type"] == family
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"].endswith(config["architectures"][0])
    assert config["head_dim"] == tiny.HEAD_DIM
    assert difference(out, made.model) <= TOLERANCE


@pytest.mark.parametrize("name", ["opt-mha", "gpt_neox-mha", "gpt_neox-mha-tied", "opt-mha-tied"])
def test_mlp_only_keeps_the_stock_class(name: str, tmp_path: Path):
    made = pruned(single(name), mlp=24)
    out = made.save(tmp_path / "out", mode="plain")
    assert config_of(out)["model_type"] == tiny.VARIANTS[name].family
    assert "head_dim" not in config_of(out)
    assert difference(out, made.model) <= TOLERANCE


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def many_heads(**changes: Any) -> Any:
    return single(
        "llama-mha",
        hidden_size=64,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=4,
        rope_parameters=LLAMA3,
        **changes,
    )


def test_llama_with_24_of_32_heads_is_a_mistral(tmp_path: Path):
    made = pruned(many_heads(), kv_group=24)
    out = made.save(tmp_path / "out")
    config = config_of(out)
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert (config["num_attention_heads"], config["head_dim"]) == (24, 4)
    assert config["sliding_window"] is None
    assert config["rope_parameters"] == LLAMA3
    assert not {"attention_bias", "mlp_bias", "pretraining_tp"} & set(config)
    assert config[
        "transformers_version"
    ]  # without it, tokenizers beside a mistral get another regex
    assert difference(out, made.model) <= TOLERANCE


def test_llama3_rope_stays(tmp_path: Path):
    for number, widths in enumerate(({"kv_group": 2}, {})):
        made = pruned(single("llama-gqa", rope_parameters=LLAMA3), **widths)
        out = made.save(tmp_path / str(number))
        assert config_of(out)["rope_parameters"] == LLAMA3
        assert difference(out, made.model) <= TOLERANCE


def test_llama_with_biases_is_no_mistral(tmp_path: Path):
    made = pruned(many_heads(attention_bias=True), kv_group=24)
    with pytest.raises(
        ExportError, match=r"MistralForCausalLM: no place for .*k_proj.bias and 7 more"
    ):
        made.save(tmp_path / "plain", mode="plain")
    assert config_of(made.save(tmp_path / "out"))["model_type"] == "plprune_llama"
    assert difference(tmp_path / "out", made.model) <= TOLERANCE


def test_gemma_with_an_odd_head_count_is_per_layer(tmp_path: Path):
    made = pruned(
        single("gemma3-gqa-tied", hidden_size=64, num_attention_heads=8, num_key_value_heads=4),
        kv_group=3,
    )
    with pytest.raises(
        ExportError, match=r"hidden size \(64\) is not a multiple .* heads \(6\).*mode: per_layer"
    ):
        made.save(tmp_path / "plain", mode="plain")
    out = made.save(tmp_path / "out")
    assert config_of(out)["model_type"] == "plprune_gemma3_text"
    assert "per_layer_config" not in config_of(out)
    assert difference(out, made.model) <= TOLERANCE


def test_phi3_long_rope_with_cut_heads_is_per_layer(tmp_path: Path):
    factors = [1.0, 1.5, 2.0, 3.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": factors,
    }
    made = pruned(
        single("phi3-mha", rope_parameters=rope, original_max_position_embeddings=32), kv_group=2
    )
    out = made.save(tmp_path / "out")
    assert config_of(out)["model_type"] == "plprune_phi3"
    assert difference(out, made.model) <= TOLERANCE


def test_uniform_model_can_be_per_layer(tmp_path: Path):
    made = pruned(single("llama-gqa"), mlp=24)
    out = made.save(tmp_path / "out", mode="per_layer")
    assert config_of(out)["model_type"] == "plprune_llama"
    assert difference(out, made.model) <= TOLERANCE


def with_bias(model: Any, paths: tuple[str, ...], **widths: int) -> Pruned:
    """A pruned model with biases the stock class does not ask for, as compensation adds them."""
    dense = describe(model)
    names = [name for name in dense.linears if name.endswith(paths)]
    edits = [Write(module=n, bias=torch.full((dense.linears[n].rows,), 0.1)) for n in names]
    apply(model, Plan(edits=tuple(edits), fingerprint=dense.fingerprint, method="test"), dense)
    return pruned(model, **widths)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("llama-gqa", "llama"),  # has switches for biases; those nobody set are written as zeros
        ("qwen3-gqa", "plprune_qwen3"),  # has one for attention only
        ("qwen2-gqa", "plprune_qwen2"),
        ("mistral-gqa-window", "plprune_mistral"),
    ],
)
def test_added_biases_are_kept(name: str, model_type: str, tmp_path: Path):
    made = with_bias(single(name), ("o_proj", "down_proj"), kv_group=2, mlp=24)
    out = made.save(tmp_path / "out")
    assert config_of(out)["model_type"] == model_type
    assert difference(out, made.model) <= TOLERANCE


def test_added_biases_and_an_odd_head_count(tmp_path: Path):
    made = with_bias(many_heads(), ("o_proj", "down_proj"), kv_group=24)
    out = made.save(tmp_path / "out")
    assert config_of(out)["model_type"] == "plprune_llama"
    assert config_of(out)["plprune_extra_bias"] == ["mlp.down_proj", "self_attn.o_proj"]
    assert difference(out, made.model) <= TOLERANCE


def test_biases_in_some_layers_only(tmp_path: Path):
    made = with_bias(single("qwen3-gqa"), ("layers.1.self_attn.o_proj",), mlp=24)
    assert config_of(made.save(tmp_path / "one"))["model_type"] == "qwen3"
    assert difference(tmp_path / "one", made.model) <= TOLERANCE
    made = with_bias(single("qwen2-gqa"), ("layers.1.mlp.down_proj",), mlp=24)
    assert config_of(made.save(tmp_path / "two"))["plprune_extra_bias"] == ["mlp.down_proj"]
    assert difference(tmp_path / "two", made.model) <= TOLERANCE


def test_comparison_notices_a_corrupted_export(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    made = pruned(single("llama-gqa"), mlp=24)
    out = made.save(tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 0.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert difference(out, made.model) > TOLERANCE


FRESH = """
import json, sys
from pathlib import Path

class Block:  # plprune may be installed where the tests run
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("plprune", "lightning"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    wanted = torch.load(folder / "wanted.pt", weights_only=True)
    trust = (folder / "modeling_plprune.py").exists()
    options = dict(trust_remote_code=trust, output_loading_info=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = wanted["ids"]
    greedy = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        off = (model(ids).logits - wanted["logits"]).abs().max().item()
    cached, plain = (model.generate(ids, use_cache=use, **greedy) for use in (True, False))
    base = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    results[folder.name] = dict(
        off=off,
        same=torch.equal(cached, plain),
        clean=not any(info.values()),
        cls=type(model).__name__,
        base=type(base).__name__,
        tied=model.get_input_embeddings().weight is model.lm_head.weight,
        attention=model._supports_attention_backend,
        causal=all(m.is_causal for m in model.modules() if hasattr(m, "is_causal")),
    )
assert "plprune" not in sys.modules
print(json.dumps(results))
"""


def test_fresh_process_without_plprune(tmp_path: Path):
    exports = tmp_path / "exports"
    for name in tiny.ONE_PER_FAMILY:
        for mode, widths in (("plain", {"mlp": 24}), ("heads", {"kv_group": 2}), ("per_layer", {})):
            made = pruned(single(name), **widths)
            out = made.save(exports / f"{name}.{mode}")
            torch.save({"ids": tiny.tokens(), "logits": logits(made.model)}, out / "wanted.pt")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", FRESH, str(exports)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 3 * len(tiny.ONE_PER_FAMILY)
    for name, result in results.items():
        assert result["off"] <= TOLERANCE, name
        assert result["same"], name
        assert result["clean"], name
        assert result["attention"], name
        assert result["causal"], name
        variant, mode = name.split(".")
        assert result["tied"] is tiny.VARIANTS[variant].tied, name
        assert result["cls"].startswith("Plprune") or mode != "per_layer", name
        assert result["base"].startswith("Plprune") == result["cls"].startswith("Plprune"), name


# --- the per-layer class -------------------------------------------------------------------------


def test_per_layer_config_is_sparse_with_the_widest_on_top(tmp_path: Path):
    dense = describe(model := single("llama-gqa"))
    plan = oracles.plan_of(dense, {"layers.0.kv_group": [0, 2], "layers.1.mlp": range(17)})
    config = config_of(pruned(model, plan).save(tmp_path / "out"))
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "1": {"intermediate_size": 17},
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
    assert config["intermediate_size"] == tiny.FFN
    assert config["allow_global_per_layer_attribute_access"] is True


def test_global_reads_stay_refused_where_only_the_mlp_differs(tmp_path: Path):
    dense = describe(model := single("llama-gqa"))
    out = pruned(model, oracles.plan_of(dense, {"layers.1.mlp": range(17)})).save(tmp_path / "out")
    config = load_hf(out, trust_remote_code=True).config
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.intermediate_size
    assert [layer.intermediate_size for layer in config.per_layer_config] == [tiny.FFN, 17]


def test_attention_implementation_reaches_every_layer(tmp_path: Path):
    made = pruned(single("phi3-gqa"))
    loaded = load_hf(made.save(tmp_path / "out"), trust_remote_code=True)
    loaded.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in loaded.modules() if hasattr(m, "config")} == {
        "eager"
    }
    assert torch.allclose(logits(loaded), logits(made.model), atol=TOLERANCE)


def test_per_layer_model_from_its_config_trains(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    made = pruned(single("opt-mha"))
    loaded = load_hf(made.save(tmp_path / "out"), trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=True)
    fresh(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert all(p.grad is not None and p.isfinite().all() for p in fresh.parameters())
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in loaded.parameters())


def test_loaded_per_layer_model_saves_itself(tmp_path: Path):
    made = pruned(single("gpt_neox-mha"))
    loaded = load_hf(made.save(tmp_path / "out"), trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    assert difference(tmp_path / "again", made.model) <= TOLERANCE


def test_modeling_file_is_short_and_self_contained():
    source = export_config.modeling_source()
    assert len(source.splitlines()) < 220
    tree = ast.parse(source)
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported == {"copy", "torch", "transformers"}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert len([name for name in classes if name.startswith("Plprune")]) == 3 * len(tiny.FAMILIES)


# --- the folder ----------------------------------------------------------------------------------


def test_sidecar_and_card(tmp_path: Path):
    made = pruned(single("llama-gqa"))
    card = CardInfo(
        base_model="org/base",
        licence="apache-2.0",
        method="Wanda",
        hyper={"alpha": 0.5},
        budget={"keep": 0.8},
        seed=3,
        data_hash="abc",
        protocol="40 windows of 1024 tokens",
        dataset="WikiText-2",
        perplexity=12.5,
        dense_perplexity=10.0,
        scores={"piqa acc": 0.71},
    )
    out = made.save(tmp_path / "small-model", card=card)
    structure = read_structure(out)
    assert structure is not None
    assert {k: structure[k] for k in made.structure} == made.structure
    assert structure["export"] == "per_layer"
    assert (structure["method"], structure["seed"], structure["data_hash"]) == ("Wanda", 3, "abc")
    assert structure["versions"]["torch"] == version("torch")
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front)
    assert (meta["base_model"], meta["base_model_relation"]) == ("org/base", "finetune")
    assert (meta["library_name"], meta["license"]) == ("transformers", "apache-2.0")
    assert meta["tags"] == ["pruned", "plprune", "wanda"]
    assert meta["model-index"][0]["results"][0]["metrics"] == [
        {"type": "perplexity", "value": 12.5}
    ]
    for text in (
        "# small-model",
        "trust_remote_code=True",
        'target_modules=["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_pro',
        "12.50 (dense model: 10.00)",
        "Protocol: 40 windows of 1024 tokens.",
        "piqa acc: 0.71",
        "| 0 |",
    ):
        assert text in body


def test_card_without_knowledge_and_with_a_path_as_base(tmp_path: Path):
    out = pruned(single("llama-gqa"), mlp=24).save(tmp_path / "a")
    text = (out / "README.md").read_text()
    assert "base_model" not in text
    assert "model-index" not in text
    assert "| all | 40 -> 24 |" in text
    assert "trust_remote_code" not in text
    assert "Not measured." in text
    out = pruned(single("llama-gqa"), mlp=24).save(
        tmp_path / "b", card=CardInfo(base_model="/home/me/base")
    )
    for file in ("README.md", STRUCTURE_FILE, "config.json"):
        assert "/home" not in (out / file).read_text()
    assert "`base`" in (out / "README.md").read_text()


def test_tokenizer_generation_config_and_reports(tmp_path: Path):
    from transformers import AutoTokenizer, GenerationConfig

    from tiny_tokenizer import tiny_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    report = tmp_path / "somewhere.html"
    report.write_text("<p>")
    for number, made in enumerate((pruned(many_heads(), kv_group=24), pruned(single("llama-gqa")))):
        out = made.save(
            tmp_path / str(number),
            tokenizer=tokenizer,
            # Refused by save_pretrained (no sampling, but a temperature), yet common.
            generation_config=GenerationConfig(temperature=0.7, eos_token_id=[2, 5]),
            report_files={"report.html": report},
        )
        again = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
        assert again("naïve text")["input_ids"] == tokenizer("naïve text")["input_ids"]
        assert again.chat_template == tokenizer.chat_template
        assert (out / "report.html").read_text() == "<p>"
        assert load_hf(out, trust_remote_code=True).generation_config.eos_token_id == [2, 5]


def test_shards_and_index(tmp_path: Path):
    made = pruned(single("llama-gqa-tied"), mlp=24)
    out = made.save(tmp_path / "out", max_shard_bytes=20_000)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((out / file).stat().st_size < 30_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in made.model.parameters())
    assert difference(out, made.model) <= TOLERANCE


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_are_as_readable_as_the_umask_says(umask: int, tmp_path: Path, made: Pruned):
    before = os.umask(umask)
    try:
        made.save(tmp_path / "one")
        made.save(tmp_path / "many", max_shard_bytes=50_000)
    finally:
        os.umask(before)
    files = list(tmp_path.glob("*/*.safetensors"))
    assert len(files) > 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_dtype(tmp_path: Path):
    made = pruned(tiny.model("llama-gqa", dtype=torch.bfloat16), mlp=24)
    assert config_of(made.save(tmp_path / "own"))["dtype"] == "bfloat16"
    assert load_hf(tmp_path / "own").dtype == torch.bfloat16
    assert load_hf(tmp_path / "own", dtype=torch.float32).dtype == torch.float32
    made.save(tmp_path / "wide", dtype=torch.float32)
    assert load_hf(tmp_path / "wide").dtype == torch.float32
    made.model.model.norm.float()  # the widest format that occurs holds everything
    assert config_of(made.save(tmp_path / "mixed"))["dtype"] == "float32"


def test_head_untied_in_memory_is_written(tmp_path: Path):
    made = pruned(single("llama-gqa-tied"), mlp=24)
    made.model.lm_head.weight = nn.Parameter(made.model.lm_head.weight * 2)
    out = made.save(tmp_path / "out")
    assert config_of(out)["tie_word_embeddings"] is False
    assert difference(out, made.model) <= TOLERANCE


def test_training_settings_do_not_travel(tmp_path: Path):
    made = pruned(single("llama-gqa"), mlp=24)
    made.model.config.use_cache = False
    made.model.train()
    assert config_of(made.save(tmp_path / "out"))["use_cache"] is True
    assert made.model.config.use_cache is False
    assert made.model.training


@pytest.mark.parametrize("name", ["llama-gqa", "opt-mha", "phi3-gqa"])
@pytest.mark.parametrize("widths", [{"kv_group": 2}, {}], ids=["uniform", "layers"])
def test_round_trip(name: str, widths: dict[str, int], tmp_path: Path):
    first = pruned(single(name), **widths)
    loaded = load_hf(
        first.save(tmp_path / "one", card=CardInfo(method="A")), trust_remote_code=True
    )
    assert describe(loaded).blocks == first.spec.blocks
    second = pruned(loaded, mlp=1)
    out = second.save(tmp_path / "two")
    assert difference(out, second.model) <= TOLERANCE
    third = pruned(load_hf(out, trust_remote_code=True), kv_group=1)
    structure = read_structure(third.save(tmp_path / "three"))
    assert structure is not None
    assert [parent["kept"] for parent in structure["parents"]] == [
        first.structure["kept"],
        second.structure["kept"],
    ]
    assert structure["parents"][0]["method"] == "A"
    assert not any("parents" in parent for parent in structure["parents"])


def test_cut_to_uniform_widths_again_is_plain(tmp_path: Path):
    loaded = load_hf(pruned(single("llama-gqa")).save(tmp_path / "one"), trust_remote_code=True)
    made = pruned(loaded, kv_group=1, query_in_group=1, mlp=1)
    out = made.save(tmp_path / "two")
    assert config_of(out)["model_type"] == "llama"
    assert not {"auto_map", "per_layer_config", "plprune_base_model_type", "skip"} & set(
        config_of(out)
    )
    assert difference(out, made.model) <= TOLERANCE


def test_merged_and_wrapped_models_are_exported(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    made = pruned(single("llama-gqa"), mlp=24)
    peft = get_peft_model(
        made.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    made.model = torch.compile(peft.merge_and_unload(), backend="eager")
    assert difference(made.save(tmp_path / "out"), made.model._orig_mod) <= TOLERANCE


# --- refusals ------------------------------------------------------------------------------------


def refuse(made: Pruned, target: Path, message: str, **options: Any) -> None:
    """`save_hf` refuses with the message and leaves nothing behind."""
    before = sorted(target.parent.iterdir()) if target.parent.is_dir() else None
    with pytest.raises(ExportError) as caught:
        made.save(target, **options)
    assert message in str(caught.value)
    if before is not None:
        assert sorted(target.parent.iterdir()) == before


@pytest.fixture
def made() -> Pruned:
    return pruned(single("llama-gqa"), mlp=24)


def test_refuses_adapters(tmp_path: Path, made: Pruned):
    from peft import LoraConfig, get_peft_model

    made.model = get_peft_model(made.model, LoraConfig(target_modules=["q_proj"]))
    refuse(
        made,
        tmp_path / "out",
        "the model still has adapters: given "
        "model.layers.0.self_attn.q_proj.lora_A.default.weight and 3 more; allowed merged weights; "
        "fix: merge them first: model = model.merge_and_unload()",
    )


def test_refuses_masks(tmp_path: Path):
    model = single("llama-gqa")
    dense = describe(model)
    spec = dense.cut(lower(oracles.uniform_plan(dense, {"mlp": 24}), dense), physical=False)
    refuse(
        Pruned(model, spec, structure_of(spec, dense)),
        tmp_path / "out",
        "the model is masked, not cut: given 6 masked ends of linears; "
        "allowed a model whose removed units are gone; fix: commit the masks first",
    )


def test_refuses_another_spec(tmp_path: Path, made: Pruned):
    other = pruned(single("llama-gqa"), mlp=16)
    for spec, structure in ((other.spec, other.structure), (made.spec, other.structure)):
        mixed = Pruned(made.model, spec, structure)
        refuse(
            mixed,
            tmp_path / "out",
            "model, spec and structure do not belong together: given structure",
        )


def test_refuses_numbers_that_are_not_finite(tmp_path: Path, made: Pruned):
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        made.model.get_parameter(name)[3, 2:4] = float("nan")
    refuse(
        made,
        tmp_path / "out",
        f"{name} is not finite: given 2 of 1152 entries are nan or inf; allowed finite weights; "
        "fix: train with a lower learning rate, or take the last good checkpoint",
    )
    with torch.no_grad():
        made.model.get_parameter(name)[3, 2:4] = 1e6
    refuse(made, tmp_path / "out", "as torch.float16", dtype=torch.float16)
    refuse(
        made,
        tmp_path / "out",
        "cannot export in this number format: given torch.int8",
        dtype=torch.int8,
    )


def test_refuses_tensors_without_data(tmp_path: Path, made: Pruned):
    made.model.model.norm.weight = nn.Parameter(torch.empty(0))
    refuse(
        made, tmp_path / "out", "model.norm.weight has no data to write: given a tensor of size 0"
    )
    made.model.model.norm.weight = nn.Parameter(torch.empty(48, device="meta"))
    refuse(made, tmp_path / "out", "given a tensor on the meta device, shape (48,)")


def test_refuses_what_no_class_holds(tmp_path: Path, made: Pruned):
    made.model.model.layers[0].adapter = nn.Linear(3, 3)
    refuse(
        made,
        tmp_path / "out",
        "the model has parts that the export cannot hold: given no place for "
        "model.layers.0.adapter.bias and 1 more",
    )


def test_refuses_plain_where_layers_differ(tmp_path: Path):
    dense = describe(model := single("llama-gqa"))
    plan = oracles.plan_of(dense, {"layers.0.kv_group": [0, 2], "layers.1.mlp": range(17)})
    refuse(
        pruned(model, plan),
        tmp_path / "out",
        "no stock class can hold the pruned model: "
        "given layers differ: heads 4..6, kv_heads 2..3, ffn 17..40; "
        "allowed equal widths in all layers and a head count the stock class can load; "
        "fix: set `mode: per_layer`, or prune to other widths",
        mode="plain",
    )


@pytest.mark.parametrize("name", ["opt-mha", "gpt_neox-mha"])
def test_refuses_plain_where_the_head_width_is_derived(name: str, tmp_path: Path):
    refuse(pruned(single(name), kv_group=4), tmp_path / "out", "ForCausalLM: ", mode="plain")
    refuse(pruned(single(name), kv_group=3), tmp_path / "out", " has (", mode="plain")


def test_refuses_unknown_modes_and_options(tmp_path: Path, made: Pruned):
    refuse(
        made,
        tmp_path / "out",
        "unknown export mode: given 'fast'; allowed auto, plain, per_layer",
        mode="fast",
    )
    with pytest.raises(TypeError, match="tokeniser"):
        made.save(tmp_path / "out", tokeniser=None)


def test_refuses_an_existing_target(tmp_path: Path, made: Pruned):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("x")
    refuse(
        made,
        target,
        f"the export's target exists: given {target}; allowed a new folder; "
        "fix: choose another directory, or replace this one with --overwrite (overwrite: true)",
    )
    refuse(
        made, target, "will not overwrite something that is no export of plprune", overwrite=True
    )
    assert (target / "precious.txt").exists()
    (target / "precious.txt").unlink()
    made.save(target, overwrite=True)


def test_overwrite_replaces_an_export(tmp_path: Path, made: Pruned):
    made.save(tmp_path / "out")
    other = pruned(single("llama-gqa"), mlp=16)
    other.save(tmp_path / "out", overwrite=True)
    assert difference(tmp_path / "out", other.model) <= TOLERANCE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_refuses_an_impossible_parent(
    tmp_path: Path, made: Pruned, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    refuse(made, tmp_path / "file" / "out", "cannot write beside the export's target: given ")
    # A superuser may write anywhere, so the read-only folder is a simulated one.
    monkeypatch.setattr(
        export_folder.tempfile, "mkdtemp", raising(PermissionError(13, "Permission denied"))
    )
    refuse(
        made,
        tmp_path / "out",
        f"given {tmp_path} (Permission denied); allowed a folder this process may write to",
    )


def raising(error: BaseException) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_writes_leave_no_trace(
    error: BaseException, tmp_path: Path, made: Pruned, monkeypatch: pytest.MonkeyPatch
):
    old = pruned(single("llama-gqa"), mlp=16)
    old.save(tmp_path / "old")
    monkeypatch.setattr(export, "write_shards", raising(error))
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises((KeyboardInterrupt, ExportError)) as caught:
            made.save(tmp_path / name, overwrite=overwrite)
        if isinstance(error, OSError):
            assert "the export could not be written: given [Errno 28] No space left" in str(
                caught.value
            )
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert difference(tmp_path / "old", old.model) <= TOLERANCE


def test_failed_rename_puts_the_old_export_back(
    tmp_path: Path, made: Pruned, monkeypatch: pytest.MonkeyPatch
):
    made.save(tmp_path / "out")
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "out" and target.name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(ExportError, match="could not be written"):
        made.save(tmp_path / "out", overwrite=True)
    assert difference(tmp_path / "out", made.model) <= TOLERANCE


def test_refuses_a_full_disk_early(tmp_path: Path, made: Pruned, monkeypatch: pytest.MonkeyPatch):
    usage = copy.copy(export.shutil.disk_usage(tmp_path))._replace(free=10)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage)
    refuse(
        made,
        tmp_path / "out",
        "not enough space for the export: given 1e-05 MB free; allowed at least",
    )


def test_refuses_report_names_it_uses_itself(tmp_path: Path, made: Pruned):
    report = tmp_path / "r.html"
    report.write_text("")
    for name in ("config.json", "sub/report.html"):
        refuse(
            made,
            tmp_path / "out",
            f"a report cannot be stored under this name: given {name}; allowed a plain file name",
            report_files={name: report},
        )
    refuse(
        made,
        tmp_path / "out",
        f"a report file is missing: given {tmp_path / 'missing'}; allowed existing files",
        report_files={"report.html": tmp_path / "missing"},
    )
