// Pictures of the styles, drawn by their teachers, under the widgets of Style Mix and Style.
//
// The strip is a widget that is saved nowhere: it comes after all others and `serialize` is off, so that the values of a
// saved workflow stay where they are.
const NAME = "dmm_thumbnails";
const COLUMNS = 4;
const PICTURE = 54; // pixels of a side
const CAPTION = 15;
const GAP = 4;
export const MARGIN = 4; // around an element, which the classic canvas takes from the widget's height
const ROWS = 3; // beyond that the strip scrolls
const PLAIN_OPACITY = 0.45; // of a style that has no weight

const css = (element, rules) => Object.assign(element.style, rules);
const height = (count) => Math.min(Math.ceil(count / COLUMNS), ROWS) * (PICTURE + CAPTION + GAP) + GAP;

function make(tag, rules, more = {}) {
  const element = Object.assign(document.createElement(tag), more);
  css(element, rules);
  return element;
}

function cellOf(style, pick) {
  const cell = make("div", { minWidth: "0", textAlign: "center", cursor: pick ? "pointer" : "default" }, { title: style.name });
  const frame = { boxSizing: "border-box", height: `${PICTURE}px`, width: `${PICTURE}px`, maxWidth: "100%",
    borderRadius: "6px", border: "2px solid transparent", objectFit: "cover", display: "block", margin: "0 auto" };
  // A style without a picture keeps its place, so that the others stay in the order of the sliders.
  const picture = style.thumbnail
    ? make("img", frame, { src: style.thumbnail, alt: style.name, draggable: false })
    : make("div", { ...frame, background: "rgba(128, 128, 128, 0.25)" });
  const caption = make("div", { fontSize: "10px", lineHeight: `${CAPTION}px`, overflow: "hidden", textOverflow: "ellipsis",
    whiteSpace: "nowrap", color: "var(--input-text, #ddd)" }, { textContent: style.name });
  cell.append(picture, caption);
  if (pick) cell.addEventListener("click", () => pick(style.name));
  return cell;
}

/** Light up what has a weight. */
function light(strip, weights) {
  [...strip.element.children].forEach((cell, i) => {
    const weight = Math.min(Math.abs(weights[i] ?? 0), 1);
    cell.style.opacity = PLAIN_OPACITY + (1 - PLAIN_OPACITY) * weight;
    cell.firstChild.style.borderColor = weight ? `rgba(217, 119, 176, ${0.3 + 0.7 * weight})` : "transparent";
  });
}

/** Once made, a strip stays with its node: Nodes 2.0 would go on drawing one that was taken away, and not draw a new one. */
export function hide(widget, hidden) {
  widget.hidden = hidden; // as in dmm.js: one for each canvas
  widget.options.hidden = hidden;
  if (hidden) widget.computeSize = () => [0, -4];
  else delete widget.computeSize;
}

function add(node) {
  const element = make("div", { display: "grid", gap: `${GAP}px`, padding: "2px 0", overflow: "hidden auto", boxSizing: "border-box" });
  const strip = { element, key: null, count: 0 };
  const size = () => (strip.count ? height(strip.count) + 2 * MARGIN : 0);
  strip.widget = node.addDOMWidget(NAME, "dmm_thumbnails", element, {
    serialize: false, hideOnZoom: true, margin: MARGIN, getValue: () => undefined, setValue: () => {}, getMinHeight: size,
    getMaxHeight: size,
  });
  strip.widget.serialize = false; // `options.serialize` is about the prompt, this one about the saved workflow
  strip.widget.label = " ";
  node.dmmStrip = strip;
}

/**
 * Show `styles` ({name, thumbnail}) with their `weights` under the widgets of `node`, or nothing where no style has a
 * picture. `pick` is called with a style's name when its picture is clicked. Says whether the node's height changed.
 */
export function showThumbnails(node, styles, weights, pick = null) {
  const wanted = styles.some((style) => style.thumbnail) ? styles : [];
  const before = node.dmmStrip?.count ?? 0;
  if (!wanted.length && !before) return false;
  if (!node.dmmStrip) add(node);
  hide(node.dmmStrip.widget, !wanted.length);
  const strip = node.dmmStrip;
  const key = JSON.stringify(wanted);
  if (strip.key !== key) {
    Object.assign(strip, { key, count: wanted.length });
    strip.element.style.gridTemplateColumns = `repeat(${Math.min(wanted.length, COLUMNS) || 1}, minmax(0, 1fr))`;
    strip.element.style.minHeight = wanted.length ? `${height(wanted.length)}px` : "0";
    strip.element.replaceChildren(...wanted.map((style) => cellOf(style, pick)));
  }
  light(strip, weights);
  return height(before) !== height(wanted.length);
}

/** The weights alone have changed. */
export function lightThumbnails(node, weights) {
  if (node.dmmStrip) light(node.dmmStrip, weights);
}
