// The view of the paged cache: every block as a cell, and a request's block table.

import { cellAt, drawCells } from "../cells.js";
import { chip } from "../colors.js";
import { h, replace } from "../dom.js";
import { say } from "../i18n.js";
import { blockTables, countBlocks } from "../pool.js";
import { batchBar, queues } from "./schedule.js";

const MOST_IN_TABLE = 96;

// Builds the view into `root`; returns the function that shows the state of now.
export function blocksView(root, app) {
  let layout = null,
    hovered = -1,
    cursor = -1;
  const canvas = h("canvas", { tabindex: 0, role: "img", id: "cells", "aria-describedby": "block" });
  const [title, how, legendPlace, table, below] = ["h2", "p", "div", "section", "div"].map((tag) => h(tag));
  const block = h("p", { id: "block", class: "inspector", "aria-live": "polite" });
  legendPlace.className = "legend small";
  how.className = "quiet";
  table.className = "block-table";
  root.append(title, how, h("div", { class: "canvas" }, canvas), legendPlace, block, table, below);

  const look = (to) => {
    if (to === hovered) return;
    hovered = to;
    show();
  };
  const at = (event) => cellAt(layout, app.state.blocks.length, event.offsetX, event.offsetY);
  canvas.addEventListener("pointermove", (event) => layout && look(at(event)));
  canvas.addEventListener("pointerleave", () => look(-1));
  canvas.addEventListener("click", (event) => layout && choose(at(event)));
  canvas.addEventListener("blur", () => {
    cursor = -1;
    show();
  });
  canvas.addEventListener("keydown", (event) => {
    if (!layout || event.altKey || event.ctrlKey || event.metaKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -layout.columns, ArrowDown: layout.columns }[event.key];
    if (event.key === "Enter") choose(cursor);
    else if (by === undefined) return;
    else cursor = Math.max(0, Math.min(app.state.blocks.length - 1, cursor < 0 ? 0 : cursor + by));
    event.preventDefault();
    event.stopPropagation(); // the arrows would step the timeline
    show();
  });

  function choose(number) {
    const owners = app.state.blocks[number]?.owners ?? [];
    if (owners.length) app.select(owners[(owners.indexOf(app.request) + 1) % owners.length]);
  }

  function show() {
    const { state } = app;
    title.textContent = say("blocks.title", { n: state.head.num_blocks, size: state.head.block_size });
    how.textContent = say("blocks.how", { size: state.head.block_size });
    const pointed = hovered >= 0 ? hovered : cursor;
    const owners = state.blocks[pointed]?.owners ?? [];
    const focus = app.hovered ?? (owners.includes(app.request) ? app.request : owners[0]) ?? app.request;
    const standsOut = state.tables.has(focus) ? focus : null; // of one that holds no block nothing would be left
    layout = drawCells(canvas, state, { focus: standsOut, cursor: pointed });
    canvas.setAttribute("aria-label", describe(state));
    block.textContent = pointed >= 0 ? sayBlock(state, pointed) : say("block.none");
    replace(
      legendPlace,
      ["used", "shared", "cached", "free", "changed", "evicted"].map((key) =>
        h("span", {}, h("i", { class: `key cell-${key}` }), say(`legend.${key}`)),
      ),
    );
    const shown = focus ?? state.running.find((name) => state.batch.some((entry) => entry[0] === name));
    replace(table, showTable(app, shown));
    replace(below, batchBar(app), queues(app));
  }
  return show;
}

function describe(state) {
  const holders = new Map();
  for (const block of state.blocks) for (const name of block.owners) holders.set(name, (holders.get(name) ?? 0) + 1);
  const owners = [...holders].map(([name, n]) => say("blocks.owner", { name, n })).join(" ");
  return say("blocks.aria", { n: state.blocks.length, ...countBlocks(state), owners });
}

function sayBlock(state, number) {
  const { state: kind, owners, first, group, digest } = state.blocks[number],
    { windows, block_size: size } = state.head;
  const said = say(`block.${kind}`, {
    b: number,
    owners: owners.join(", "),
    from: first,
    to: first + size - 1,
    digest: digest && say("block.digest", { digest }),
  });
  return kind === "used" && windows?.length > 1 ? `${said} ${sayGroup(windows, group)}.` : said;
}

// Logical blocks in order, each above the physical block that it is mapped to; a row for each group of layers.
export function showTable(app, name) {
  if (!name) return h("p", { class: "quiet" }, say("table.nobody"));
  const tables = blockTables(app.state, name),
    windows = app.state.head.windows ?? [null];
  if (!tables.some((table) => table.length)) return [h("h3", {}, chip(name), " ", say("table.none", { name }))];
  return [
    h("h3", {}, chip(name), " ", say("table.title", { name })),
    tables.map((table, group) => [
      tables.length > 1 && h("h4", { class: "small" }, sayGroup(windows, group)),
      showRow(app, name, table),
    ]),
    h("p", { class: "quiet small" }, say("table.how")),
    tables.length > 1 && h("p", { class: "quiet small" }, say("table.groups")),
  ];
}

// Which layers a table serves, where they have several.
export function sayGroup(windows, group) {
  const n = group + 1;
  return windows[group] ? say("table.group.window", { n, window: windows[group] }) : say("table.group.full", { n });
}

function showRow(app, name, table) {
  const cells = table.slice(0, MOST_IN_TABLE).map(([logical, physical]) => {
    const others = app.state.blocks[physical].owners.filter((owner) => owner !== name);
    return h(
      "li",
      {
        class: others.length ? "is-shared" : "",
        title: others.length ? say("table.shared", { owners: others.join(", ") }) : null,
      },
      h("span", { class: "logical" }, String(logical)),
      h("span", { class: "physical" }, String(physical)),
    );
  });
  return h(
    "div",
    { class: "table-row" },
    h(
      "div",
      { class: "table-names quiet small" },
      h("span", {}, say("table.logical")),
      h("span", {}, say("table.physical")),
    ),
    h(
      "ol",
      {},
      cells,
      table.length > MOST_IN_TABLE &&
        h("li", { class: "quiet" }, say("table.more", { n: table.length - MOST_IN_TABLE })),
    ),
  );
}
