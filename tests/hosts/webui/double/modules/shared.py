"""The model that is loaded, and what runs."""

sd_model = None


class State:
    sampling_step = 0
    sampling_steps = 0


state = State()
