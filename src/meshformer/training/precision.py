"""16-mixed, with gradients whose loss scale the step has divided out already."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision


class LossScaling(MixedPrecision):
    """Lightning's plugin unscales inside `optimizer_step`, behind which nobody could find the norm and clip; and it asks the device whether to
    skip. `StepStrategy.finish_gradients` unscales, and training/step.py skips where the gradient is not finite."""

    def __init__(self, precision: Any, device: str) -> None:
        super().__init__(precision, device, torch.amp.GradScaler(torch.device(device).type))  # pyright: ignore[reportPrivateImportUsage]

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        result = Precision.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)
        self.scaler.update()  # pyright: ignore[reportOptionalMemberAccess]
        return result
