"""ComfyUI's page in Chromium: what a user does there, with the mouse where it matters."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.hosts.comfyui.harness import ROOT, Server, make_dmm

RECIPE_WIDGET = 12  # its place in MergeCheckpoints
FILE, STYLES = "my-styles.safetensors", ["ink", "clay", "blueprint", "neon"]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or a modal dialog lies over everything
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}


SHORT = "short.yaml"  # in the server's input folder: a merge that is short, and long enough to be cancelled
SHORT_RECIPE = "data: {latents_per_teacher: 4, steps: 2}\ntrain: {steps: 40, batch: 1, warmup: 2, save_every: 2}\n"
BRIEF = "brief.yaml"  # where nothing is cancelled half-way
BRIEF_RECIPE = SHORT_RECIPE.replace("steps: 40", "steps: 4")


def workflow(path: Path) -> dict[str, Any]:
    """A shipped workflow, with the checkpoint that the test made; a merge in it is a brief one."""
    made = json.loads(path.read_text(encoding="utf-8").replace("mini-dmm.safetensors", FILE))
    for node in made.get("nodes", made.values()):
        if isinstance(node, dict) and node.get("type") == "MergeCheckpoints":
            node["widgets_values"][RECIPE_WIDGET] = BRIEF
        elif isinstance(node, dict) and node.get("class_type") == "MergeCheckpoints":
            node["inputs"]["recipe"] = BRIEF
    return made


def put_styles(server: Server) -> None:
    """A DMM file of the four styles that the workflows name, trained if DMM_SHOTS_FILE is one."""
    target = server.base / "models" / "checkpoints" / FILE
    if target.exists():
        return
    if given := os.environ.get("DMM_SHOTS_FILE"):
        target.write_bytes(Path(given).read_bytes())
    else:
        make_dmm(target, tuple(STYLES), thumbnails=teacher_thumbnails())


def teacher_thumbnails() -> dict[str, str]:
    """A picture by each of the mini family's teachers of those names."""
    from dmm_core.models import load_pipeline
    from dmm_core.report.thumbnails import data_uri
    from dmm_core.sample import decode, sample
    from mini_family import family

    made = {}
    with tempfile.TemporaryDirectory() as temporary:
        for teacher in family.unpack(Path(temporary))[1:]:
            pipe = load_pipeline(teacher)
            latents = sample(pipe, ["a picture of a cat face"], seeds=[2], steps=12, cfg_scale=2.0)
            made[teacher.stem] = data_uri(decode(pipe.vae, latents)[0])
    return made


# Of every picture in the strip: style, decoded or not, opacity, height.
PICTURES = """(kind) => [...(app.graph.nodes.find(n => n.comfyClass === kind).dmmStrip?.element.children ?? [])].map(
    cell => [cell.title, cell.firstChild.naturalWidth > 0, Number(cell.style.opacity), cell.firstChild.clientHeight])"""


class Page:
    """ComfyUI's page, and what a user does on it."""

    def __init__(self, page: Any, server: Any, nodes2: bool) -> None:
        self.page, self.server, self.nodes2 = page, server, nodes2

    def until(self, script: str, argument: Any = None, seconds: float = 120) -> Any:
        return self.page.wait_for_function(script, arg=argument, timeout=seconds * 1000).json_value()

    def open(self) -> None:
        settings = self.server.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
        self.page.goto(self.server.url, wait_until="domcontentloaded")
        self.until(
            "() => window.LiteGraph?.registered_node_types.StyleMix && window.app?.graph && app.canvas", None, 300
        )
        self.page.evaluate(
            "async (all) => { for (const [k, v] of Object.entries(all)) await app.extensionManager.setting.set(k, v) }",
            {"Comfy.VueNodes.Enabled": self.nodes2},
        )
        self.until("(on) => !!LiteGraph.vueNodesMode === on", self.nodes2)

    def load(self, path: Path) -> None:
        self.page.keyboard.press("Escape")  # the dialog of an error before this
        self.page.evaluate("(w) => app.loadGraphData(w)", workflow(path))
        self.page.wait_for_function(
            """() => app.graph.nodes.length && (!LiteGraph.vueNodesMode
                || app.graph.nodes.every(n => document.querySelector(`[data-node-id='${n.id}']`)))"""
        )
        time.sleep(1.0)  # names and pictures of the styles come after the load, and Nodes 2.0 measures its nodes

    def fit(self) -> None:
        """Let the workflow fill the page, for a picture of it."""
        self.page.evaluate(
            """() => {
                const boxes = app.graph.nodes.map(n => n.getBounding()), ds = app.canvas.ds;
                const low = (i) => Math.min(...boxes.map(b => b[i]));
                const size = (i) => Math.max(...boxes.map(b => b[i] + b[i + 2])) - low(i);
                ds.scale = Math.min(1, 1490 / size(0), 700 / size(1));
                ds.offset = [80 / ds.scale - low(0), 130 / ds.scale - low(1)];
                app.canvas.setDirty(true, true);
            }"""
        )
        time.sleep(0.4)

    def rectangles(self) -> dict[int, tuple[float, float, float, float]]:
        """Node → x, y, width, height of what is drawn of it, title included, in the page's pixels."""
        found = self.page.evaluate(
            """(vue) => app.graph.nodes.map(node => {
                if (vue) {
                    const r = document.querySelector(`[data-node-id='${node.id}']`).getBoundingClientRect();
                    return [node.id, r.x, r.y, r.width, r.height];
                }
                const [x, y, w, h] = node.getBounding(), canvas = app.canvas.canvas.getBoundingClientRect();
                const [left, top] = app.canvas.ds.convertOffsetToCanvas([x, y]), scale = app.canvas.ds.scale;
                return [node.id, canvas.x + left, canvas.y + top, w * scale, h * scale];
            })""",
            self.nodes2,
        )
        return {node: tuple(box) for node, *box in found}

    def overlapping(self) -> list[tuple[str, str]]:
        """Titles of the nodes that lie over one another, by more than a pixel."""
        titles = dict(self.page.evaluate("() => app.graph.nodes.map(n => [n.id, n.title])"))
        return [
            (titles[a], titles[b])
            for (a, (ax, ay, aw, ah)), (b, (bx, by, bw, bh)) in itertools.combinations(self.rectangles().items(), 2)
            if min(ax + aw, bx + bw) - max(ax, bx) > 1 and min(ay + ah, by + bh) - max(ay, by) > 1
        ]

    def labels(self, kind: str = "StyleMix") -> list[str]:
        """What the visible widgets of the first node of a kind are called."""
        return self.page.evaluate(
            "(kind) => app.graph.nodes.find(n => n.comfyClass === kind)"
            ".widgets.filter(w => !w.hidden).map(w => w.label ?? w.name)", kind,
        )  # fmt: skip

    def wait_labels(self, expected: list[str]) -> None:
        end = time.monotonic() + 120
        while self.labels()[: len(expected)] != expected and time.monotonic() < end:
            time.sleep(0.1)
        assert self.labels()[: len(expected)] == expected
        if self.nodes2:
            shown = self.page.locator(f"[data-node-id='{self.node_id('StyleMix')}'] .lg-node-widget")
            while [t.split("\n")[0] for t in shown.all_inner_texts()][: len(expected)] != expected:
                assert time.monotonic() < end, shown.all_inner_texts()
                time.sleep(0.1)

    def wait_pictures(self, kind: str, names: list[str]) -> list:
        """Until the strip shows these styles, every picture decoded and laid out."""
        self.until(
            f"([kind, names]) => {{ const cells = ({PICTURES})(kind);"
            " return cells.length === names.length && cells.every((c, i) => c[0] === names[i] && c[1] && c[3] > 20) }",
            [kind, names],
        )
        return self.page.evaluate(PICTURES, kind)

    def node_id(self, kind: str) -> int:
        return self.page.evaluate("(kind) => app.graph.nodes.find(n => n.comfyClass === kind).id", kind)

    def value(self, widget: str) -> float:
        return self.page.evaluate(
            "(name) => app.graph.nodes.find(n => n.comfyClass === 'StyleMix').widgets.find(w => w.name === name).value",
            widget,
        )

    def drag(self, index: int, share: float) -> None:
        """Pull slider number ``index`` to ``share`` of its width."""
        if self.nodes2:
            row = self.page.locator(f"[data-node-id='{self.node_id('StyleMix')}'] .lg-node-widget").nth(index)
            thumb = row.get_by_role("slider").bounding_box()
            track = row.locator("[data-slot='slider']").bounding_box()
            start = (thumb["x"] + thumb["width"] / 2, thumb["y"] + thumb["height"] / 2)
            end = (track["x"] + track["width"] * share, start[1])
        else:
            x, y, width = self.page.evaluate(
                """(index) => {
                    const node = app.graph.nodes.find(n => n.comfyClass === 'StyleMix'), w = node.widgets[index];
                    const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 15, node.pos[1] + w.last_y + 10]);
                    const box = app.canvas.canvas.getBoundingClientRect();
                    return [box.x + x, box.y + y, (node.size[0] - 30) * app.canvas.ds.scale];
                }""", index,
            )  # fmt: skip
            start, end = (x + width * 0.4, y), (x + width * share, y)
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        for i in range(1, 9):
            mouse.move(start[0] + (end[0] - start[0]) * i / 8, end[1])
            time.sleep(0.03)
        mouse.up()
        time.sleep(0.3)

    def press_run(self) -> None:
        """The Run button: inside what has the test id, or since frontend 1.49 that itself."""
        self.page.locator("[data-testid='queue-button'] button, button[data-testid='queue-button']").first.click()

    def run(self) -> bytes:
        """Press Run; the picture that comes."""
        done = len(self.server.get("/history"))
        self.press_run()
        end = time.monotonic() + 300
        while len(history := self.server.get("/history")) == done:
            assert time.monotonic() < end, "nothing was queued"
            time.sleep(0.1)
        entry = list(history.values())[-1]
        assert entry["status"]["status_str"] == "success", entry["status"]
        image = next(i for out in entry["outputs"].values() for i in out.get("images", []))
        self.until("(name) => Object.values(app.nodeOutputs).some(o => o.images?.some(i => i.filename === name))",
                   image["filename"])  # fmt: skip
        time.sleep(0.7)  # until it is drawn
        return self.server.raw("/view?filename={filename}&subfolder={subfolder}&type={type}".format(**image))[1]
