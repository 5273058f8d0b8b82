"""The one place that patches ComfyUI: how a style reaches the UNet.

    emb = time_embed(t) + s        DMM (arXiv:2504.12364) §3.3

ComfyUI's ``UNetModel._forward`` calls the patches ``emb_patch`` at exactly that place, in SD1.5 and SDXL alike. Two
wrappers, put on the model once when it is loaded, bring s there (``comfy/patcher_extension.py``): one around a step's
``calc_cond_batch``, which settles what every conditioning's rows are, and one around the UNet, which adds them.
"""

from __future__ import annotations

import uuid
from typing import Any

import torch
from comfy.conds import CONDRegular
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from dmm_core.errors import StyleError

from .values import Book, Style

KEY = "dmm"  # of the wrappers, the attachment and the model's option
COND = "dmm_style"  # keyword and entry of model_conds: rows (B, d), a batch's own
ROWS = "dmm_rows"  # option: one row (1, d) for the whole batch
TIME_BIAS = "diffusion_model.time_embed.2.bias"


class Live:
    """What a MODEL shows: a style, or none; and s of the style that is baked into its weights, if one is.

    Shared by clones and never changed, hence not copied with the options.
    """

    def __init__(self, book: Book, style: Style | None = None, baked: Tensor | None = None) -> None:
        self.book, self.style, self.baked = book, style, baked

    def __deepcopy__(self, memo: dict) -> Live:
        return self

    def rows(self, share: float, style: Style | None = None) -> Tensor | None:
        """What the time embedding gains, (K, d) on the CPU; ``style``: a conditioning's own, in place of it."""
        style = style or self.style
        if style is None:
            return None
        return style.vectors(share) if self.baked is None else style.vectors(share) - self.baked


class StyleCond(CONDRegular):
    """A conditioning's style on its way to a DMM model, whose wrapper turns it into rows.

    Where no such wrapper ran the model knows no styles, and taking no notice would show a wrong picture.
    """

    def __init__(self, style: Style) -> None:
        super().__init__(torch.zeros(style.rows, style.book.codebook.dim))
        self.style = style

    def _copy_with(self, cond: Tensor) -> StyleCond:
        return self

    def process_cond(self, batch_size: int, **kwargs: Any) -> CONDRegular:
        raise StyleError(
            f"the conditioning has a style of {self.style.book.path.name}, but the model knows no styles",
            hint="Load the model with Load DMM.",
        )


def prepare(model: Any, book: Book, default: Style | None = None) -> None:
    """Make a freshly loaded ModelPatcher able to take styles; ``default``: its style, unless that is in its weights."""
    model.set_attachments(KEY, book)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, settle)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, add_style)
    _set(model, Live(book, default))


def apply(model: Any, style: Style) -> Any:
    """A clone that shows this style in place of any other. Raises StyleError for another checkpoint's model."""
    live = _live(model, style)
    clone = _unbaked(model, live)
    _set(clone, Live(live.book, style))
    return clone


def bake(model: Any, style: Style) -> Any:
    """A clone with the style as a weight patch, which stock nodes save; it replaces an earlier style, baked or live."""
    live = _live(model, style)
    style.single("baked")
    vector = style.vectors()[0]
    clone = _unbaked(model, live)
    clone.add_patches({TIME_BIAS: ("diff", (vector,))})
    _set(clone, Live(live.book, None, vector))
    return clone


def condition(conditioning: list, style: Style) -> list:
    """A conditioning whose entries carry the style; ``convert_cond`` (comfy/sampler_helpers.py) keeps model_conds."""
    made = []
    for embedding, about in conditioning:
        conds = {**about.get("model_conds", {}), COND: StyleCond(style)}
        made.append([embedding, {**about, "model_conds": conds}])
    return made


def _unbaked(model: Any, live: Live) -> Any:
    """A clone without the patch of an earlier ``bake``, at whatever strength merges have left it since then."""
    clone = model.clone()
    if live.baked is not None:
        ours = lambda patch: isinstance(patch[1], tuple) and patch[1][-1][0] is live.baked  # noqa: E731
        clone.patches[TIME_BIAS] = [p for p in clone.patches.get(TIME_BIAS, []) if not ours(p)]
        clone.patches_uuid = uuid.uuid4()  # tells ModelPatcher that the weights differ
    return clone


def _set(model: Any, live: Live) -> None:
    model.model_options.setdefault("transformer_options", {})[KEY] = live


def _live(model: Any, style: Style) -> Live:
    book = model.get_attachment(KEY)
    live = model.model_options.get("transformer_options", {}).get(KEY)
    if book is None or live is None:
        raise StyleError(
            f"the style is of {style.book.path.name}, but the model knows no styles",
            hint="Load the model with Load DMM.",
        )
    book.require_same(style.book, "the model")
    return live


def step_share(sigmas: Tensor | None, sigma: Tensor) -> float:
    """How many of the steps are done: 0 at the first, 1 at the last, between them for samplers that look ahead.

    ``sigmas`` (steps + 1,) is the sampler's table, which ends with the level that is never evaluated.
    """
    table = [] if sigmas is None else sigmas[:-1].tolist()
    now = float(sigma.max())
    for i in range(len(table) - 1):
        a, b = table[i], table[i + 1]
        if min(a, b) <= now <= max(a, b) and a != b:
            return (i + (a - now) / (a - b)) / (len(table) - 1)
    return 1.0 if len(table) > 1 and abs(now - table[-1]) <= abs(now - table[0]) else 0.0


def settle(
    executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """Give every conditioning of this step its rows; or the whole step one, where no conditioning has its own.

    A conditioning without a style gets the model's, so that all of them still fit into one call of the UNet
    (``cond_equal_size`` in comfy/samplers.py wants the same keys everywhere).
    """
    options = model_options.get("transformer_options", {})
    live: Live | None = options.get(KEY)
    own = [c["model_conds"][COND].style for part in conds for c in part or [] if COND in c.get("model_conds", {})]
    if live is None or (live.style is None and not own):
        return executor(model, conds, x_in, timestep, model_options)
    for style in own:
        live.book.require_same(style.book, "the model")
    moving = any(style is not None and style.scheduled for style in (live.style, *own))
    share = step_share(options.get("sample_sigmas"), timestep) if moving else 0.0
    if not own and live.style is not None and live.style.rows == 1:
        options = {**options, ROWS: live.rows(share).to(x_in.device)}
        return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})
    general = live.rows(share)
    if general is None:
        general = torch.zeros(1, live.book.codebook.dim)

    def with_rows(cond: dict[str, Any]) -> dict[str, Any]:
        mine = cond["model_conds"].get(COND)
        rows = general if mine is None else live.rows(share, mine.style)
        return {**cond, "model_conds": {**cond["model_conds"], COND: CONDRegular(rows)}}

    conds = [part and [with_rows(cond) for cond in part] for part in conds]
    return executor(model, conds, x_in, timestep, model_options)


def add_style(
    executor: Any, x: Tensor, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None,
    transformer_options: dict[str, Any] | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Add the rows to the time embedding of this call of the UNet; before other patches, as baked weights would."""
    options = transformer_options or {}
    rows = kwargs.pop(COND, None)
    if rows is None:
        rows = options.get(ROWS)
    if rows is None and KEY in options and options[KEY].style is not None and options[KEY].style.rows == 1:
        # a custom sampler that calls the UNet without ComfyUI's calc_cond_batch
        rows = options[KEY].rows(step_share(options.get("sample_sigmas"), options["sigmas"]))
    if rows is not None:
        patches = options.get("patches", {})

        def patch(emb: Tensor, channels: int, _: dict[str, Any]) -> Tensor:
            return emb + rows.to(emb)

        options = {**options, "patches": {**patches, "emb_patch": [patch, *patches.get("emb_patch", [])]}}
    return executor(x, timesteps, context, y, control, options, **kwargs)
