// Ways through the page's graphs: from a style node to the checkpoint upstream, and from the server's ids to nodes.
import { app } from "../../scripts/app.js";

export const LOADER = "LoadDMM";
export const MERGE = "MergeCheckpoints";

/** Every graph of the page: the root and all subgraphs. */
export function graphs() {
  const root = app.graph?.rootGraph ?? app.rootGraph ?? app.graph;
  return root ? [root, ...(root.subgraphs?.values?.() ?? [])] : [];
}

export const nodesOf = (graph) => graph.nodes ?? graph._nodes ?? [];
const linkOf = (graph, id) => (id == null ? null : (graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id]));
export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
export const inputOf = (node, name) => node.inputs?.find((input) => input.name === name);

/** The node that feeds `input`, through reroutes and in and out of subgraphs; null where nothing does. */
function source(graph, input, depth = 0) {
  const link = linkOf(graph, input?.link);
  if (!link || depth > 64) return null;
  const node = graph.getNodeById(link.origin_id);
  if (link.origin_id === graph.inputNode?.id) {
    for (const outer of graphs()) {
      const shell = nodesOf(outer).find((candidate) => candidate.subgraph === graph);
      if (shell) return source(outer, shell.inputs?.[link.origin_slot], depth + 1);
    }
    return null;
  }
  if (node?.subgraph) {
    const inner = node.subgraph.outputs?.[link.origin_slot];
    return source(node.subgraph, { link: inner?.linkIds?.[0] }, depth + 1);
  }
  if (!node || node.comfyClass === LOADER) return node ?? null;
  // A reroute, whoever made it, has one input; what has none is where the wire begins.
  return node.inputs?.length === 1 ? source(graph, node.inputs[0], depth + 1) : node;
}

/** The file that Merge Checkpoints writes for a name, as dmm_core/outputs.py makes it, or null where it writes none. */
function fileOf(name) {
  const stem = String(name ?? "").trim().replaceAll("\\", "/").replace(/\.safetensors$/, "");
  return stem ? `${stem}.safetensors` : null;
}

/** The checkpoint that `node` loads, or whose codebook reaches it; null where there is none. */
export function checkpointOf(node) {
  const loader = node.comfyClass === LOADER ? node : source(node.graph, inputOf(node, "codebook"));
  if (loader?.comfyClass !== LOADER) return null;
  const wired = source(loader.graph, inputOf(loader, "checkpoint"));
  if (wired?.comfyClass === MERGE) return fileOf(widgetOf(wired, "name")?.value);
  const widget = wired ? wired.widgets?.[0] : widgetOf(loader, "checkpoint");
  return typeof widget?.value === "string" ? widget.value : null;
}

/** The Merge Checkpoints node that the server calls `id` ("3", inside subgraphs "7:3"), or undefined. */
export function merging(id) {
  const own = String(id ?? "").split(":").pop();
  return graphs()
    .flatMap(nodesOf)
    .find((node) => node.comfyClass === MERGE && String(node.id) === own);
}
