// Names on the sliders: StyleMix's w0…w7 and StyleVector's list show the styles of the checkpoint upstream, and pictures
// of them where the file has some.
//
// The server knows nothing of this file. Widget names, their order and their values stay as the schema has them, so that
// workflows saved with or without it are the same; only `label`, `hidden` and the list of a combo change.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { LOADER, MERGE, checkpointOf, graphs, inputOf, merging, nodesOf, widgetOf } from "./graph.js";
import { addProgress, showProgress } from "./progress.js";
import { lightThumbnails, showThumbnails } from "./thumbnails.js";

const MIX = "StyleMix";
const VECTOR = "StyleVector";
const SLIDERS = 8;
const COLOURS = { DMM_CODEBOOK: "#c7a252", DMM_STYLE: "#d977b0", DMM_TEACHERS: "#7fb069" }; // of sockets and wires
const WAIT_MS = 120; // a workflow that loads fires dozens of events; one look at the graph afterwards is enough
const KEEP_MS = 3000; // how long an answer of the route is taken for current

const answers = new Map(); // checkpoint → {at, promise of an answer or null}
const ownLabels = new WeakMap(); // widget → the label it had before ours
let timer = null;

/** A checkpoint's `styles` ({name, thumbnail}) in codebook order and its `usage`, or null where the server cannot tell. */
function toldOf(checkpoint) {
  const known = answers.get(checkpoint);
  if (known && Date.now() - known.at < KEEP_MS) return known.promise;
  const promise = api
    .fetchApi(`/dmm/styles?checkpoint=${encodeURIComponent(checkpoint)}`)
    .then((response) => (response.ok ? response.json() : null))
    .catch(() => null);
  answers.set(checkpoint, { at: Date.now(), promise });
  return promise;
}

/** Show `widget` as `label` or hide it; says whether that changed anything. */
function present(node, widget, label, hidden) {
  if (!ownLabels.has(widget)) ownLabels.set(widget, widget.label);
  // A name that the user gave by hand is kept with the input; it wins.
  const wanted = inputOf(node, widget.name)?.label ?? label ?? ownLabels.get(widget);
  if (widget.label === wanted && !!widget.hidden === hidden && !!widget.options?.hidden === hidden) return false;
  widget.label = wanted;
  widget.hidden = hidden; // the classic canvas reads this one,
  (widget.options ??= {}).hidden = hidden; // Nodes 2.0 that one
  if (hidden) widget.computeSize = () => [0, -4]; // 4 is the gap between widgets, which the classic canvas would leave
  else delete widget.computeSize;
  return true;
}

/** Make both canvases draw the widgets of `node` anew; `resize`: true, false, or "grow" for never smaller. */
function redraw(node, resize) {
  if (node.widgets.length) node.widgets.push(node.widgets.pop()); // Nodes 2.0 watches the array, not what is in it
  if (node.dmmCopied && window.LiteGraph?.vueNodesMode && !app.configuringGraph) {
    // After a change of links or of a value Nodes 2.0 holds copies of the widgets; adding the node again takes new ones.
    node.graph?.onNodeAdded?.(node);
  }
  node.dmmCopied = false;
  if (resize) node.setSize([node.size[0], Math.max(node.computeSize()[1], resize === "grow" ? node.size[1] : 0)]);
  app.graph.setDirtyCanvas(true, true);
}

const firstOf = (node) => Number(widgetOf(node, "first")?.value ?? 0);
const weightsOf = (node) => Array.from({ length: SLIDERS }, (_, i) => Number(widgetOf(node, `w${i}`)?.value ?? 0));

function labelSliders(node, styles) {
  const first = firstOf(node);
  let changed = false;
  for (let i = 0; i < SLIDERS; i++) {
    const widget = widgetOf(node, `w${i}`);
    if (!widget) continue;
    const name = styles?.[first + i]?.name;
    // A slider without a style is still shown while it is wired or has a weight: the user must be able to take that away.
    const idle = !widget.value && inputOf(node, widget.name)?.link == null;
    changed = present(node, widget, name, !!styles && name === undefined && idle) || changed;
  }
  const shown = (styles ?? []).slice(first, first + SLIDERS);
  changed = showThumbnails(node, shown, weightsOf(node)) || changed;
  if (changed) redraw(node, true);
}

function listStyles(node, styles) {
  const widget = widgetOf(node, "style");
  if (!widget || widget.type !== "combo") return;
  const names = styles?.map((style) => style.name) ?? [];
  if (names.length && !widget.value) widget.value = names[0];
  const values = [...names];
  // What the workflow was saved with stays, even if this checkpoint does not have it: the server then says so.
  if (widget.value && !values.includes(widget.value)) values.push(widget.value);
  const chosen = () => names.map((name) => Number(name === widget.value));
  node.dmmChosen = () => lightThumbnails(node, chosen());
  const resized = showThumbnails(node, styles ?? [], chosen(), (name) => {
    widget.value = name;
    widget.callback?.(name);
    node.dmmChosen();
    redraw(node, false);
  });
  if (JSON.stringify(values) === JSON.stringify(widget.options.values) && !node.dmmCopied && !resized) return;
  widget.options.values = values;
  redraw(node, resized);
}

/** What a file for few steps asks of the sampler. */
function sayUsage(node, usage) {
  if (showProgress(node, usage)) redraw(node, usage ? "grow" : true);
}

async function refresh() {
  for (const graph of graphs()) {
    for (const node of nodesOf(graph)) {
      if (![LOADER, MIX, VECTOR].includes(node.comfyClass)) continue;
      const checkpoint = checkpointOf(node);
      const told = checkpoint ? await toldOf(checkpoint) : null;
      if (!node.graph || checkpointOf(node) !== checkpoint) continue; // removed or rewired meanwhile
      if (node.comfyClass === LOADER) sayUsage(node, told?.usage ?? "");
      else (node.comfyClass === MIX ? labelSliders : listStyles)(node, told?.styles ?? null);
    }
  }
}

function refreshSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => refresh().catch((error) => console.error("DMM:", error)), WAIT_MS);
}

/** Call `after` whenever `object[name]` has been called. */
function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    after.apply(this, args);
    return result;
  };
}

/** Put a combo of the same name and value in the place of StyleVector's text field. */
function textToCombo(node) {
  const at = node.widgets?.findIndex((widget) => widget.name === "style") ?? -1;
  if (at < 0 || node.widgets[at].type === "combo") return;
  const text = node.widgets[at];
  const values = text.value ? [text.value] : [];
  const combo = node.addWidget("combo", "style", text.value, () => node.dmmChosen?.(), { ...text.options, values });
  combo.label = text.label;
  combo.tooltip = text.tooltip;
  node.widgets.pop();
  node.widgets[at] = combo;
}

/** Values that were saved by name; the page itself knows lists alone, and would leave every widget undefined. */
function takeNamed(node, values, defaults) {
  if (!values || Array.isArray(values)) return;
  for (const widget of node.widgets ?? []) {
    if (widget.serialize !== false) widget.value = values[widget.name] ?? defaults[widget.name];
  }
}

function paint() {
  for (const [type, colour] of Object.entries(COLOURS)) {
    for (const table of [app.canvas?.default_connection_color_byType, window.LGraphCanvas?.link_type_colors]) {
      if (table) table[type] = colour;
    }
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour); // Nodes 2.0
  }
}

app.registerExtension({
  name: "dmm.styles",

  setup() {
    paint();
    api.addEventListener("dmm.progress", ({ detail }) => {
      const node = merging(detail?.node);
      if (node && showProgress(node, String(detail.text))) redraw(node, "grow");
    });
    // A merge that is done has written a file: every list of checkpoints gets it.
    api.addEventListener("executed", ({ detail }) => {
      if (merging(detail?.node)) app.refreshComboInNodes?.();
    });
  },

  nodeCreated(node) {
    if (![LOADER, MIX, VECTOR, MERGE].includes(node.comfyClass)) return;
    if (node.comfyClass === VECTOR) textToCombo(node);
    if ([LOADER, MERGE].includes(node.comfyClass)) addProgress(node);
    for (const widget of node.widgets ?? []) chain(widget, "callback", () => (node.dmmCopied = true));
    if (node.comfyClass === MERGE) return;
    chain(node, "onConnectionsChange", function () {
      this.dmmCopied = true;
      refreshSoon();
    });
    const defaults = Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value]));
    chain(node, "onConfigure", (saved) => {
      takeNamed(node, saved?.widgets_values, defaults);
      refreshSoon();
    });
    for (const name of ["checkpoint", "first"]) {
      const widget = widgetOf(node, name);
      if (widget) chain(widget, "callback", refreshSoon);
    }
    for (let i = 0; i < SLIDERS && node.comfyClass === MIX; i++) {
      const widget = widgetOf(node, `w${i}`);
      if (widget) chain(widget, "callback", () => lightThumbnails(node, weightsOf(node)));
    }
    refreshSoon();
  },

  afterConfigureGraph() {
    for (const graph of graphs()) for (const node of nodesOf(graph)) node.dmmCopied = false; // a load is no rewiring
    paint(); // a colour palette, which is loaded after setup(), knows no colours for our types and takes them away
    refreshSoon();
  },

  // "Refresh node definitions": files may have changed under the same name.
  refreshComboInNodes() {
    answers.clear();
    refreshSoon();
  },
});
