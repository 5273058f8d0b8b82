"""DMM: many fine-tuned Stable Diffusion checkpoints in one, with a style vector for each (arXiv:2504.12364).

The inference parts (``style``, ``checkpoint``) need torch and safetensors alone; everything else is imported by name.
"""

__version__ = "0.1.0"
