"""The Vision Transformer: an image is split into square patches, and each patch is a token (ViT, Dosovitskiy et al. 2021).

Shapes: B batch, H height, W width, D colours, P patch edge, N patches, T tokens (N, or N + 1 with a class token), C channels (d_model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import Attend, attend_auto, keep_fp32
from .position import Learned, Position
from .transformer import Transformer


class PatchEmbedding(nn.Module):
    """A linear layer applied to each patch, plus an optional class token in front and positions. (B, H, W[, D]) → (B, T, C).

    A patch is flattened in the order (colour, row, column), as in the weight of a convolution.
    """

    def __init__(self, image_size: int, patch_size: int, colours: int, d_model: int, class_token: bool):
        super().__init__()
        self.image_size, self.patch_size, self.colours = image_size, patch_size, colours
        self.patches = nn.Linear(colours * patch_size**2, d_model)
        self.class_token = nn.Parameter(torch.zeros(1, d_model)) if class_token else None

    def forward(self, images: Tensor, types_BT: Tensor | None, position: Position, positions_BT: Tensor) -> Tensor:
        images_BHWD = images[..., None] if images.ndim == 3 else images
        B, H, W, D = images_BHWD.shape
        if (self.image_size, self.image_size, self.colours) != (H, W, D):
            size = f"{self.image_size} × {self.image_size} pixels of {self.colours} colours"
            raise ValueError(f"the images have {H} × {W} pixels of {D} colours, and the model was made for {size}")
        P = self.patch_size
        patches_BND = images_BHWD.reshape(B, H // P, P, W // P, P, D).permute(0, 1, 3, 5, 2, 4).reshape(B, -1, D * P * P)
        x_BTC = keep_fp32(self.patches(patches_BND.to(self.patches.weight.dtype)))
        if self.class_token is not None:
            x_BTC = torch.cat((self.class_token.expand(B, 1, -1), x_BTC), dim=1)
        return position.embed(x_BTC, positions_BT)


class VisionTransformer(Transformer):
    """A Transformer encoder of images (B, H, W) or (B, H, W, D) with normalised pixels. `forward(images)` returns logits (B, classes), or
    pooled features (B, C) with `classes=None`.

    `pooling`: `cls` takes the last hidden state of a class token; `mean` averages over the patches and has no class token. The other options
    are Transformer's, with ViT's defaults. Context parallelism is not supported.
    """

    reads = "images"
    plan = replace(Transformer.plan, attention=None)

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        colours: int = 1,
        classes: int | None = None,
        pooling: Literal["cls", "mean"] = "cls",
        d_ff: int | None = None,
        attention: Attend = attend_auto,
        position: Callable[..., Position] = Learned,
        norm: Literal["rms", "layer"] = "layer",
        norm_eps: float | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
        zero_init: bool = False,
        seed: int = 0,
    ):
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} must be divisible by patch_size={patch_size}")
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', not {pooling!r}")
        super().__init__(
            vocab_size=classes or 1,
            n_layers=n_layers,
            n_heads=n_heads,
            d_model=d_model,
            context_length=(image_size // patch_size) ** 2 + (pooling == "cls"),
            d_ff=d_ff,
            causal=False,
            attention=attention,
            position=position,
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
            bias=bias,
            qk_norm=qk_norm,
            dropout=dropout,
            tie_embeddings=False,
            init_std=init_std,
            zero_init=zero_init,
            head=classes is not None,
            head_bias=classes is not None,
        )
        self.pooling, self.image_size = pooling, image_size
        self.embedding: Any = PatchEmbedding(image_size, patch_size, colours, d_model, class_token=pooling == "cls")
        if not self.embedding.patches.weight.is_meta:
            self.initialise(seed)

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits (B, classes) or features (B, C). ValueError for images of another size than `image_size`."""
        # The head is linear, so pooling after it equals pooling before it.
        out_BTX = super().forward(images, length=self.context_length)
        return out_BTX[:, 0] if self.pooling == "cls" else out_BTX.mean(dim=1)
