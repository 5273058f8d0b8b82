"""The nodes: sockets, widgets and their texts. What they do is in ``values``, ``host`` and ``loading``.

Saved widget values are positional: new widgets go to the end of a node's inputs, and none is ever moved.
"""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from dmm_core.errors import BadInput
from dmm_core.schedule import MODES

from . import files, folders, host, loading, values

CATEGORY = "DMM"
CodebookType = io.Custom("DMM_CODEBOOK")
StyleType = io.Custom("DMM_STYLE")
SLIDER = {"min": -1.0, "max": 2.0, "step": 0.01, "display_mode": io.NumberDisplay.slider}
SHARE = {"min": 0.0, "max": 1.0, "step": 0.01, "display_mode": io.NumberDisplay.slider}


def schema(node_id: str, display_name: str, description: str, inputs: list, outputs: list, **more: Any) -> io.Schema:
    return io.Schema(
        node_id=node_id, display_name=display_name, category=CATEGORY, description=description, inputs=inputs,
        outputs=outputs, **more,
    )  # fmt: skip


def codebook_input() -> io.Input:
    return CodebookType.Input("codebook", tooltip="The styles of a checkpoint, from Load DMM.")


def style_input(name: str = "style", optional: bool = False, tooltip: str = "From a style node.") -> io.Input:
    return StyleType.Input(name, optional=optional, tooltip=tooltip)


def style_output(tooltip: str = "For Apply Style, Conditioning Style and the others.") -> io.Output:
    return StyleType.Output("STYLE", display_name="STYLE", tooltip=tooltip)


class LoadDMM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadDMM", "Load DMM", "Loads a checkpoint that holds several styles. Without a style node it shows its "
            "default style.",
            [io.Combo.Input("checkpoint", options=loading.choices(), tooltip="A DMM file in models/checkpoints or "
                            "models/diffusion_models, or a diffusers folder in models/diffusers.")],
            [io.Model.Output(display_name="MODEL"), io.Clip.Output(display_name="CLIP"),
             io.Vae.Output(display_name="VAE"),
             CodebookType.Output("CODEBOOK", display_name="CODEBOOK", tooltip="The file's styles, for style nodes.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str) -> Any:
        """A rewritten file is loaded again."""
        try:
            return f"{checkpoint} {folders.stamp(loading.find(str(checkpoint)))}"
        except (BadInput, OSError):  # loading will say it; and None, where the name comes over a wire
            return checkpoint

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        return io.NodeOutput(*loading.load(loading.find(checkpoint)))


class StyleVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleVector", "Style", "One style by its name.",
            [codebook_input(),
             io.String.Input("style", default="", tooltip="The style's name, as Load DMM's file has it."),
             io.Float.Input("strength", default=1.0, tooltip="0 is the default style, 1 this style, beyond that "
                            "more of it than it was taught. Not the same as a LoRA's strength.", **SLIDER)],
            [style_output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, codebook: values.Book, style: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(values.named(codebook, style.strip(), strength))


class StyleMix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sliders = [
            io.Float.Input(f"w{i}", default=float(i == 0), optional=True, **SLIDER,
                           tooltip=f"How much of style number first + {i}. Without effect beyond the last style.")
            for i in range(values.SLIDERS)
        ]  # fmt: skip
        return schema(
            "StyleMix", "Style Mix", "Mixes styles, a slider each. For more than eight, connect one Style Mix to the "
            "next and raise the next one's first by 8.",
            [codebook_input(), *sliders,
             io.Boolean.Input("normalise", default=True, optional=True, tooltip="Divide the weights by their sum, as "
                              "in training. Turn off to extrapolate."),
             io.Int.Input("first", default=0, min=0, max=4096, optional=True, tooltip="Number of the style that the "
                          "first slider is for, counted from 0."),
             style_input("add", True, "A style or mix whose weights, as its sliders stand, are added to these.")],
            [style_output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, codebook: values.Book, normalise: bool = True, first: int = 0, add: values.Style | None = None,
        **sliders: float,
    ) -> io.NodeOutput:  # fmt: skip
        weights = [sliders.get(f"w{i}", float(i == 0)) for i in range(values.SLIDERS)]
        return io.NodeOutput(values.mixed(codebook, weights, normalise, first, add))


class StyleBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleBatch", "Style Batch", "All styles at once, one for each picture of a batch.",
            [codebook_input()],
            [style_output("One style for each row of the batch."),
             io.Int.Output("count", display_name="count", tooltip="How many styles: for the latent's batch_size.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, codebook: values.Book) -> io.NodeOutput:
        return io.NodeOutput(values.every(codebook), len(codebook.names))


class ApplyStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ApplyStyle", "Apply Style", "The model in this style. It replaces an earlier Apply Style.",
            [io.Model.Input("model", tooltip="From Load DMM, LoRAs and other patches included."), style_input()],
            [io.Model.Output(display_name="MODEL")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, style: values.Style) -> io.NodeOutput:
        return io.NodeOutput(host.apply(model, style))


class ConditioningStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ConditioningStyle", "Conditioning Style", "A style for one prompt: with masks, areas or step ranges, for "
            "a region or some steps; on the negative, for that half of the guidance. It goes before the model's style.",
            [io.Conditioning.Input("conditioning", tooltip="The prompt that gets the style."), style_input()],
            [io.Conditioning.Output(display_name="CONDITIONING")],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning: list, style: values.Style) -> io.NodeOutput:
        return io.NodeOutput(host.condition(conditioning, style))


class StyleSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "StyleSchedule", "Style Schedule", "From one style to the next while sampling.",
            [style_input("style_1", tooltip="The style to begin with."),
             style_input("style_2", tooltip="The next style."),
             style_input("style_3", True, "One more."), style_input("style_4", True, "One more."),
             io.Combo.Input("mode", options=list(MODES), default="blend", tooltip="blend: gradually. switch: "
                            "at once, every style for an equal part of the steps."),
             io.Float.Input("start", default=0.0, tooltip="Share of the steps before it begins to change.", **SHARE),
             io.Float.Input("end", default=1.0, tooltip="Share of the steps by which the last is reached.", **SHARE)],
            [style_output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, style_1: values.Style, style_2: values.Style, mode: str, start: float, end: float,
        style_3: values.Style | None = None, style_4: values.Style | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        styles = [style for style in (style_1, style_2, style_3, style_4) if style is not None]
        return io.NodeOutput(values.scheduled(styles, mode, start, end))


class SaveStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SaveStyle", "Save Style", "Writes a style as a small file to models/loras. Every LoRA loader shows the "
            "style with it, at strength 1 and on this DMM file.",
            [style_input(), io.String.Input("filename", default="style", tooltip="Name of the file, with subfolder if "
                                            "you like. A style file of that name is replaced.")],
            [], is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, style: values.Style, filename: str) -> io.NodeOutput:
        written = files.save_style(style, filename, folder_paths.get_folder_paths("loras")[0])
        return io.NodeOutput(ui={"text": (written,)})


class BakeStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "BakeStyle", "Bake Style", "Makes the style part of the model's weights, so that Save Checkpoint writes an "
            "ordinary checkpoint in this style. It replaces an earlier style.",
            [io.Model.Input("model", tooltip="From Load DMM."), style_input()],
            [io.Model.Output(display_name="MODEL")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, style: values.Style) -> io.NodeOutput:
        return io.NodeOutput(host.bake(model, style))


NODES: tuple[type[io.ComfyNode], ...] = (
    LoadDMM, StyleVector, StyleMix, StyleBatch, ApplyStyle, ConditioningStyle, StyleSchedule, SaveStyle, BakeStyle,
)  # fmt: skip
