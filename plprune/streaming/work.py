"""The folder of a run that goes on where it was killed: finished blocks, what they lost, a plan.

A block is finished when its JSON file is there: weights are written first, each file under a
temporary name.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from plprune.errors import ExportError, ModelError, first_line
from plprune.files import write_json
from plprune.observe import StatMap
from plprune.plan import Keep, Plan
from plprune.stats.base import Tap
from plprune.stream import Stored

SETTINGS, PLAN, NOTES = "settings.json", "plan.json", "notes.json"


class Work:
    """Finished blocks in a folder beside the export's target."""

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        """Open the folder of an earlier run with the same settings, or begin one.

        Args:
            target: of the export.
            settings: everything the result depends on, plain values.

        Raises:
            ExportError: if there is a folder of a run with other settings, or none can be made.
        """
        self.folder = target.parent / f".{target.name}.unfinished"
        known = self.folder / SETTINGS
        wanted = json.loads(json.dumps(dict(settings), default=str))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if known.is_file():
                self._require_same(json.loads(known.read_text("utf-8")), wanted)
            else:
                write_json(known, wanted)
        except (OSError, json.JSONDecodeError) as error:
            raise ExportError(
                "cannot work beside the target",
                given=f"{self.folder} ({first_line(error)})",
                allowed="a folder this process may write to",
                fix="choose another --output, or remove a damaged folder",
            ) from error

    def _require_same(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if other:
            name = other[0]
            raise ExportError(
                "an unfinished run with other settings is in the way",
                given=f"{name}: {wanted.get(name)!r} now, {found.get(name)!r} in {self.folder}",
                allowed="the same settings, to go on with it",
                fix=f"go on with those, or remove {self.folder} to start again",
            )

    def finished(self) -> int:
        """Blocks that need no more work, from the first on."""
        number = 0
        while self._facts(number).is_file():
            number += 1
        return number

    def facts(self, number: int) -> dict[str, Any]:
        """What was noted of a finished block.

        Args:
            number: which.
        """
        found: dict[str, Any] = json.loads(self._facts(number).read_text("utf-8"))
        return found

    def keep(
        self,
        number: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> dict[str, Stored]:
        """Write a finished block.

        Args:
            number: which.
            tensors: its tensors by name.
            facts: plain values beside them.

        Returns:
            Where the tensors are now.

        Raises:
            ExportError: if the disk does not take them.
        """
        from safetensors.torch import save_file

        path = self._weights(number)
        made = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            part = path.with_suffix(".part")
            save_file(made, str(part), {"format": "pt"})
            part.replace(path)
            write_json(self._facts(number), dict(facts))
        except Exception as error:  # safetensors raises errors of its own
            raise ExportError(
                "a finished block cannot be written",
                given=f"{path} ({first_line(error)})",
                fix="free some space, then start again: finished blocks are kept",
            ) from error
        return self.places(number)

    def places(self, number: int) -> dict[str, Stored]:
        """Where the tensors of a finished block are.

        Args:
            number: which.

        Raises:
            ModelError: if the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._weights(number)
        opener: Any = safe_open
        found = {}
        try:
            with opener(str(path), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (no mapping)
                    shape = tuple(handle.get_slice(name).get_shape())
                    found[name] = Stored(file=path, name=name, shape=shape)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                "a finished block cannot be read",
                given=f"{path} ({first_line(error)})",
                fix=f"remove {self.folder} to start again",
            ) from error
        return found

    def keep_plan(self, plan: Plan) -> None:
        """Write a plan of `Keep` edits.

        Args:
            plan: for the whole model.
        """
        edits = {edit.axis: edit.kept.tolist() for edit in plan.edits if isinstance(edit, Keep)}
        value = {
            "fingerprint": plan.fingerprint,
            "method": plan.method,
            "hash": plan.hash,
            "kept": edits,
            "got": {kind: list(widths) for kind, widths in plan.got.items()},
            "calibration": plan.calibration,
        }
        write_json(self.folder / PLAN, value)

    def plan(self) -> Plan | None:
        """The plan an earlier run made; None if it made none."""
        path = self.folder / PLAN
        if not path.is_file():
            return None
        value = json.loads(path.read_text("utf-8"))
        kept = value["kept"].items()
        return Plan(
            edits=tuple(Keep(axis=n, kept=torch.tensor(k, dtype=torch.int64)) for n, k in kept),
            fingerprint=value["fingerprint"],
            method=value["method"],
            got={kind: tuple(widths) for kind, widths in value["got"].items()},
            calibration=value["calibration"],
        )

    def keep_stats(self, number: int, stats: StatMap) -> None:
        """Write what was seen in a block of the dense model.

        Args:
            number: of the block.
            stats: sums over all ranks.
        """
        from safetensors.torch import save_file

        tensors = {
            "|".join(
                (tap.module, tap.stat.__module__, tap.stat.__name__, field, tap.side, tap.until)
            ): value
            for tap, stat in stats.items()
            for field, value in vars(stat).items()
        }
        path = self.folder / f"seen-{number:05d}.safetensors"
        part = path.with_suffix(".part")
        save_file(tensors, str(part), {"format": "pt"})
        part.replace(path)

    def stats(self, number: int) -> StatMap | None:
        """What an earlier run saw in a block; None if it did not come there.

        Args:
            number: of the block.
        """
        from safetensors.torch import load_file

        path = self.folder / f"seen-{number:05d}.safetensors"
        if not path.is_file():
            return None
        fields: dict[Tap, dict[str, Tensor]] = {}
        for name, value in load_file(str(path)).items():
            module, home, kind, one, *where = name.split("|")
            stat = getattr(importlib.import_module(home), kind)
            side, until = where or ("input", "")  # files of earlier versions say no more
            tap = Tap(module=module, stat=stat, side=cast(Any, side), until=until)
            fields.setdefault(tap, {})[one] = value
        return {tap: tap.stat(**values) for tap, values in fields.items()}

    def keep_note(self, number: int, note: float) -> None:
        """Write what an allocation notes of a block of the dense model.

        Args:
            number: of the block; those before it are there.
            note: a number.
        """
        notes = [*self.notes()[:number], note]
        write_json(self.folder / NOTES, notes)

    def notes(self) -> list[float]:
        """What an earlier run noted, from the first block on."""
        path = self.folder / NOTES
        found: list[float] = json.loads(path.read_text("utf-8")) if path.is_file() else []
        return found

    def remove(self) -> None:
        """Throw the folder away: the export is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _weights(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.safetensors"

    def _facts(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.json"
