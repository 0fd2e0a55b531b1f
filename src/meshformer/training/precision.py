"""The plugin for trainer.precision=16-mixed."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision


class LossScaling(MixedPrecision):
    """Loss scaling without Lightning's unscaling. Lightning unscales inside `optimizer_step`, too late to clip by the norm, and its skip decision
    is a host sync. Here `StepStrategy.finish_gradients` unscales, and training/step.py skips non-finite gradients."""

    def __init__(self, precision: Any, device: str) -> None:
        super().__init__(precision, device, torch.amp.GradScaler(torch.device(device).type))  # pyright: ignore[reportPrivateImportUsage]

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        result = Precision.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)
        self.scaler.update()  # pyright: ignore[reportOptionalMemberAccess]
        return result
