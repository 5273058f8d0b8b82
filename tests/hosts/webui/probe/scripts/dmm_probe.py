"""``GET /dmm-probe``: what a check cannot see from outside. For tests alone; ``real_files.py`` places it."""

import gc
import os
import platform
from typing import Any

import gradio
import psutil
import torch
from modules import script_callbacks, sd_models


def unet() -> Any:
    """The loaded UNet, or None: Forge has a placeholder until its first picture."""
    model = sd_models.model_data.sd_model
    owner = model.forge_objects.unet.model if hasattr(model, "forge_objects") else getattr(model, "model", None)
    return getattr(owner, "diffusion_model", None)


def ours(hooks: Any) -> int:
    return sum("a1111_extension" in getattr(hook, "__module__", "") for hook in hooks.values())


def tell() -> dict[str, Any]:
    gc.collect()
    network = unet()
    return {
        "hooks": 0 if network is None else ours(network._forward_pre_hooks) + ours(network.time_embed._forward_hooks),
        "unet": id(network),
        "resident": psutil.Process(os.getpid()).memory_info().rss,
        "versions": {"torch": torch.__version__, "gradio": gradio.__version__, "python": platform.python_version()},
    }


script_callbacks.on_app_started(lambda demo, app: app.add_api_route("/dmm-probe", tell, methods=["GET"]))
