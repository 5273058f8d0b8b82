"""The one place that touches the webuis' UNet: how a style reaches it.

    emb = time_embed(t) + s        DMM (arXiv:2504.12364) §3.3

A forward hook on ``time_embed`` adds s; a pre-hook on the UNet says which rows a call has. Both read ``Live`` at each
call: A1111 keeps the module when the next checkpoint has the same yaml (``modules/sd_models.py``), so a hook outlives
its checkpoint; the forks build a new UNet. Nothing is stored on the model: reForge's teardown empties tensors there.

Rows of a call: A1111 (``modules/sd_samplers_cfg_denoiser.py``) lines up conds (image × AND parts), then unconds, and
hands them out in one call or several; the forks (Forge ``backend/sampling/sampling_function.py``, reForge
``ldm_patched/modules/samplers.py``) give chunks of whole image batches, marked in ``cond_or_uncond``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .styles import COND, UNCOND, Plan

Row = tuple[int, int]  # half of the guidance, image


def unet_of(sd_model: Any) -> nn.Module:
    """The UNet module of the webui's ``shared.sd_model``."""
    owner = sd_model.forge_objects.unet.model if hasattr(sd_model, "forge_objects") else sd_model.model
    return owner.diffusion_model


def _repeats(params: Any, images: int, conds: int) -> list[int]:
    """How many AND parts each image has: from the sampler's own conds, else taken as equal."""
    given = getattr(getattr(params.denoiser, "sampler", None), "sampler_extra_args", None) or {}
    parts = [len(part) for part in getattr(given.get("cond"), "batch", ())]
    return parts if len(parts) == images and sum(parts) == conds else [conds // images] * images


def _count(cond: Any) -> int:
    """Rows of a text conditioning: a tensor, or SDXL's dict of them."""
    return len(cond["crossattn"] if isinstance(cond, dict) else cond)


class Live:
    """What the UNet is to show right now, and the hooks that make it so.

    ``show`` before each sampling, ``step`` at each step, ``hide`` where there is no style, ``end`` after the picture.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.first_image = 0  # of this batch, within the job
        self._unet: nn.Module | None = None
        self._handles: list[Any] = []
        self._share = 0.0
        self._layout: list[Row] | None = None  # A1111's rows of this step
        self._next = 0  # of those, the first that no call has had
        self._rows: Tensor | None = None  # (1, d) or (B, d): what this call adds
        self._sent: tuple[Tensor, Tensor] | None = None  # a row, and its copy on the UNet's device in its type

    @property
    def hooked(self) -> bool:
        return bool(self._handles)

    def show(self, sd_model: Any, plan: Plan) -> None:
        """From now on this plan, in place of any other. Calling it again changes nothing."""
        if plan is not self.plan:
            self.plan, self._share = plan, 0.0
        self._layout = self._rows = None
        self.ensure(sd_model)

    def ensure(self, sd_model: Any) -> None:
        """Hook the UNet that is loaded now, if it is not hooked yet."""
        unet = unet_of(sd_model)
        if unet is self._unet:
            return
        self._remove()
        self._unet = unet
        self._handles = [
            unet.register_forward_pre_hook(self._before, with_kwargs=True),
            unet.time_embed.register_forward_hook(self._after),
        ]

    def end(self) -> None:
        """The picture is done."""
        self.hide()
        self.first_image = 0

    def hide(self) -> None:
        """No style and no hooks, until ``show``."""
        self._remove()
        self.plan = self._layout = self._rows = self._sent = None

    def step(self, params: Any, forks: bool) -> None:
        """``on_cfg_denoiser``: where sampling stands, and in A1111 which rows the coming calls have.

        ``params``: CFGDenoiserParams (modules/script_callbacks.py). In A1111 its x has all rows, in the forks the
        images alone. The share of the steps is counted by the denoiser, which knows second-order samplers.
        """
        if self.plan is None:
            return
        step = getattr(params.denoiser, "step", None)
        total = getattr(params.denoiser, "total_steps", None)
        if step is None or not total:
            step, total = params.sampling_step, params.total_sampling_steps
        self._share = min(max(step / max(total - 1, 1), 0.0), 1.0)
        self._layout, self._next = None, 0
        if not forks and not self.plan.uniform:
            conds, rows = _count(params.text_cond), len(params.x)
            images = _count(params.text_uncond)
            layout = [(COND, i) for i, n in enumerate(_repeats(params, images, conds)) for _ in range(n)]
            self._layout = layout + [(UNCOND, i % images) for i in range(rows - conds)]

    def _before(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Choose the rows of this call of the UNet."""
        self._rows = None
        if self.plan is None:
            return
        vectors = self.plan.vectors(self._share)
        if vectors is None:
            return
        if self.plan.uniform:
            self._rows = vectors[0]
            return
        x = args[0] if args else kwargs["x"]
        rows = self._which(len(x), (kwargs.get("transformer_options") or {}).get("cond_or_uncond"))
        halves, images = vectors.shape[:2]
        index = [(min(half, halves - 1), (self.first_image + image) % images) for half, image in rows]
        self._rows = torch.stack([vectors[half, image] for half, image in index])

    def _which(self, count: int, marks: Any) -> list[Row]:
        if marks:
            images = count // len(marks)
            return [(int(mark), image) for mark in marks for image in range(images)]
        layout = self._layout or []
        mine = layout[self._next : self._next + count]
        self._next += count
        if len(mine) == count:
            return mine
        # a call that another extension made by itself: all rows if they are as many, else the positive half's
        return layout if len(layout) == count else [(COND, image) for image in range(count)]

    def _after(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        """time_embed(t) (B, d) + s."""
        rows = self._rows
        if rows is None:
            return None
        if self._sent is None or self._sent[0] is not rows or self._sent[1].device != out.device:
            self._sent = (rows, rows.to(out))
        sent = self._sent[1].to(out.dtype)
        if len(sent) not in (1, len(out)):  # the UNet called inside a call, with other rows
            sent = sent.repeat(-(-len(out) // len(sent)), 1)[: len(out)]
        return out + sent

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._unet = [], None


LIVE = Live()
