"""Checkpoints of ldm's real UNet. A1111 fills the module that it has; the forks build another and clear the old one."""

import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from ldm.modules.diffusionmodules.openaimodel import UNetModel

from modules import script_callbacks, shared

# UNetModel asks whether a number is omegaconf's list; that package has no wheel for what it needs.
sys.modules.setdefault("omegaconf", ModuleType("omegaconf")).listconfig = ModuleType("omegaconf.listconfig")
sys.modules.setdefault("omegaconf.listconfig", sys.modules["omegaconf"].listconfig).ListConfig = tuple
UNET = "model.diffusion_model."


class FakeInitialModel:
    """What Forge has in the model's place before the first picture."""


class ModelData:
    sd_model = None


class ForgesModelData(ModelData):
    """``forge_hash``: the parameters that the model was loaded with, as text."""

    def __init__(self):
        self.forge_loading_parameters = {}
        self.forge_hash = ""


model_data = ModelData()
chosen = None  # what the checkpoint dropdown says
model_path = tempfile.mkdtemp(prefix="webui models ")  # modules/paths.py: models/Stable-diffusion
checkpoints_list = {}
moves = []  # what was asked for, in order


class ForksUNet(UNetModel):
    """The forks' UNets take their options as keywords."""

    def forward(self, x, timesteps=None, context=None, control=None, transformer_options=None, **kwargs):
        return super().forward(x, timesteps, context)


def select_checkpoint():
    return SimpleNamespace(filename=str(chosen)) if chosen else None


def choose(path, profile):
    """The checkpoint dropdown: A1111 and reForge load it, Forge remembers it for the next picture."""
    global chosen
    if profile != "forge":
        return load(path, profile)
    chosen = Path(path)
    model_data.forge_loading_parameters = {"checkpoint_info": select_checkpoint()}


def load_in_mid_picture(path, profile):
    """For the hires pass or a refiner. Forge says at once that the first pass's is chosen, whatever is loaded."""
    parameters = model_data.forge_loading_parameters if profile == "forge" else None
    load(path, profile)
    if profile == "forge":
        model_data.forge_loading_parameters = parameters


def forge_model_reload():
    """Forge, at the start of a picture: load what was chosen, if it was not loaded as it was chosen."""
    parameters = model_data.forge_loading_parameters
    if parameters and model_data.forge_hash != str(parameters):
        load(parameters["checkpoint_info"].filename, "forge")


def list_models():
    moves.append("list")
    checkpoints_list.clear()
    for path in sorted(Path(model_path).rglob("*.safetensors")):
        checkpoints_list[path.name] = SimpleNamespace(filename=str(path))


def unload_model_weights(sd_model=None, info=None):
    """To the host's memory."""
    moves.append(("unload", sd_model))


def send_model_to_device(model):
    moves.append(("device", model))


def _build(path, cls):
    from dmm_core.checkpoint import open_checkpoint  # later: the scripts are to find dmm_core by themselves

    checkpoint = open_checkpoint(path)
    config = checkpoint.unet_config
    channels = config["block_out_channels"]
    unet = cls(
        image_size=8, in_channels=4, out_channels=4, model_channels=channels[0], num_res_blocks=1,
        attention_resolutions=[2**i for i, kind in enumerate(config["down_block_types"]) if "CrossAttn" in kind],
        channel_mult=[c // channels[0] for c in channels], num_heads=8, use_spatial_transformer=True,
        transformer_depth=1, context_dim=config["cross_attention_dim"], use_checkpoint=False, legacy=False,
    )  # fmt: skip
    return unet, {k[len(UNET) :]: v.float() for k, v in checkpoint.tensors.items() if k.startswith(UNET)}


def load(path, profile):
    """Load a checkpoint as the webui of this profile does."""
    global chosen
    chosen = Path(path)
    if profile == "forge":
        model_data.forge_loading_parameters = {"checkpoint_info": select_checkpoint()}
    old = shared.sd_model
    unet, state = _build(path, UNetModel if profile == "a1111" else ForksUNet)
    if profile == "a1111" and old is not None:
        unet = old.model.diffusion_model  # same yaml: load_model_weights into the module that is there
    missing, _ = unet.load_state_dict(state, strict=False)  # the DMM keys are unexpected, and ignored
    assert not missing
    unet.eval().requires_grad_(False)
    inner = SimpleNamespace(diffusion_model=unet)
    info = SimpleNamespace(filename=str(path), metadata={})  # reForge wipes the metadata
    model = SimpleNamespace(sd_checkpoint_info=info, cond_stage_key="txt")
    if profile == "a1111":
        model.model = inner
    else:
        model.forge_objects = SimpleNamespace(unet=SimpleNamespace(model=inner, model_options={}))
        if profile == "reforge" and old is not None and hasattr(old, "forge_objects"):
            _tear_down(old)
    shared.sd_model = model_data.sd_model = model
    if profile == "forge":
        model_data.forge_hash = str(model_data.forge_loading_parameters)
    script_callbacks.call("model_loaded", model)


def _tear_down(model):
    """reForge empties all tensors it can reach from the old model, attributes of its modules too."""
    for module in model.forge_objects.unet.model.diffusion_model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, torch.Tensor):
                value.data = torch.empty(0)
