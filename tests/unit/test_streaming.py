"""Blocks one at a time = the model at once; hidden states in files = in memory."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from plprune.errors import DataError
from plprune.streaming.blocks import FromFiles, Held
from plprune.streaming.calls import Known, blocks_of, finish, record
from plprune.streaming.hidden import InMemory, OnDisk
from plprune.streaming.opened import open_model


def padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", list(tiny.VARIANTS))
@pytest.mark.parametrize("mask", [False, True])
def test_block_by_block_is_the_models_own_forward(name: str, mask: bool):
    model = tiny.model(name).eval()
    batch = padded(tiny.tokens()) if mask else {"input_ids": tiny.tokens()}
    hidden, calls = record(model, batch, Known())
    with torch.no_grad():
        for block, call in zip(blocks_of(model), calls, strict=True):
            hidden = call.run(block, hidden)
        logits = finish(model, batch, hidden)
        some = torch.tensor([4, 1])
        torch.testing.assert_close(finish(model, batch, hidden, some), logits[:, some])
        assert torch.equal(logits, model(**batch).logits)
    assert all("forward" not in vars(block) for block in blocks_of(model))


def test_equal_arguments_are_kept_once():
    model, known = tiny.model("gemma3-gqa-tied").eval(), Known()
    first = record(model, {"input_ids": tiny.tokens(seed=0)}, known)[1]
    again = record(model, {"input_ids": tiny.tokens(seed=1)}, known)[1]
    for one, two in zip(first, again, strict=True):
        for key, value in one.kwargs.items():
            if isinstance(value, tuple):
                assert all(a is b for a, b in zip(value, two.kwargs[key], strict=True))


@pytest.fixture(params=["llama-gqa-tied", "gemma3-mqa", "phi3-gqa", "gpt_neox-mha"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    model = tiny.model(request.param, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_blocks_from_files_compute_what_the_model_computes(stored: tuple[nn.Module, Path]):
    model, folder = stored
    source = FromFiles(*open_model(folder))
    batch = padded(tiny.tokens())
    with source.outside():
        hidden, calls = record(source.model, batch, Known())
    with torch.no_grad():
        for number in range(len(source)):
            with source.block(number) as block:
                there = [n for n, p in source.model.named_parameters() if not p.is_meta]
                assert there
                assert all(name.startswith(source.prefix(number)) for name in there)
                hidden = calls[number].run(block, hidden)
        with source.outside():
            assert torch.equal(finish(source.model, batch, hidden), model(**batch).logits)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert source.spec.fingerprint == Held(model).spec.fingerprint


def test_tied_tensors_stay_tied(tmp_path: Path):
    tiny.model("llama-gqa-tied", dtype=torch.float32).save_pretrained(tmp_path)
    source = FromFiles(*open_model(tmp_path))
    with source.outside():
        assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
        assert not source.model.lm_head.weight.is_meta
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight


# --- hidden states -------------------------------------------------------------------------------


def first() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 4), (1, 5, 4), (2, 3, 4)]
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def advanced(hidden: InMemory | OnDisk, block: int) -> None:
    for number in range(len(hidden)):
        hidden.put(number, hidden[number] * 2 + 1)
    hidden.advance(block)


def test_files_hold_what_memory_holds(tmp_path: Path):
    memory, disk = InMemory(first()), OnDisk(tmp_path, first())
    for block in (1, 2, 3):
        advanced(memory, block)
        advanced(disk, block)
        assert len(disk) == len(memory) == 3
        assert all(torch.equal(disk[n], memory[n]) for n in range(3))
    assert [path.name for path in tmp_path.glob("*.bin")] == ["hidden-00003.bin"]


def test_files_go_on_at_their_block(tmp_path: Path):
    one = OnDisk(tmp_path, first())
    advanced(one, 1)
    one.put(0, one[0] * 7)  # of a block that was not finished
    assert OnDisk.kept(tmp_path) == 1
    two = OnDisk(tmp_path, first(), OnDisk.kept(tmp_path))
    assert all(torch.equal(two[n], one[n]) for n in range(3))
    assert torch.equal(two[0], first()[0] * 2 + 1)


def test_files_of_another_set_are_refused(tmp_path: Path):
    advanced(OnDisk(tmp_path, first()), 1)
    with pytest.raises(DataError, match="another calibration set"):
        OnDisk(tmp_path, first()[:2], 1)
