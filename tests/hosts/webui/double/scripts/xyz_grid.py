"""The grid's axes, as other extensions find them; and a run of one axis."""

from copy import copy

from modules import scripts


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.choices = confirm, choices


class Script(scripts.Script):
    def title(self):
        return "X/Y/Z plot"

    def show(self, is_img2img):
        return True


axis_options = [AxisOption("Nothing", str, lambda p, x, xs: None)]


def run(p, label, values, process):
    """One picture a value, each with a shallow copy of p."""
    option = next(option for option in axis_options if option.label == label)
    values = [option.type(value) for value in values]
    if option.confirm:
        option.confirm(p, values)
    made = []
    for value in values:
        cell = copy(p)
        option.apply(cell, value, values)
        made.append(process(cell))
    return made
