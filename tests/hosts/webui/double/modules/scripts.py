"""Script, and the loading of script files: A1111 takes the clone's root off ``sys.path`` again, the forks leave it."""

import importlib.util
import inspect
import re
import sys
from collections import namedtuple

from modules import extra_networks, script_callbacks

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data = []


class Script:
    infotext_fields = None
    paste_field_names = None
    is_img2img = False

    def elem_id(self, item_id):
        tab = "img2img" if self.is_img2img else "txt2img"
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_{tab}_{title}_{item_id}"


for _event in ("before_process", "process", "before_process_batch", "process_batch", "before_hr", "postprocess",
               "after_extra_networks_activate", "process_before_every_sampling"):  # fmt: skip
    setattr(Script, _event, lambda self, p, *args, **kwargs: None)


def load_scripts(files, keep_path):
    """``files``: (path, root of its extension). Callbacks are forgotten before, extra networks after."""
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    for path, root in files:
        before = list(sys.path)
        sys.path.insert(0, str(root))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for cls in list(vars(module).values()):
            if inspect.isclass(cls) and issubclass(cls, Script):
                scripts_data.append(ScriptClassData(cls, str(path), str(root), module))
        if not keep_path:
            sys.path[:] = before
    extra_networks.initialize()
