// The view of the parallel layers: columns, rows, and the all-reduce between them, with the bytes of this step.

import { h, replace, s } from "../dom.js";
import { say } from "../i18n.js";

const RANKS = [1, 2, 4, 8],
  OF_QWEN3 = { hidden: 1024, layers: 28 }; // Qwen3-0.6B's
const WIDTH = 720,
  COLORS = ["#56b4e9", "#e69f00", "#00a57a", "#d98bb9", "#f0e442", "#e0703a", "#8fa8e8", "#b5b0a5"];

// Builds the view into `root`; returns the function that shows the state of now.
export function parallelView(root, app) {
  let ranks = 2,
    assumed = { ...OF_QWEN3 };

  function show() {
    const { head, batch } = app.state,
      isKnown = head.hidden_size !== undefined && head.num_layers !== undefined;
    const hidden = isKnown ? head.hidden_size : assumed.hidden,
      layers = isKnown ? head.num_layers : assumed.layers;
    const tokens = batch.reduce((sum, entry) => sum + entry[3], 0);
    const bytes = tokens * hidden * 2,
      total = bytes * 2 * layers;
    const field = (key) =>
      h(
        "label",
        { class: "inline" },
        say(`parallel.${key}`),
        " ",
        h("input", {
          type: "number",
          min: 1,
          value: assumed[key],
          "data-key": key,
          onchange: (event) => {
            assumed = { ...assumed, [key]: Math.max(1, Math.round(Number(event.target.value)) || 1) };
            show();
          },
        }),
      );
    replace(
      root,
      h("h2", {}, say("parallel.title", { ranks })),
      h(
        "p",
        {},
        h(
          "label",
          { class: "inline" },
          say("parallel.ranks"),
          " ",
          h(
            "select",
            {
              "data-key": "ranks",
              onchange: (event) => {
                ranks = Number(event.target.value);
                show();
              },
            },
            RANKS.map((n) => h("option", { value: n, selected: n === ranks }, String(n))),
          ),
        ),
      ),
      h("div", { class: "scroll" }, picture(ranks)),
      h(
        "p",
        { class: "answer" },
        say("parallel.bytes", { tokens, hidden, layers, bytes: sayBytes(bytes), total: sayBytes(total) }),
      ),
      h("p", {}, say("parallel.ring", { ranks, sent: sayBytes((total * 2 * (ranks - 1)) / ranks) })),
      h("p", { class: "quiet" }, say("parallel.ran", { n: head.tensor_parallel_size ?? 1 })),
      !isKnown && h("p", { class: "quiet" }, say("parallel.unknown"), " ", field("hidden"), " ", field("layers")),
    );
  }
  return show;
}

function sayBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit += 1) bytes /= 1024;
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

// Two blocks of the same form below each other: attention and MLP, each with one all-reduce at its end.
function picture(ranks) {
  const parts = [
    half(ranks, 0, "qkv_proj", "parallel.attention", "o_proj"),
    half(ranks, 212, "gate_up_proj", "parallel.mlp", "down_proj"),
  ];
  return s(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} 424`,
      class: "diagram",
      role: "img",
      "aria-label": `${say("parallel.column.how")}; ${say("parallel.row.how")}; ${say("parallel.reduce.how")}`,
    },
    parts,
  );
}

function half(ranks, top, column, between, row) {
  const text = (x, y, words, attributes = {}) => s("text", { x, y: top + y, ...attributes }, words);
  const shares = Array.from({ length: ranks }, (_, rank) => rank);
  const tall = 96 / ranks,
    wide = 120 / ranks;
  const matrix = (x, along) =>
    shares.map((rank) =>
      s("rect", {
        class: "share",
        fill: COLORS[rank],
        ...(along === "x"
          ? { x: x + rank * wide, y: top + 50, width: wide, height: 96 }
          : { x, y: top + 50 + rank * tall, width: 120, height: tall }),
      }),
    );
  const arrow = (x, length) => s("path", { class: "arrow", d: `M${x} ${top + 98} h${length} m-6 -4 l6 4 l-6 4` });
  return [
    s("rect", { x: 8, y: top + 50, width: 36, height: 96, class: "whole" }),
    arrow(50, 26),
    matrix(84, "x"),
    arrow(210, 26),
    shares.map((rank) =>
      s("rect", { class: "share", fill: COLORS[rank], x: 244, y: top + 50 + rank * tall, width: 60, height: tall - 2 }),
    ),
    arrow(310, 26),
    matrix(344, "y"),
    arrow(470, 26),
    shares.map((rank) =>
      s("rect", {
        class: "share partial",
        fill: COLORS[rank],
        x: 504 + (rank * 28) / ranks,
        y: top + 50 + (rank * 28) / ranks,
        width: 36,
        height: 68,
      }),
    ),
    arrow(576, 20),
    s("rect", { class: "reduce", x: 602, y: top + 62, width: 62, height: 72, rx: 10 }),
    text(633, 106, "Σ", { class: "sigma", "text-anchor": "middle" }),
    arrow(668, 12),
    s("rect", { x: 684, y: top + 50, width: 30, height: 96, class: "whole" }),
    text(84, 26, column, { class: "code" }),
    text(84, 42, say("parallel.column")),
    text(344, 26, row, { class: "code" }),
    text(344, 42, say("parallel.row")),
    text(633, 42, say("parallel.reduce"), { "text-anchor": "middle", class: "strong" }),
    text(84, 164, say("parallel.column.how"), { class: "note" }),
    text(344, 164, say("parallel.row.how"), { class: "note" }),
    text(84, 182, say(between), { class: "note" }),
    text(712, 200, say("parallel.reduce.how"), { class: "note", "text-anchor": "end" }),
    top === 0 && text(8, 200, say("parallel.input"), { class: "note" }),
  ];
}
