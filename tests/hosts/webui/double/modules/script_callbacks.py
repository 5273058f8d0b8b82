"""Callbacks by event (the webuis': modules/script_callbacks.py)."""

from collections import defaultdict

registered = defaultdict(list)


class CFGDenoiserParams:
    def __init__(self, x, sigma, sampling_step, total_sampling_steps, text_cond, text_uncond, denoiser=None):
        self.x, self.sigma, self.denoiser = x, sigma, denoiser
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps
        self.text_cond, self.text_uncond = text_cond, text_uncond


def clear_callbacks():
    registered.clear()


def call(event, *args):
    for callback in registered[event]:
        callback(*args)


def on_before_ui(callback, *, name=None):
    registered["before_ui"].append(callback)


def on_cfg_denoiser(callback, *, name=None):
    registered["cfg_denoiser"].append(callback)


def on_model_loaded(callback, *, name=None):
    registered["model_loaded"].append(callback)


def on_script_unloaded(callback, *, name=None):
    registered["script_unloaded"].append(callback)


def on_ui_tabs(callback, *, name=None):
    registered["ui_tabs"].append(callback)


def ui_tabs_callback():
    return [tab for callback in registered["ui_tabs"] for tab in callback() or []]
