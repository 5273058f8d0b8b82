"""The model that is loaded, and what runs."""

from types import SimpleNamespace

sd_model = None
device = "cpu"
cmd_opts = SimpleNamespace(ckpt_dir=None, lora_dir=None)


class State:
    job = ""
    sampling_step = 0
    sampling_steps = 0


state = State()
