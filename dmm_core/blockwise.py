"""Blockwise imitation: each layer of the student learns, on what went into the teacher's, to say what came out of it.

    L_block = mean over layers l of |l_student(h_l, emb) − l_teacher(h_l)|² / |l_teacher(h_l)|²

h_l is the teacher's own. So a layer's gradient stays in it (and in the style vector, through emb), is not blurred by
what the others do not know yet, and needs the memory of one layer at a time. It is for the first part of a stage
(``course.py``) and beside the other losses, which alone see how the layers work together (docs/results.md). The
paper's feature imitation (arXiv:2504.12364, Eq. 10) compares outputs of whole blocks on the student's own features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dmm_core.conditioning import Context, embedding
from dmm_core.losses import score_loss

LAYERS = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D")  # diffusers' classes


def layers(unet: Any) -> list[nn.Module]:
    """What makes up a diffusers UNet between its first and its last convolution, in the order of its modules."""
    return [module for module in unet.modules() if type(module).__name__ in LAYERS]


class LayerCalls:
    """Collects what goes into a UNet's layers and comes out of them while it is entered."""

    def __init__(self, unet: Any) -> None:
        self.layers = layers(unet)
        self.maps: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> LayerCalls:
        self._handles = [layer.register_forward_hook(self._keep, with_kwargs=True) for layer in self.layers]
        return self

    def _keep(self, module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else named["hidden_states"]
        self.maps[module] = given, output[0] if isinstance(output, tuple) else output

    def take(self) -> list[Tensor]:
        """Input and output (B, C, H, W) of the first layer, of the second, …, as ``layers`` has them."""
        maps, self.maps = self.maps, {}
        return [each for layer in self.layers for each in maps[layer]]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


def imitate(
    unet: Any, x_t: Tensor, t: Tensor, context: Context, style: Tensor, maps: Sequence[Tensor],
    scaled: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """Add the gradients of L_block to a student's layers and to what its ``style`` (B, d) was made of.

    Args:
        x_t, t, context: the rows of which the teachers were asked; x_t is for its size alone.
        maps: as ``LayerCalls.take`` gives them, of the teachers.
        scaled: the number whose gradient is wanted, of each row's part of L_block (B,), a layer at a time.
    """
    emb = embedding(unet, x_t, t, context, style)
    leaf = emb.detach().requires_grad_()  # the layers' gradients meet here, and go on together
    parts, dtype = layers(unet), unet.conv_in.weight.dtype
    tokens = context.tokens.to(dtype)
    for layer, given, wanted in zip(parts, maps[::2], maps[1::2], strict=True):
        said = _call(layer, given.to(dtype), leaf, tokens, wanted.shape)
        size = torch.linalg.vector_norm(wanted, dim=(1, 2, 3), dtype=torch.float32).square() / wanted[0].numel()
        error = score_loss(said, wanted.to(said.dtype)) / (len(parts) * size.clamp_min(1e-12))
        if error.requires_grad:  # a LoRA student's layers need not have any
            scaled(error).backward()
    if leaf.grad is not None:
        emb.backward(leaf.grad)


def _call(layer: Any, x: Tensor, emb: Tensor, tokens: Tensor, shape: torch.Size) -> Tensor:
    kind = type(layer).__name__
    if kind == "ResnetBlock2D":
        return layer(x, emb)
    if kind == "Transformer2DModel":
        return layer(x, encoder_hidden_states=tokens, return_dict=False)[0]
    if kind == "Upsample2D" and shape[2:] != (2 * x.shape[2], 2 * x.shape[3]):
        return layer(x, shape[2:])
    return layer(x)
