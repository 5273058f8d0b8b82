"""Writes into a real webui what ``real.py`` needs there: two checkpoints of random SD1.5 weights, two LoRA files, a probe.

    python tests/hosts/webui/real_files.py WEBUI       # its folder; then restart it, with --api
    python tests/hosts/webui/real_files.py WEBUI --remove

4.3 GB: SD1.5 at full width, which is all that the webuis recognise. ``probe/`` is an extension that tells over the API
how many hooks of ours there are.
"""

from __future__ import annotations

import argparse
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


def models(seed: int) -> dict[str, Any]:
    config = {**UNET["sd15"], "layers_per_block": 2, "in_channels": 4, "out_channels": 4}
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


def lora(seed: int) -> dict[str, Tensor]:
    """Low-rank changes of an attention layer and of the layer that the style is added behind."""
    made = {}
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "lora_unet_time_embed_2": (1280, 1280),
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k": (1280, 768),
        "lora_unet_output_blocks_11_1_transformer_blocks_0_attn1_to_q": (320, 320),
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


def write(webui: Path) -> None:
    place = places(webui)
    for path in place.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if not place[DMM].exists():
        write_dmm(place[DMM], **models(0), codebook=codebook(3))
    if not place[PLAIN].exists():
        write_checkpoint(place[PLAIN], **models(10))
    checkpoint = open_checkpoint(place[DMM])
    book = checkpoint.codebook()
    assert book is not None
    write_style(place[STYLE], vector=book.style(MIX), name="check", mix=MIX, dmm_hash=checkpoint.sha256())
    write_safetensors(place[LORA], lora(5), {"ss_base_model_version": "sd_v1"})
    shutil.copytree(Path(__file__).with_name("probe"), webui / "extensions" / "dmm-probe", dirs_exist_ok=True)


def remove(webui: Path) -> None:
    for path in places(webui).values():
        path.unlink(missing_ok=True)
    shutil.rmtree(webui / "extensions" / "dmm-probe", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webui", type=Path, help="the folder with the webui's models/ and extensions/")
    parser.add_argument("--remove", action="store_true", help="take all of it away again")
    args = parser.parse_args()
    if not (args.webui / "extensions").is_dir():
        raise SystemExit(f"{args.webui} has no folder extensions; give the folder of a webui.")
    (remove if args.remove else write)(args.webui)


if __name__ == "__main__":
    main()
