"""LoRA files and their relatives: what ComfyUI's own loader makes of one is what a teacher is made of here.

LoKr with a middle factor is not among them: ComfyUI 0.3.75 fails at it (torch.kron of strided tensors) and leaves the
weight alone; tests/unit/test_adapters.py has it by hand and beside LyCORIS.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hosts.comfyui.inside_tools import write_sdxl

pytestmark = pytest.mark.hosts
RANK = 2


def normal(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape)


def layer(kind: str, out: int, into: int, kernel: list[int]) -> dict[str, torch.Tensor]:
    """One layer as kohya's scripts and LyCORIS write it."""
    ones = [1] * len(kernel)
    size = int(torch.tensor(kernel).prod()) if kernel else 1
    made = {"alpha": torch.tensor(1.5)}
    if kind.startswith("lora"):
        made |= {"lora_down.weight": normal(RANK, into, *kernel), "lora_up.weight": normal(out, RANK, *ones)}
        if kernel and kind == "lora mid":
            made |= {"lora_down.weight": normal(RANK, into, 1, 1), "lora_mid.weight": normal(RANK, RANK, *kernel)}
    elif kind.startswith("loha"):
        tucker = kind == "loha mid" and kernel
        for i in (1, 2):
            a, b = ((RANK, out), (RANK, into)) if tucker else ((out, RANK), (RANK, into * size))
            made |= {f"hada_w{i}_a": normal(*a), f"hada_w{i}_b": normal(*b)}
            made |= {f"hada_t{i}": normal(RANK, RANK, *kernel)} if tucker else {}
    else:
        made |= {"lokr_w1": normal(4, 4)}
        if kind == "lokr low":
            made |= {"lokr_w2_a": normal(out // 4, RANK), "lokr_w2_b": normal(RANK, into // 4 * size)}
        else:
            made |= {"lokr_w2": normal(out // 4, into // 4, *kernel)}
    if "dora" in kind:
        norms = (1, into, *ones) if "in" in kind.split() else (out, 1, *ones)
        made |= {"dora_scale": 1 + normal(*norms).abs()}
    return made


def write(path: Path, kind: str, ck) -> Path:
    """Such layers for matrices and convolutions of every part."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    prefix = {"unet": "lora_unet_", "text_encoder_0": "lora_te1_" if ck.family == "sdxl" else "lora_te_"}
    prefix |= {"text_encoder_1": "lora_te2_"}
    for part in prefix.keys() & ck.parts.keys():
        wanted = ("attn1.to_q", "attn2.to_k", "proj_in", "conv1", "ff.net.2", "mlp.fc1", "self_attn.q_proj", "0.conv")
        for key, (out, into, *kernel) in ((k, s) for k, s in ck.shapes(part).items() if len(s) > 1):
            name = key.removesuffix(".weight")
            if name.endswith(wanted):
                for role, tensor in layer(kind, out, into, kernel).items():
                    tensors[f"{prefix[part]}{name.replace('.', '_')}.{role}"] = tensor
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def stock_names(loaded, ck) -> dict[str, tuple[str, str]]:
    """ComfyUI's name of a tensor → ours."""
    from dmm_core.checkpoint import keymap

    unet = keymap.unet_map(list(ck.shapes("unet")), ck.unet_config)
    names = {f"diffusion_model.{ldm}": ("unet", key) for key, ldm in unet.items()}
    for i, which in enumerate("lg"[: len(ck.text_configs)]):
        for key in ck.shapes(f"text_encoder_{i}"):
            names[f"clip_{which}.transformer.{key}"] = (f"text_encoder_{i}", key)
    return names


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "lora mid", "loha", "loha mid", "lokr", "lokr low",
                                  "lora dora in", "loha dora in", "lokr dora in", "lora dora out"])  # fmt: skip
def test_a_teacher_has_the_weights_that_comfyui_makes(pack, file, loaded, xl, tmp_path, kind, family):
    import comfy.lora
    import comfy.sd

    from dmm_core.checkpoint import open_checkpoint
    from dmm_core.lora import open_lora

    (model, clip), path = (xl[:2], xl[2]) if family == "sdxl" else (loaded[:2], file)
    ck = open_checkpoint(path)
    written = write(tmp_path / "l.safetensors", kind, ck)
    strength = 0.7
    with torch.inference_mode():
        patched, patched_clip = comfy.sd.load_lora_for_models(model, clip, load_file(written), strength, strength)
    fitted, names = open_lora(written).fit(ck), stock_names(loaded, ck)
    patches = {**patched.patches, **patched_clip.patcher.patches}
    ours = {names[name] for name in patches}
    assert ours == set(fitted.layers), "the same tensors are changed"
    assert {part for part, _ in ours} == {part for part in ck.parts if part not in ("vae", "codebook")}
    for name, patch in patches.items():
        part, key = names[name]
        weight = ck.tensor(part, key).float()
        with torch.inference_mode():
            theirs = comfy.lora.calculate_weight(patch, weight.clone(), name)
        mine = fitted.apply(part, {key: weight}, strength)[key]
        if "out" not in kind.split():
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            continue
        # One difference, on purpose (adapters.rescale): ComfyUI divides by the norms of the unchanged weight.
        whole, stock = (weight + (changed - weight) / strength for changed in (mine, theirs))
        direction = [changed / changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
                     for changed in (whole, stock)]  # fmt: skip
        torch.testing.assert_close(*direction, rtol=1e-3, atol=1e-4)
        scale = load_file(written)[fitted.layers[part, key]["dora_scale"]]
        torch.testing.assert_close(whole.flatten(1).norm(dim=1), scale.flatten(), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def xl(pack, tmp_path_factory):
    path = write_sdxl(tmp_path_factory.mktemp("xl") / "xl.safetensors")
    with torch.inference_mode():
        return *pack.loading.load(path)[:2], path
