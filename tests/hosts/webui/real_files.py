"""Writes into a real webui what ``real.py`` needs there: two checkpoints of random weights, two LoRA files, a probe.

    python tests/hosts/webui/real_files.py WEBUI       # its folder; then restart it, with --api
    python tests/hosts/webui/real_files.py WEBUI --remove

The UNet is as wide as SD1.5's, by which the forks know it, with two levels in place of four: 0.5 GB a file, a second a
step on a CPU. A1111 takes its sizes from a .yaml beside it. ``--full``: SD1.5 as it is, 2.1 GB a file. ``probe/`` is an
extension that tells over the API how many hooks of ours there are.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.inspect_large import CLIP_L, UNET, VAE  # noqa: E402
from dmm_core.checkpoint import open_checkpoint, write_checkpoint, write_dmm, write_style  # noqa: E402
from dmm_core.checkpoint.shapes import text_shapes, unet_shapes, vae_shapes  # noqa: E402
from dmm_core.checkpoint.writer import write_safetensors  # noqa: E402
from dmm_core.style import Codebook  # noqa: E402
from tests.unit.tiny import random_state  # noqa: E402

DMM, PLAIN, STYLE, LORA = "dmm-check", "dmm-check-plain", "dmm-check-style", "dmm-check-lora"
NAMES = ("ink", "clay", "水彩, wet")  # the last: not Latin, with a comma
MIX = {"ink": 0.7, "clay": 0.3}
RANK = 4
FULL = {**UNET["sd15"], "layers_per_block": 2, "in_channels": 4, "out_channels": 4}
SMALL = {
    **FULL, "block_out_channels": [320, 320], "layers_per_block": 1, "transformer_layers_per_block": [1, 1],
    "down_block_types": ["CrossAttn", "Down"], "up_block_types": ["Up", "CrossAttn"],
}  # fmt: skip
# ldm's names, in the webui's own file for SD1.5
YAML = {"attention_resolutions": "[ 1 ]", "num_res_blocks": "1", "channel_mult": "[ 1, 1 ]"}


def models(config: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        "family": "sd15",
        "unet": random_state(unet_shapes(config), seed),
        "vae": random_state(vae_shapes(VAE), seed + 1),
        "text_encoders": [random_state(text_shapes(CLIP_L), seed + 2)],
    }


def codebook(seed: int) -> Codebook:
    """Styles of random vectors, about as long as the time embedding that they are added to."""
    torch.manual_seed(seed)
    book = Codebook(NAMES, 1280)
    torch.nn.init.normal_(book.add_embedding.linear_2.weight, std=0.1)
    return book.requires_grad_(False)


def lora(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Low-rank changes of two attention layers and of the layer that the style is added behind."""
    made = {}
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "lora_unet_time_embed_2": (1280, 1280),
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k": (config["block_out_channels"][-1], 768),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": (320, 320),
    }
    for name, (out, into) in shapes.items():
        made[f"{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator) * RANK**-0.5
        made[f"{name}.lora_down.weight"] = torch.randn(RANK, into, generator=generator) * into**-0.5
        made[f"{name}.alpha"] = torch.tensor(float(RANK))
    return made


def places(webui: Path) -> dict[str, Path]:
    checkpoints, loras = webui / "models" / "Stable-diffusion", webui / "models" / "Lora"
    found = {name: checkpoints / f"{name}.safetensors" for name in (DMM, PLAIN)}
    return found | {name: loras / f"{name}.safetensors" for name in (STYLE, LORA)}


def sizes(webui: Path) -> str | None:
    """A1111's own description of SD1.5 with the small UNet's sizes; the forks read them from the file's tensors."""
    original = webui / "configs" / "v1-inference.yaml"
    if not original.exists():
        return None
    before, unet, after = original.read_text(encoding="utf-8").partition("unet_config:")
    for key, value in YAML.items():
        after = re.sub(rf"(\n *{key}:)[^\n]*", rf"\1 {value}", after, count=1)
    return before + unet + after


def write(webui: Path, full: bool) -> None:
    place, config = places(webui), FULL if full else SMALL
    for path in place.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_dmm(place[DMM], **models(config, 0), codebook=codebook(3))
    write_checkpoint(place[PLAIN], **models(config, 10))
    if not full and (text := sizes(webui)):
        for name in (DMM, PLAIN):
            place[name].with_suffix(".yaml").write_text(text, encoding="utf-8")
    checkpoint = open_checkpoint(place[DMM])
    book = checkpoint.codebook()
    assert book is not None
    write_style(place[STYLE], vector=book.style(MIX), name="check", mix=MIX, dmm_hash=checkpoint.sha256())
    write_safetensors(place[LORA], lora(config, 5), {"ss_base_model_version": "sd_v1"})
    shutil.copytree(Path(__file__).with_name("probe"), webui / "extensions" / "dmm-probe", dirs_exist_ok=True)


def remove(webui: Path) -> None:
    for path in places(webui).values():
        path.unlink(missing_ok=True)
        path.with_suffix(".yaml").unlink(missing_ok=True)
    shutil.rmtree(webui / "extensions" / "dmm-probe", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webui", type=Path, help="the folder with the webui's models/ and extensions/")
    parser.add_argument("--full", action="store_true", help="with SD1.5's whole UNet")
    parser.add_argument("--remove", action="store_true", help="take all of it away again")
    args = parser.parse_args()
    if not (args.webui / "extensions").is_dir():
        raise SystemExit(f"{args.webui} has no folder extensions; give the folder of a webui.")
    remove(args.webui)
    if not args.remove:
        write(args.webui, args.full)


if __name__ == "__main__":
    main()
