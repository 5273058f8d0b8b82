"""Parameters as text and back, as the webuis write and read them (``create_infotext``, modules/infotext_utils.py)."""

import json
import re

import gradio as gr


def write(prompt, params):
    def quoted(value):
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text

    return f"{prompt}\n" + ", ".join(f"{key}: {quoted(value)}" for key, value in params.items() if value is not None)


def read(text):
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.split("\n")[-1])
    return {key: json.loads(value) if value[:1] == '"' == value[-1:] else value for key, value in found}


def paste(fields, params):
    """What each component holds afterwards: a value, an update's dict, or None for nothing."""
    made = {}
    for component, key in fields:
        value = key(params) if callable(key) else params.get(key)
        if value is None or isinstance(value, type(gr.update())):
            made[component._id] = value
            continue
        kind = type(component.value)
        made[component._id] = False if kind is bool and value == "False" else kind(value)
    return made
