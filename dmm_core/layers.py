"""A stock diffusers UNet whose layers do as little between their matrix products as they can (``fused.py``), in place.

Its parameters keep their names, and each layer with weights is still a module that is called: hooks on it stay true,
but that some convolutions leave their bias to what comes after them. Without CUDA, or without a Triton that works, the
layers here do what torch's do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmm_core import fused


def is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


class Norm(nn.GroupNorm):
    """A stock GroupNorm that does the SiLU after it, if ``silu``, and both in one pass where the map allows it."""

    silu = False

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Of the map (N, C, H, W), or of the map with ``shift`` (N, C) added."""
        if is_channels_last(x) and fused.works(x.device):
            return fused.GroupNormSiLU.apply(
                x, self.weight, self.bias, self.num_groups, self.eps, self.silu, shift
            )  # fmt: skip
        if x.device.type == "cpu" and torch.is_grad_enabled() and not x.requires_grad:
            x = x.contiguous()  # of a map laid out otherwise torch 2.13's gradient of the weights alone crashes
        y = super().forward(x if shift is None else x + shift[:, :, None, None].to(x.dtype))
        return F.silu(y) if self.silu else y


class TokenNorm(nn.LayerNorm):
    """A stock LayerNorm, with a faster gradient where one is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        alike = x.dtype == self.weight.dtype and x.is_contiguous()
        if alike and x.requires_grad and torch.is_grad_enabled() and fused.works(x.device):
            return fused.RowNorm.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class Conv(nn.Conv2d):
    """A stock convolution; one of single pixels is the matrix product that it is, whose bias costs nothing.

    With ``bias_later`` the bias is left to what comes after it.
    """

    bias_later = False

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias_later else self.bias
        if self.kernel_size == (1, 1) and is_channels_last(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), bias).permute(0, 3, 1, 2)
        return self._conv_forward(x, self.weight, bias)


def plus(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias (C,) of maps (N, C, H, W)."""
    if x.dtype == h.dtype and is_channels_last(x) and is_channels_last(h) and fused.works(x.device):
        return fused.Plus.apply(x, h, bias)
    return x + h + bias[:, None, None].to(h.dtype)


def _resnet(self: Any, x: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' ResnetBlock2D.forward, whose further arguments have no meaning: biases and sums in other passes."""
    shift = self.time_emb_proj(F.silu(temb)) + self.conv1.bias
    h = self.conv2(self.norm2(self.conv1(self.norm1(x)), shift))
    if self.conv_shortcut is None:
        return plus(x, h, self.conv2.bias)
    return plus(self.conv_shortcut(x), h, self.conv2.bias + self.conv_shortcut.bias)


def _geglu(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' GEGLU.forward."""
    x = self.proj(hidden)
    if x.is_contiguous() and fused.works(x.device):
        return fused.Gated.apply(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _to_map(
    self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """diffusers' Transformer2DModel._get_output_for_continuous_inputs, which turns the map over: channels first."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    picture = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
    return (picture if self.use_linear_projection else self.proj_out(picture)) + residual


class Attend:
    """diffusers' AttnProcessor2_0 of a plain attention layer, without a division by 1."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None,
        temb: Any = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(told), attn.to_v(told))
        )
        said = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attn.to_out[0](said.transpose(1, 2).flatten(2))


def fuse(unet: nn.Module) -> None:
    """Let a diffusers UNet do so, in place. Its parameters keep their names, and may be overwritten afterwards."""
    for module in list(unet.modules()):
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and _is_plain_resnet(module):
            _take_over(module.norm1, Norm, silu=True)
            _take_over(module.norm2, Norm, silu=True)
            for conv in (module.conv1, module.conv2, module.conv_shortcut):
                if conv is not None:
                    _take_over(conv, Conv, bias_later=True)
            _do_instead(module, forward=_resnet)
        elif kind == "Transformer2DModel" and isinstance(module.norm, nn.GroupNorm):
            _take_over(module.norm, Norm)
            _do_instead(module, _get_output_for_continuous_inputs=_to_map)
            for layer in (module.proj_in, module.proj_out):
                if type(layer) is nn.Conv2d:
                    _take_over(layer, Conv)
        elif kind == "GEGLU":
            _do_instead(module, forward=_geglu)
        elif kind == "Attention" and _is_plain_attention(module):
            module.processor = Attend()
        elif type(module) is nn.LayerNorm and module.elementwise_affine and module.bias is not None:
            _take_over(module, TokenNorm)
    if isinstance(getattr(unet, "conv_act", None), nn.SiLU):
        _take_over(unet.conv_norm_out, Norm, silu=True)
        unet.conv_act = nn.Identity()


def _is_plain_resnet(block: Any) -> bool:
    """Whether a ResnetBlock2D is one of SD's: it neither scales nor drops anything out, and the time is added."""
    parts = (block.conv1, block.conv2, *([block.conv_shortcut] if block.conv_shortcut is not None else []))
    return (
        block.upsample is None and block.downsample is None and block.output_scale_factor == 1
        and block.time_embedding_norm == "default" and block.time_emb_proj is not None and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU) and block.dropout.p == 0
        and all(type(conv) is nn.Conv2d and conv.bias is not None for conv in parts)
    )  # fmt: skip


def _is_plain_attention(layer: Any) -> bool:
    """Whether an Attention of tokens does nothing but attend, by AttnProcessor2_0."""
    further = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    return (
        type(layer.processor).__name__ == "AttnProcessor2_0" and layer.rescale_output_factor == 1
        and not layer.residual_connection and not any(getattr(layer, name, None) for name in further)
        and layer.to_out[1].p == 0
    )  # fmt: skip


def _take_over(layer: nn.Module, kind: type[nn.Module], **settings: Any) -> None:
    layer.__class__ = kind
    for name, value in settings.items():
        setattr(layer, name, value)


def _do_instead(module: nn.Module, **methods: Any) -> None:
    """Replace methods of one module, whose type keeps its name."""
    module.__class__ = type(type(module).__name__, (type(module),), methods)
