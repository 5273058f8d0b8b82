"""ComfyUI's entry, for a clone in custom_nodes/; without a ComfyUI around it defines nothing."""

from importlib.util import find_spec

if __package__ and find_spec("comfy_api") and find_spec(".comfyui_dmm", __package__):
    from .comfyui_dmm import *  # noqa: F403
