"""The model that is loaded, and what runs."""

import time
from types import SimpleNamespace

sd_model = None
device = "cpu"
cmd_opts = SimpleNamespace(ckpt_dir=None, lora_dir=None)


class State:
    job = ""
    sampling_step = 0
    sampling_steps = 0
    job_timestamp = "0"
    time_start = None

    def begin(self, job):
        self.job, self.time_start = job, time.time()
        self.job_timestamp = time.strftime("%Y%m%d%H%M%S")

    def end(self):
        self.job = ""


state = State()
