"""DeepSpeed ZeRO for Lightning, on any device, with the accumulation of every other strategy.

Lightning's own strategy refuses all but CUDA, and under gradient accumulation it divides the loss
twice (once in the loop, once in the engine) and counts micro-batches across epochs, so that
the engine's boundaries drift away from the trainer's. Here the trainer owns the boundary, and the
loss is divided once, on every device. On CUDA everything else is Lightning's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import Tensor, nn

from plprune.lit.strategies.engine import give_timeout, kept_hooks, teardown
from plprune.lit.strategies.usable import require_elementwise, require_engine


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a module's `configure_optimizers` returned, without tensors."""

    optimizer: str
    """Its class."""
    groups: list[dict[str, Any]]
    """Hyperparameters of every group."""
    schedulers: list[str]
    """Classes of schedulers."""


class ZeRO(DeepSpeedStrategy):
    """ZeRO stage 1, 2 or 3; arguments as Lightning's `DeepSpeedStrategy`."""

    strategy_name = "zero"
    group_names: list[list[str]]
    """Names in the LightningModule of the parameters of every optimizer group that has some."""
    told: Told | None = None
    """Of the optimizer of the run: engines wrap it, and the last one has none."""
    _reused: tuple[Any, Any] | None = None

    def require_usable(self) -> None:
        """Refuse a DeepSpeed config that does not go with cuts; see `require_engine`."""
        if not self._config_initialized:  # later it also holds what the trainer says
            require_engine(cast("dict[str, Any]", self.config))

    def _init_config_if_needed(self) -> None:
        self.require_usable()
        super()._init_config_if_needed()

    @contextlib.contextmanager
    def reusing(self, optimizer: Any) -> Iterator[None]:
        """Let the next engine have this torch optimizer and the schedulers that act on it.

        `configure_optimizers` cannot be asked again: the parameters it would see have no shapes.

        Args:
            optimizer: its groups hold parameters of the module, it has no state.
        """
        configs = self.lr_scheduler_configs
        self._reused = (optimizer, configs[0] if configs else None)
        try:
            yield
        finally:
            self._reused = None

    def _init_optimizers(self) -> tuple[Any, Any]:
        if self._reused is not None:
            return self._reused
        optimizer, config = super()._init_optimizers()
        require_elementwise(optimizer)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        made = [] if config is None else [type(config.scheduler).__name__]
        self.told = Told(optimizer=type(optimizer).__name__, groups=groups, schedulers=made)
        assert self.lightning_module is not None, "attached"
        names = {p: name for name, p in self.lightning_module.named_parameters()}
        named = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.group_names = [group for group in named if group]  # as the engine drops empty ones
        return optimizer, config

    def weights_dtype(self, asked: torch.dtype | None) -> torch.dtype | None:
        """Number format of the working weights: the engine demands that of its precision.

        Args:
            asked: by the model's configuration.

        Returns:
            bfloat16 or float16 where the trainer's precision says so, otherwise what was asked.
        """
        precision = str(self.precision_plugin.precision)
        halves = {"bf16": torch.bfloat16, "16": torch.float16}
        return halves.get(precision.partition("-")[0], asked)

    def divider(self) -> Callable[[nn.Parameter], None]:
        """A function that divides a complete parameter in place, with the values of rank 0.

        All ranks must call it in the same order; for stage 3.
        """
        import deepspeed

        self._init_config_if_needed()
        first: list[Any] = []

        def divide(parameter: nn.Parameter) -> None:
            if first:
                first[0].convert_to_zero_parameters(param_list=[parameter])
                return
            holder = nn.Module()
            holder.register_parameter("only", parameter)
            deepspeed.zero.Init(
                module=holder, remote_device=self.remote_device, config_dict_or_path=self.config
            )
            first.append(parameter)

        return divide

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """Devices of this machine; CPUs get numbers, which DeepSpeed asks for."""
        return self._numbered

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and devices[0].type == "cpu":
            devices = [torch.device("cpu", number) for number in range(len(devices))]
        self._numbered = devices

    def setup_environment(self) -> None:
        """Start the process group, on accelerators other than CUDA too."""
        if self.root_device.type == "cuda":
            super().setup_environment()
            return
        import deepspeed

        # It would be compiled at the start of every process, and only serves inference kernels.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    @property
    def handles_gradient_accumulation(self) -> bool:
        """The trainer does."""
        return False

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Nothing: the engine knows from the boundary set in `backward` when to reduce."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Backward pass of a micro-batch; whether a step follows is the trainer's to say."""
        assert self.lightning_module is not None, "attached"
        accumulates = self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        kwargs["scale_wrt_gas"] = False
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        # Without it DeepSpeed takes no optimizer but its own for state that is offloaded.
        cast("dict[str, Any]", self.config).setdefault("zero_force_ds_cpu_optimizer", False)
        super()._initialize_deepspeed_train(model)
        give_timeout(self._timeout)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        # Lightning takes every hook off the module, also those of the user and of masks.
        with kept_hooks(model):
            super()._initialize_deepspeed_inference(model)
        give_timeout(self._timeout)

    def teardown(self) -> None:
        """Free the engine: DeepSpeed keeps it alive through hooks and a global list."""
        module = self.lightning_module
        if module is not None and self.model is not None and self.model is not module:
            with contextlib.suppress(AttributeError):  # an engine that was not finished
                teardown(self, module)
        super().teardown()


def register() -> None:
    """Make `zero1`, `zero2`, `zero3` and `zero3_offload` names for `Trainer(strategy=...)`."""
    for stage in (1, 2, 3):
        if f"zero{stage}" not in StrategyRegistry:
            StrategyRegistry.register(
                f"zero{stage}", ZeRO, description=f"DeepSpeed ZeRO stage {stage}", stage=stage
            )
    if "zero3_offload" not in StrategyRegistry:
        StrategyRegistry.register(
            "zero3_offload",
            ZeRO,
            description="DeepSpeed ZeRO stage 3, idle weights and optimizer state on the host",
            stage=3,
            offload_optimizer=True,
            offload_parameters=True,
        )


register()
