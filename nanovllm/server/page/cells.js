// Draws every KV block as a cell on a canvas, and finds the cell under a point. Fast enough for thousands of blocks.
//
// Used: the color of its request; of several, in stripes, one for each owner. Cached but free: a faint trace of its
// last owners. Free: empty. A frame marks the blocks that this step changed. Of very many blocks each is a dot.

import { fillOf, INK, patternOf } from "./colors.js";
import { prepareCanvas, themeColor } from "./dom.js";

const LARGEST = 58,
  SMALLEST = 3,
  WITH_FRAME = 5,
  WITH_LETTER = 15; // pixels
const MOST_HEIGHT = 420;

// Cells of equal size that fill the width: {size, gap, columns, rows, height}.
export function layoutCells(width, count) {
  const fit = Math.floor(Math.sqrt((width * MOST_HEIGHT) / Math.max(1, count)));
  let size = Math.max(SMALLEST, Math.min(LARGEST, fit));
  while (size > SMALLEST && Math.ceil(count / Math.floor(width / size)) * size > MOST_HEIGHT) size -= 1;
  const columns = Math.max(1, Math.min(count, Math.floor(width / size)));
  const rows = Math.ceil(count / columns);
  return { size, gap: size > 20 ? 4 : size > 11 ? 2 : 1, columns, rows, height: rows * size };
}

// The block at a point, or -1.
export function cellAt({ size, columns }, count, x, y) {
  const column = Math.floor(x / size),
    block = Math.floor(y / size) * columns + column;
  return x >= 0 && y >= 0 && column < columns && block < count ? block : -1;
}

// `focus`: a request whose blocks stand out, or null; `cursor`: a block with a ring, or -1.
export function drawCells(canvas, state, { focus = null, cursor = -1 }) {
  const width = canvas.parentElement.clientWidth;
  const layout = layoutCells(width, state.blocks.length);
  const context = prepareCanvas(canvas, width, layout.height);
  const colors = {
    line: themeColor("--line"),
    ink: themeColor("--ink"),
    muted: themeColor("--muted"),
    alert: themeColor("--alert"),
    accent: themeColor("--accent"),
  };
  const changed = new Set(state.changed);
  const evicted = new Set(state.events.filter(({ what }) => what === "evict").map(({ data }) => data.block));
  const side = layout.size - layout.gap;
  context.textAlign = "center";
  context.textBaseline = "middle";
  state.blocks.forEach((block, number) => {
    const x = (number % layout.columns) * layout.size,
      y = Math.floor(number / layout.columns) * layout.size;
    context.globalAlpha = focus && !block.owners.includes(focus) ? 0.25 : 1;
    drawCell(context, block, x, y, side, colors);
    context.globalAlpha = 1;
    const frame = evicted.has(number) ? colors.alert : changed.has(number) && side > 8 ? colors.ink : null;
    if (frame) outline(context, x, y, side, frame, side > 14 ? 2 : 1);
    if (number === cursor) outline(context, x - 1, y - 1, side + 2, colors.accent, 3);
  });
  return layout;
}

function drawCell(context, block, x, y, side, colors) {
  if (side < WITH_FRAME) {
    drawDot(context, block, x, y, side, colors);
    return;
  }
  if (block.state === "free") {
    outline(context, x, y, side, colors.line, 1);
    return;
  }
  const alpha = context.globalAlpha;
  const isCached = block.state === "cached";
  const names = isCached ? block.last : block.owners;
  if (isCached) context.globalAlpha = alpha * 0.24;
  drawStripes(context, names, x, y, side, colors);
  context.globalAlpha = alpha;
  if (isCached) {
    context.setLineDash([2, 2]);
    outline(context, x, y, side, colors.muted, 1);
    context.setLineDash([]);
  }
  if (side < WITH_LETTER || !names.length) return;
  const text = names.length === 1 ? names[0] : `×${names.length}`;
  context.font = `${isCached ? "" : "600 "}${Math.min(16, Math.round(side * 0.42))}px system-ui, sans-serif`;
  if (names.length > 1 && !isCached) {
    context.fillStyle = "rgba(255, 255, 255, 0.82)"; // stripes would hide the number
    context.fillRect(x + side * 0.2, y + side * 0.29, side * 0.6, side * 0.42);
  }
  context.fillStyle = isCached ? colors.muted : INK;
  context.fillText(text, x + side / 2, y + side / 2 + 0.5);
}

function drawDot(context, block, x, y, side, colors) {
  const alpha = context.globalAlpha,
    name = block.owners[0] ?? block.last[0];
  context.globalAlpha = alpha * (block.state === "used" ? 1 : block.state === "cached" ? 0.35 : 0.5);
  context.fillStyle = block.state === "free" ? colors.line : name ? fillOf(name) : colors.muted;
  context.fillRect(x, y, side, side);
  context.globalAlpha = alpha;
}

function drawStripes(context, names, x, y, side, colors) {
  const shown = names.slice(0, Math.max(1, Math.floor(side / 3)));
  if (!shown.length) {
    context.fillStyle = colors.muted;
    context.fillRect(x, y, side, side);
    return;
  }
  const width = side / shown.length;
  shown.forEach((name, index) => {
    context.fillStyle = fillOf(name);
    context.fillRect(x + index * width, y, width + (index < shown.length - 1 ? 0.5 : 0), side);
    if (side > 10 && patternOf(name)) drawPattern(context, patternOf(name), x + index * width, y, width, side);
  });
}

function drawPattern(context, pattern, x, y, width, side) {
  context.fillStyle = "rgba(20, 24, 31, 0.28)";
  if (pattern === 1) for (let at = 2; at < side; at += 5) context.fillRect(x, y + at, width, 1.2);
  else
    for (let at = 3; at < side; at += 6) for (let to = 3; to < width; to += 6) context.fillRect(x + to, y + at, 2, 2);
}

function outline(context, x, y, side, color, width) {
  context.strokeStyle = color;
  context.lineWidth = width;
  context.strokeRect(x + width / 2, y + width / 2, side - width, side - width);
}
