"""Replays a picture's way through A1111 1.10.1, Forge f2.0.1 and reForge over the double: events, rows, passes.

profile   rows of a step                                   else
a1111     conds (image × AND parts), then unconds; in one  same module for the next checkpoint; clone's root leaves
          call or in calls of one batch                    sys.path after loading
forge     chunks of whole batches, unconds first           process_before_every_sampling twice in the hires pass
reforge   chunks of whole batches, conds first             teardown of the old model
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
DOUBLE = Path(__file__).with_name("double")
CONTEXT = 64


@dataclass
class Processing:
    """As much of ``StableDiffusionProcessing`` as scripts see."""

    prompt: str | list[str] = "a cat"
    negative_prompt: str = ""
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 3
    cfg_scale: float = 4.0
    enable_hr: bool = False
    hr_prompt: str = ""
    hr_checkpoint: Path | None = None
    seed: int = 0
    split: bool = False  # A1111's "batch cond/uncond" off
    script_args: list[Any] = field(default_factory=list)
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, int] = field(default_factory=dict)
    is_hr_pass: bool = False
    postprocess_image: Callable[[Processing], None] | None = None  # what another extension does with each image

    def comment(self, text: str) -> None:
        self.comments[text] = 1


class Host:
    """One webui of a profile, with this clone as its extension."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        for name in [n for n in sys.modules if n.partition(".")[0] in ("modules", "a1111_extension")]:
            del sys.modules[name]
        sys.path[:] = [str(DOUBLE), *(p for p in sys.path if p not in (str(DOUBLE), str(ROOT), ""))]
        from modules import extra_networks, script_callbacks, scripts, sd_models, shared

        self.scripts, self.callbacks, self.networks = scripts, script_callbacks, extra_networks
        self.shared, self.sd_models = shared, sd_models
        self.memory = fork_memory(profile)
        if profile == "forge":
            sd_models.model_data = sd_models.ForgesModelData()
            shared.sd_model = sd_models.model_data.sd_model = sd_models.FakeInitialModel()
        self.start()

    def start(self) -> None:
        """Load scripts and build both tabs' panels; again for "Reload UI"."""
        import gradio as gr

        files = [(DOUBLE / "scripts" / "xyz_grid.py", DOUBLE), (ROOT / "scripts" / "dmm.py", ROOT)]
        self.scripts.load_scripts(files, keep_path=self.profile != "a1111")
        self.callbacks.call("before_ui")
        data = {data.script_class.__name__: data for data in self.scripts.scripts_data}
        self.grid = data["Script"].module
        self.tabs, interfaces = {}, []
        for is_img2img in (False, True):
            script = data["DMMScript"].script_class()
            script.is_img2img = is_img2img
            assert script.show(is_img2img) is self.scripts.AlwaysVisible
            with gr.Blocks() as interface:
                script.controls = script.ui(is_img2img)
            self.tabs[is_img2img] = script
            interfaces.append(interface)
        tabs = self.callbacks.ui_tabs_callback()  # before the page is begun, as in modules/ui.py
        with gr.Blocks() as self.page, gr.Tabs():  # each tab is made by itself and rendered here (modules/ui.py)
            for name, interface in zip(("txt2img", "img2img"), interfaces, strict=True):
                with gr.TabItem(name):
                    interface.render()
            for interface, name, elem_id in tabs:
                with gr.TabItem(name, elem_id=elem_id):
                    interface.render()
        self.script = self.tabs[False]

    def load(self, path: Path) -> None:
        self.sd_models.load(path, self.profile)

    def choose(self, path: Path) -> None:
        """In the checkpoint dropdown: Forge loads it with the next picture only."""
        self.sd_models.choose(path, self.profile)

    def refine(self, path: Path) -> None:
        """Another checkpoint in mid-sampling; Forge activates the extra networks for it (sd_samplers_common.py)."""
        self.sd_models.load_in_mid_picture(path, self.profile)
        if self.profile == "forge":
            self.networks.activate(self.present, self.networks.parse_prompts(list(self.present.prompts))[1])

    @property
    def unet(self) -> Any:
        model = self.shared.sd_model
        return (model.forge_objects.unet.model if hasattr(model, "forge_objects") else model.model).diffusion_model

    def values(self) -> list[Any]:
        """The panel's values as it is built; what the API starts from."""
        return [getattr(control, "value", None) for control in self.script.controls]

    def api(self, *args: Any) -> list[Any]:
        """Script args of a request's ``alwayson_scripts`` (modules/api/api.py)."""
        values = self.values()
        values[: len(args)] = args
        return values

    def bare(self, p: Processing) -> torch.Tensor:
        """Latents of a picture with ``p.scripts = None``: no script is told of it, but the extra networks are."""
        p.prompts, data = self.networks.parse_prompts([p.prompt] * p.batch_size)
        with torch.inference_mode():
            self.networks.activate(p, data)
            return self.sample(p, torch.cat([self.noise(p.seed + i) for i in range(p.batch_size)]) * 14.6, p.prompts)

    # ---------------------------------------------------------------- a job

    def process(self, p: Processing) -> SimpleNamespace:
        """Latents (B, 4, 8, 8) of all images, their infotexts, and what was said; in a job, or within the one there is.

        An exception ends the job, but no script is told (modules/call_queue.py, modules/processing.py).
        """
        if self.shared.state.job:
            return self.process_images(p)
        self.shared.state.begin("task")
        try:
            return self.process_images(p)
        finally:
            self.shared.state.end()

    def process_images(self, p: Processing) -> SimpleNamespace:
        self.present = p
        args, script = p.script_args or self.values(), self.script
        script.before_process(p, *args)
        if self.profile == "forge":
            self.sd_models.forge_model_reload()
        script.process(p, *args)
        latents, texts = [], []
        with torch.inference_mode():
            for number in range(p.n_iter):
                p.prompts = [p.prompt] * p.batch_size if isinstance(p.prompt, str) else list(p.prompt)
                more = {"batch_number": number, "prompts": p.prompts}
                script.before_process_batch(p, *args, **more)
                given = list(p.prompts)
                p.prompts, data = self.networks.parse_prompts(p.prompts)
                hr_prompts, hr_data = self.networks.parse_prompts([p.hr_prompt or prompt for prompt in given])
                self.networks.activate(p, data)
                script.after_extra_networks_activate(p, *args, **more)
                script.process_batch(p, *args, **more)
                script.process_before_every_sampling(p, *args, x=None, noise=None, c=None, uc=None)
                noise = [self.noise(p.seed + number * p.batch_size + i) for i in range(p.batch_size)]
                x = self.sample(p, torch.cat(noise) * 14.6, p.prompts)
                if p.enable_hr:
                    x = self.hires(p, args, x, hr_prompts, hr_data)
                latents.append(x)
                for p.batch_index in range(p.batch_size):  # noqa: B020
                    if p.postprocess_image is not None:
                        p.postprocess_image(p)
                texts += [(prompt, dict(p.extra_generation_params)) for prompt in given]
            self.networks.deactivate(p, data)
        done = SimpleNamespace(latents=torch.cat(latents), params=texts, comments=list(p.comments))
        script.postprocess(p, done, *args)
        return done

    def hires(self, p: Processing, args: list[Any], x: torch.Tensor, prompts: list[str], data: Any) -> torch.Tensor:
        p.is_hr_pass = True
        if p.hr_checkpoint is not None:
            self.sd_models.load_in_mid_picture(p.hr_checkpoint, self.profile)
        self.networks.activate(p, data)
        self.script.before_hr(p, *args)
        for _ in range(2 if self.profile == "forge" else 1):
            self.script.process_before_every_sampling(p, *args, x=x, noise=None, c=None, uc=None)
        x = self.sample(p, x + 5.0 * self.noise(p.seed + 1000), prompts, start=5.0)
        p.is_hr_pass = False
        return x

    @staticmethod
    def noise(seed: int) -> torch.Tensor:
        return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

    def sample(self, p: Processing, x: torch.Tensor, prompts: list[str], start: float = 14.6) -> torch.Tensor:
        """Euler steps of a CFG denoiser from sigma ``start`` to 0."""
        sigmas = [start * (0.3 / start) ** (i / max(p.steps - 1, 1)) for i in range(p.steps)] + [0.0]
        parts = [[part(text) for text in prompt.split("AND")] for prompt in prompts]
        denoiser = SimpleNamespace(step=0, total_steps=p.steps, sampler=SimpleNamespace())
        denoiser.sampler.sampler_extra_args = {"cond": SimpleNamespace(batch=parts), "uncond": None}
        self.shared.state.sampling_step, self.shared.state.sampling_steps = 0, p.steps
        for i, sigma in enumerate(sigmas[:-1]):
            step = self.step_a1111 if self.profile == "a1111" else self.step_forks
            eps = step(p, denoiser, x, sigma, parts)
            x = x + eps * (sigmas[i + 1] - sigma)
            denoiser.step += 1
            self.shared.state.sampling_step = i  # the sampler's callback comes after the call
        return x

    def call(self, x: torch.Tensor, sigma: float, context: torch.Tensor, **options: Any) -> torch.Tensor:
        t = torch.full((len(x),), 100.0 + 50 * sigma)
        return self.unet(x / (sigma**2 + 1) ** 0.5, t, context=context, **options)

    def announce(self, denoiser: Any, x: torch.Tensor, sigma: float, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        state = self.shared.state
        params = self.callbacks.CFGDenoiserParams(
            x, sigma, state.sampling_step, state.sampling_steps, cond, uncond, denoiser
        )
        self.callbacks.call("cfg_denoiser", params)

    def step_a1111(self, p: Any, denoiser: Any, x: torch.Tensor, sigma: float, parts: list) -> torch.Tensor:
        images = len(x)
        cond = torch.cat([embed(text) for part_ in parts for text, _ in part_])
        uncond = embed(p.negative_prompt).expand(images, -1, -1)
        rows = torch.cat([x[i : i + 1] for i, part_ in enumerate(parts) for _ in part_] + [x])
        self.announce(denoiser, rows, sigma, cond, uncond)
        if p.cfg_scale == 1:  # "skip early cond": the unconds are left out
            rows, both = rows[:-images], cond
        else:
            both = torch.cat([cond, uncond])
        size = images if p.split else len(rows)
        calls = range(0, len(rows), size)
        eps = torch.cat([self.call(rows[a : a + size], sigma, both[a : a + size]) for a in calls])
        if p.cfg_scale == 1:
            eps = torch.cat([eps, torch.zeros_like(x)])
        scale, at = p.cfg_scale, 0
        out = eps[-images:].clone()
        for i, part_ in enumerate(parts):
            for _, weight in part_:
                out[i] += (eps[at] - eps[len(eps) - images + i]) * weight * scale
                at += 1
        return out

    def step_forks(self, p: Any, denoiser: Any, x: torch.Tensor, sigma: float, parts: list) -> torch.Tensor:
        images, most = len(x), max(map(len, parts))
        self.announce(denoiser, x, sigma, torch.cat([embed(part_[0][0]) for part_ in parts]), x)
        runs = [(0, torch.cat([embed(part_[k][0]) for part_ in parts]), parts[0][k][1]) for k in range(most)]
        if p.cfg_scale != 1:
            runs.append((1, embed(p.negative_prompt).expand(images, -1, -1), 1.0))
        if self.profile == "forge":
            runs.reverse()
        chunks = [[run] for run in runs] if p.split else [runs]
        out = {0: torch.zeros_like(x), 1: torch.zeros_like(x)}
        for chunk in chunks:
            marks = [mark for mark, _, _ in chunk]
            context = torch.cat([context for _, context, _ in chunk])
            eps = self.call(
                x.repeat(len(chunk), 1, 1, 1), sigma, context, transformer_options={"cond_or_uncond": marks}
            )
            for (mark, _, weight), one in zip(chunk, eps.chunk(len(chunk)), strict=True):
                out[mark] += one * weight / (sum(w for m, _, w in runs if m == mark))
        if p.cfg_scale == 1:
            return out[0]
        strength = sum(weight for mark, _, weight in runs if not mark)
        return out[1] + (out[0] - out[1]) * p.cfg_scale * strength


def fork_memory(profile: str) -> ModuleType | None:
    """The module that manages a fork's memory, in its place; ``calls`` is what it was asked for."""
    places = {"forge": "backend.memory_management", "reforge": "ldm_patched.modules.model_management"}
    for name in [n for n in sys.modules if n.partition(".")[0] in ("backend", "ldm_patched")]:
        del sys.modules[name]
    if profile not in places:
        return None
    parts = places[profile].split(".")
    for i in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:i])] = ModuleType(parts[i - 1])
    module = sys.modules[places[profile]]
    module.calls = []
    module.unload_all_models = lambda: module.calls.append("unload")
    module.soft_empty_cache = lambda: module.calls.append("empty")
    return module


def part(text: str) -> tuple[str, float]:
    """ "a cat :0.5" → ("a cat", 0.5)."""
    prompt, colon, weight = text.rpartition(":")
    return (prompt.strip(), float(weight)) if colon else (text.strip(), 1.0)


def embed(prompt: str) -> torch.Tensor:
    """A prompt's embedding (1, 7, 64): random, but always the same."""
    seed = int.from_bytes(hashlib.sha256(prompt.strip().encode()).digest()[:4], "little")
    return torch.randn(1, 7, CONTEXT, generator=torch.Generator().manual_seed(seed))
