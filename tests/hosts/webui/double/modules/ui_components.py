"""InputAccordion: a hidden checkbox that goes with an accordion; over the real gradio."""

import gradio as gr

if hasattr(gr, "component_meta"):  # gradio 4 would write a file beside this one; Forge keeps it from that too
    gr.component_meta.create_or_modify_pyi = lambda *args: None


class InputAccordion(gr.Checkbox):
    def __init__(self, value=None, **kwargs):
        elem_id = kwargs.pop("elem_id")
        super().__init__(value=value, elem_id=f"{elem_id}-checkbox", visible=False, **kwargs)
        self.accordion = gr.Accordion(label=kwargs.get("label"), elem_id=elem_id, open=value)

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, *error):
        self.accordion.__exit__(*error)

    def get_block_name(self):
        return "checkbox"
