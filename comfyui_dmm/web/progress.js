// What a merge says while it runs, under the widgets of Merge Checkpoints, and what a file asks for, under Load DMM's.
//
// ComfyUI's own text for this is a widget of the classic canvas; Nodes 2.0 of frontend 1.32.9 has no component for it and
// draws an empty row. A widget with an element is drawn by both. It is saved nowhere, and comes after all others.
import { MARGIN, hide } from "./thumbnails.js";

const NAME = "dmm_progress";
const LINE = 16; // pixels
const LETTERS = 44; // about as many fit in a line
const LINES = 8; // beyond that it scrolls

const lines = (text) => text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / LETTERS)), 0);
const height = (text) => (text ? Math.min(Math.max(lines(text), 2), LINES) * LINE + 8 : 0);

/** Made with the node, hidden until there is a text: Nodes 2.0 draws the widgets that it finds at first. */
export function addProgress(node) {
  const element = document.createElement("div");
  Object.assign(element.style, { boxSizing: "border-box", padding: "4px 8px", overflow: "hidden auto", whiteSpace: "pre-wrap",
    fontSize: "12px", lineHeight: `${LINE}px`, color: "var(--input-text, #ddd)", userSelect: "text" });
  element.className = "dmm-progress";
  element.setAttribute("role", "status");
  const shown = { element, text: "" };
  const size = () => (shown.text ? height(shown.text) + 2 * MARGIN : 0);
  shown.widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, hideOnZoom: true, margin: MARGIN, getValue: () => undefined, setValue: () => {}, getMinHeight: size,
    getMaxHeight: size,
  });
  shown.widget.serialize = false; // `options.serialize` is about the prompt, this one about the saved workflow
  shown.widget.label = " ";
  hide(shown.widget, true);
  node.dmmProgress = shown;
}

/** Show a text. Says whether the node's height changed. */
export function showProgress(node, text) {
  const shown = node.dmmProgress;
  const before = height(shown.text);
  shown.text = text;
  shown.element.textContent = text;
  shown.element.style.minHeight = `${height(text)}px`;
  hide(shown.widget, !text);
  return before !== height(text);
}
