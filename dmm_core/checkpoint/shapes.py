"""Every key and shape of a model, by rule from its configuration, in the names of diffusers and transformers.

What a file lacks, what has a wrong shape, and the key maps all follow from these lists; no model is built for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
Item = tuple[str, tuple[int, ...]]


def _pair(name: str, weight: tuple[int, ...]) -> Iterator[Item]:
    """Weight and bias of a linear layer or convolution, or of a norm for one number."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _resnet(name: str, into: int, out: int, time: int | None) -> Iterator[Item]:
    yield from _pair(f"{name}.norm1", (into,))
    yield from _pair(f"{name}.conv1", (out, into, 3, 3))
    if time is not None:
        yield from _pair(f"{name}.time_emb_proj", (out, time))
    yield from _pair(f"{name}.norm2", (out,))
    yield from _pair(f"{name}.conv2", (out, out, 3, 3))
    if into != out:
        yield from _pair(f"{name}.conv_shortcut", (out, into, 1, 1))


def _transformer(name: str, c: int, context: int, depth: int, linear: bool) -> Iterator[Item]:
    projection = (c, c) if linear else (c, c, 1, 1)
    yield from _pair(f"{name}.norm", (c,))
    yield from _pair(f"{name}.proj_in", projection)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, width in (("attn1", c), ("attn2", context)):
            yield f"{block}.{attention}.to_q.weight", (c, c)
            yield f"{block}.{attention}.to_k.weight", (c, width)
            yield f"{block}.{attention}.to_v.weight", (c, width)
            yield from _pair(f"{block}.{attention}.to_out.0", (c, c))
        for norm in ("norm1", "norm2", "norm3"):
            yield from _pair(f"{block}.{norm}", (c,))
        yield from _pair(f"{block}.ff.net.0.proj", (8 * c, c))  # GEGLU: value and gate, each 4 wide
        yield from _pair(f"{block}.ff.net.2", (c, 4 * c))
    yield from _pair(f"{name}.proj_out", projection)


def unet_shapes(config: Mapping[str, Any]) -> Shapes:
    """Keys of ``diffusers.UNet2DConditionModel(**config)``, for the configurations that ``detect`` makes."""
    return dict(_unet(config))


def _unet(config: Mapping[str, Any]) -> Iterator[Item]:
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    first, time = channels[0], 4 * channels[0]
    yield from _pair("conv_in", (first, config["in_channels"], 3, 3))
    yield from _pair("time_embedding.linear_1", (time, first))
    yield from _pair("time_embedding.linear_2", (time, time))
    if config.get("addition_embed_type") == "text_time":
        yield from _pair("add_embedding.linear_1", (time, config["projection_class_embeddings_input_dim"]))
        yield from _pair("add_embedding.linear_2", (time, time))
    context, depths = config["cross_attention_dim"], config["transformer_layers_per_block"]
    linear = config["use_linear_projection"]
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    skips = [first]  # channels of the skip connections, consumed from the end by the up blocks
    into = first
    for b, c in enumerate(channels):
        for i in range(layers):
            yield from _resnet(f"down_blocks.{b}.resnets.{i}", into, c, time)
            if attends[b]:
                yield from _transformer(f"down_blocks.{b}.attentions.{i}", c, context, depths[b], linear)
            into = c
            skips.append(c)
        if b + 1 < len(channels):
            yield from _pair(f"down_blocks.{b}.downsamplers.0.conv", (c, c, 3, 3))
            skips.append(c)
    yield from _resnet("mid_block.resnets.0", into, into, time)
    yield from _transformer("mid_block.attentions.0", into, context, depths[-1], linear)
    yield from _resnet("mid_block.resnets.1", into, into, time)
    for b, level in enumerate(reversed(range(len(channels)))):
        c = channels[level]
        for i in range(layers + 1):
            yield from _resnet(f"up_blocks.{b}.resnets.{i}", into + skips.pop(), c, time)
            if attends[level]:
                yield from _transformer(f"up_blocks.{b}.attentions.{i}", c, context, depths[level], linear)
            into = c
        if level:
            yield from _pair(f"up_blocks.{b}.upsamplers.0.conv", (c, c, 3, 3))
    yield from _pair("conv_norm_out", (first,))
    yield from _pair("conv_out", (config["out_channels"], first, 3, 3))


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """Keys of ``AutoencoderKL`` or ``AutoencoderTiny``, by the configuration's ``kind``."""
    return dict(_taesd(config) if config["kind"] == "taesd" else _kl(config))


def _kl(config: Mapping[str, Any]) -> Iterator[Item]:
    channels, layers, z = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    into = channels[0]
    yield from _pair("encoder.conv_in", (into, config["in_channels"], 3, 3))
    for b, c in enumerate(channels):
        for i in range(layers):
            yield from _resnet(f"encoder.down_blocks.{b}.resnets.{i}", into, c, None)
            into = c
        if b + 1 < len(channels):
            yield from _pair(f"encoder.down_blocks.{b}.downsamplers.0.conv", (c, c, 3, 3))
    yield from _kl_middle("encoder", into)
    yield from _pair("encoder.conv_norm_out", (into,))
    yield from _pair("encoder.conv_out", (2 * z, into, 3, 3))  # mean and log variance
    if config.get("use_quant_conv", True):
        yield from _pair("quant_conv", (2 * z, 2 * z, 1, 1))
        yield from _pair("post_quant_conv", (z, z, 1, 1))
    yield from _pair("decoder.conv_in", (into, z, 3, 3))
    yield from _kl_middle("decoder", into)
    for b, c in enumerate(reversed(channels)):
        for i in range(layers + 1):
            yield from _resnet(f"decoder.up_blocks.{b}.resnets.{i}", into, c, None)
            into = c
        if b + 1 < len(channels):
            yield from _pair(f"decoder.up_blocks.{b}.upsamplers.0.conv", (c, c, 3, 3))
    yield from _pair("decoder.conv_norm_out", (into,))
    yield from _pair("decoder.conv_out", (config["out_channels"], into, 3, 3))


def _kl_middle(half: str, c: int) -> Iterator[Item]:
    yield from _resnet(f"{half}.mid_block.resnets.0", c, c, None)
    yield from _pair(f"{half}.mid_block.attentions.0.group_norm", (c,))
    for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _pair(f"{half}.mid_block.attentions.0.{leaf}", (c, c))
    yield from _resnet(f"{half}.mid_block.resnets.1", c, c, None)


def _taesd(config: Mapping[str, Any]) -> Iterator[Item]:
    width, z = config["encoder_block_out_channels"][0], config["latent_channels"]
    index = 0
    for stage, blocks in enumerate(config["num_encoder_blocks"]):
        if stage:
            yield f"encoder.layers.{index}.weight", (width, width, 3, 3)  # strided, without bias
        else:
            yield from _pair("encoder.layers.0", (width, config["in_channels"], 3, 3))
        yield from _tiny_blocks("encoder", index + 1, blocks, width)
        index += 1 + blocks
    yield from _pair(f"encoder.layers.{index}", (z, width, 3, 3))
    yield from _pair("decoder.layers.0", (width, z, 3, 3))
    index = 2  # 1 is the activation
    stages = config["num_decoder_blocks"]
    for stage, blocks in enumerate(stages):
        yield from _tiny_blocks("decoder", index, blocks, width)
        index += blocks
        if stage + 1 < len(stages):
            yield f"decoder.layers.{index + 1}.weight", (width, width, 3, 3)  # after the upsampling, without bias
            index += 2
    yield from _pair(f"decoder.layers.{index}", (config["out_channels"], width, 3, 3))


def _tiny_blocks(half: str, start: int, count: int, width: int) -> Iterator[Item]:
    for i in range(start, start + count):
        for conv in (0, 2, 4):
            yield from _pair(f"{half}.layers.{i}.conv.{conv}", (width, width, 3, 3))


def text_shapes(config: Mapping[str, Any]) -> Shapes:
    """Keys of ``CLIPTextModel`` (kind clip_l) or ``CLIPTextModelWithProjection`` (kind clip_g)."""
    return dict(_text(config))


def _text(config: Mapping[str, Any]) -> Iterator[Item]:
    c, wide = config["hidden_size"], config["intermediate_size"]
    yield "text_model.embeddings.token_embedding.weight", (config["vocab_size"], c)
    yield "text_model.embeddings.position_embedding.weight", (config["max_position_embeddings"], c)
    for i in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}"
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _pair(f"{layer}.self_attn.{leaf}", (c, c))
        yield from _pair(f"{layer}.layer_norm1", (c,))
        yield from _pair(f"{layer}.mlp.fc1", (wide, c))
        yield from _pair(f"{layer}.mlp.fc2", (c, wide))
        yield from _pair(f"{layer}.layer_norm2", (c,))
    yield from _pair("text_model.final_layer_norm", (c,))
    if config["kind"] == "clip_g":
        yield "text_projection.weight", (config["projection_dim"], c)


CODEBOOK = "model_embedding.weight"


def codebook_shapes(rows: int, dim: int) -> Shapes:
    """Keys of ``dmm_core.style.Codebook``."""
    layers = [*_pair("add_embedding.linear_1", (dim, dim)), *_pair("add_embedding.linear_2", (dim, dim))]
    return {CODEBOOK: (rows, dim), **dict(layers)}
