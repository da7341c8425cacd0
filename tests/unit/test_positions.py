"""Sequences longer than a model knows positions."""

import logging

import pytest

import tiny
from plprune.errors import DataError
from plprune.positions import require_positions


def test_a_table_of_positions_has_an_end():
    model = tiny.model("opt-mha")
    require_positions(model, 64, "data.seq_len")
    with pytest.raises(DataError, match=r"given data.seq_len: 65; allowed 1\.\.64"):
        require_positions(model, 65, "data.seq_len")


def test_computed_positions_are_only_warned_of(caplog: pytest.LogCaptureFixture):
    model = tiny.model("llama-gqa")
    with caplog.at_level(logging.WARNING):
        require_positions(model, 64, "data.seq_len")
        assert caplog.text == ""
        require_positions(model, 65, "data.seq_len")
    assert "data.seq_len is 65, the model was trained on 64 tokens at most" in caplog.text
