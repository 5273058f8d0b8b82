"""Model files: detect, read and write every layout; needs torch alone (files are safetensors, read and written here).

ck = open_checkpoint("model.safetensors")     # or a diffusers folder; headers only
ck.family, ck.styles, ck.unet_config          # what it is
unet = ck.unet()                              # tensors in diffusers' names
"""

from dmm_core.checkpoint.checkpoint import Checkpoint
from dmm_core.checkpoint.errors import (
    BadMetadata,
    CheckpointError,
    LoraGiven,
    MissingFile,
    MissingKeys,
    NonFinite,
    NotACheckpoint,
    NotSafetensors,
    NoUnetFolder,
    PickleRefused,
    ScaledWeights,
    StyleCount,
    TruncatedFile,
    UnsupportedModel,
    WrongShape,
)
from dmm_core.checkpoint.folder import write_diffusers
from dmm_core.checkpoint.inspect import inspect_file
from dmm_core.checkpoint.opening import open_checkpoint
from dmm_core.checkpoint.save import fold, write_checkpoint, write_dmm, write_style

__all__ = [
    "BadMetadata",
    "Checkpoint",
    "CheckpointError",
    "LoraGiven",
    "MissingFile",
    "MissingKeys",
    "NoUnetFolder",
    "NonFinite",
    "NotACheckpoint",
    "NotSafetensors",
    "PickleRefused",
    "ScaledWeights",
    "StyleCount",
    "TruncatedFile",
    "UnsupportedModel",
    "WrongShape",
    "fold",
    "inspect_file",
    "open_checkpoint",
    "write_checkpoint",
    "write_diffusers",
    "write_dmm",
    "write_style",
]
