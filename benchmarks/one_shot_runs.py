"""The runs of `one_shot.py`, and what peers reached.

Peers' values were measured once, side by side, on SmolLM2-135M-Instruct without any retraining:
each project's own code where it runs, on one machine and one text (WikiText-2 raw test, windows of
1024 tokens, no BOS), all on the same 32 x 512 tokens of WikiText-2's validation text, whose <unk>
words were left out. Ratios are of the 106,203,456 parameters outside the embedding, zeros of the
blocks' linears. One seed, one model: less than 3 % between two of them says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DENSE = {12: 26.42, 20: 23.48, 40: 24.46}
"""Perplexity of the dense model by number of windows, where the peers were measured."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What another project reached."""

    name: str
    """Project, revision and setting."""
    values: Mapping[int, float]
    """Perplexity by number of windows."""

    @property
    def windows(self) -> int:
        """The most it was measured on."""
        return max(self.values)

    def says(self) -> str:
        """In one line."""
        shown = ", ".join(f"{value} on {count}" for count, value in self.values.items())
        return f"{shown} windows ({self.name})"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row."""

    name: str
    """Of the row."""
    method: str
    """Class path below `plprune`."""
    keep: float
    """Share that stays."""
    base: str = "non_embedding"
    """Of what."""
    init: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters."""
    compensation: str | None = None
    """Class path below `plprune`."""
    repair: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the compensation."""
    peer: Peer | None = None
    """Does the same; None for controls."""
    seeded: bool = False
    """Whether the method draws numbers."""

    def settings(self, seed: int) -> dict[str, Any]:
        """The `prune` section of a config.

        Args:
            seed: of the calibration draw, and of the method if it draws.
        """
        init = {**self.init, **({"seed": seed} if self.seeded else {})}
        made: dict[str, Any] = {"method": {"class_path": f"plprune.{self.method}"}}
        if init:
            made["method"]["init_args"] = init
        made["budget"] = {"keep": self.keep, "base": self.base}
        if self.base != "prunable":
            made["budget"]["multiple_of"] = {"mlp": 1}
        if self.compensation is not None:
            made["compensation"] = {"class_path": f"plprune.{self.compensation}"}
            if self.repair:
                made["compensation"]["init_args"] = dict(self.repair)
        return made

    def classes(self) -> Iterator[str]:
        """Class paths it needs."""
        yield f"plprune.{self.method}"
        if self.compensation is not None:
            yield f"plprune.{self.compensation}"
        if "allocation" in self.init:
            yield self.init["allocation"]["class_path"]


def _allocation(path: str, **init: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"class_path": f"plprune.{path}"}
    return {"allocation": made | ({"init_args": init} if init else {})}


_WANDA = Peer(name="locuslab/wanda 8e8fc87", values={40: 51.32})
_SPARSEGPT = Peer(
    name="SparseGPT, wanda's copy of the class", values={12: 47.69, 20: 40.70, 40: 41.69}
)
_BESA = Peer(name="BESA 4158d77, rows, 49.7 % zeros", values={12: 47.93})
_MAGNITUDE = Peer(name="locuslab/wanda 8e8fc87, a linear at a time", values={40: 566.42})
_FLAP = {
    0.8: Peer(name="FLAP 3bb57db, WIFV AL-AM", values={40: 37.37}),
    0.5: Peer(name="FLAP 3bb57db, WIFV AL-AM", values={40: 542.47}),
}
_RIDGE = {
    0.8: Peer(name="FLAP's mask and a ridge refit, our reference", values={40: 34.16}),
    0.5: Peer(name="FLAP's mask and a ridge refit, our reference", values={12: 184.58}),
}
_TAYLOR = {
    0.8: Peer(name="LLM-Pruner 128a07d, blocks 3 to 28", values={12: 42.76, 20: 37.19, 40: 38.53}),
    0.5: Peer(name="LLM-Pruner 128a07d, blocks 3 to 28", values={12: 250.99}),
}
_HALF = {"keep": 0.5, "base": "prunable"}
_SPARE = _allocation("allocation.Uniform", spare=[3, 1])
_OWL = _allocation("outliers.OutlierWeighed")
_OURS = _allocation("allocation.MeasuredLoss", sequences=4)

RUNS = (
    Run(name="magnitude-50", method="methods.magnitude.Magnitude", peer=_MAGNITUDE, **_HALF),
    Run(
        name="magnitude-row-50", method="methods.magnitude.Magnitude", init={"pattern": "row"},
        peer=_MAGNITUDE, **_HALF,
    ),
    Run(
        name="magnitude-2of4", method="methods.magnitude.Magnitude", init={"pattern": "2:4"},
        peer=Peer(name="locuslab/wanda 8e8fc87", values={12: 1871.82}), **_HALF,
    ),
    Run(name="wanda-50", method="methods.wanda.Wanda", peer=_WANDA, **_HALF),
    Run(name="wanda-owl-50", method="methods.wanda.Wanda", init=_OWL, peer=_BESA, **_HALF),
    Run(
        name="wanda-2of4", method="methods.wanda.Wanda", init={"pattern": "2:4"},
        peer=Peer(name="locuslab/wanda 8e8fc87", values={12: 182.18, 20: 146.87}), **_HALF,
    ),
    Run(name="sparsegpt-50", method="methods.sparsegpt.SparseGPT", peer=_SPARSEGPT, **_HALF),
    Run(
        name="sparsegpt-owl-50", method="methods.sparsegpt.SparseGPT", init=_OWL,
        peer=_SPARSEGPT, **_HALF,
    ),
    Run(
        name="sparsegpt-2of4", method="methods.sparsegpt.SparseGPT", init={"pattern": "2:4"},
        peer=Peer(
            name="SparseGPT, wanda's copy of the class", values={12: 86.20, 20: 69.38, 40: 68.80}
        ),
        **_HALF,
    ),
    *(
        Run(
            name=f"flap{name}-{round(100 * (1 - keep))}", method="methods.flap.FLAP", keep=keep,
            compensation=compensation, peer=peer[keep],
        )
        for keep in (0.8, 0.5)
        for name, compensation, peer in (
            ("", "compensate.MeanBias", _FLAP),
            ("-bare", None, _FLAP),
            ("-refit", "compensate.LeastSquares", _RIDGE),
        )
    ),
    Run(
        name="taylor-20", method="methods.taylor.Taylor", keep=0.8,
        init={"attention": "none", **_SPARE}, peer=_TAYLOR[0.8],
    ),
    Run(name="taylor-50", method="methods.taylor.Taylor", keep=0.5, init=_SPARE, peer=_TAYLOR[0.5]),
    Run(
        name="depth-20", method="methods.depth.Depth", keep=0.8, base="blocks",
        peer=Peer(name="ShortGPT's influence, 6 of 30 blocks, our reference", values={40: 63.04}),
    ),
    Run(name="random-20", method="methods.random.Random", keep=0.8, seeded=True),
    *(
        Run(
            name=f"ours-{round(100 * (1 - keep))}", method="methods.flap.FLAP", keep=keep,
            init=init, compensation="compensate.LeastSquares", repair={"drift": 0.35},
            peer=_RIDGE[keep],
        )
        for keep, init in ((0.8, _OURS), (0.5, {}))
    ),
)  # fmt: skip
"""In the order they are run."""
