// Draws the steps so far as bars of tokens, prompts above decodes, with the cache's usage and what happened.

import { prepareCanvas, themeColor } from "./dom.js";

const HEIGHT = 54,
  MARKS = 9;
const NARROWEST = 2,
  WIDEST = 14; // pixels a bar

// Several steps share a bar when they are more than there is room for; a bar shows the largest of its steps. Returns the
// width of all bars.
export function drawTimeline(canvas, history, position) {
  const width = canvas.parentElement.clientWidth;
  const context = prepareCanvas(canvas, width, HEIGHT);
  const { frames } = history;
  if (!frames.length) return width;
  const most = Math.max(1, ...frames.map(({ summary }) => summary.decode + summary.prefill));
  const perBar = Math.max(1, Math.ceil((frames.length * NARROWEST) / width));
  const bars = Math.ceil(frames.length / perBar),
    bar = Math.min(WIDEST, width / bars);
  const colors = {
    decode: themeColor("--decode"),
    prefill: themeColor("--prefill"),
    usage: themeColor("--ink"),
    alert: themeColor("--alert"),
    good: themeColor("--good"),
    accent: themeColor("--accent"),
  };
  // A decode is one token beside prompts of thousands, so heights are by the root of the share of the largest step.
  const scale = (tokens) => Math.sqrt(tokens / most) * (HEIGHT - MARKS);
  context.globalAlpha = 1;
  for (let i = 0; i < bars; i += 1) {
    const some = frames.slice(i * perBar, (i + 1) * perBar).map((frame) => frame.summary);
    const decode = Math.max(...some.map((step) => step.decode));
    const total = Math.max(...some.map((step) => step.decode + step.prefill));
    const x = i * bar,
      gap = bar > 3 ? 1 : 0;
    context.fillStyle = colors.prefill;
    context.fillRect(x, HEIGHT - scale(total), bar - gap, scale(total));
    context.fillStyle = colors.decode;
    context.fillRect(x, HEIGHT - scale(decode), bar - gap, scale(decode));
    if (some.some((step) => step.hit)) mark(context, x + bar / 2, 3, colors.good, "hit");
    if (some.some((step) => step.preempt)) mark(context, x + bar / 2, 4, colors.alert, "preempt");
  }
  context.strokeStyle = colors.usage;
  context.globalAlpha = 0.6;
  context.lineWidth = 1.2;
  context.beginPath();
  for (let i = 0; i < bars; i += 1) {
    const { usage } = frames[Math.min(frames.length - 1, i * perBar)].summary;
    context.lineTo(i * bar + bar / 2, HEIGHT - 1 - usage * (HEIGHT - MARKS));
  }
  context.stroke();
  context.globalAlpha = 1;
  context.fillStyle = colors.accent;
  context.fillRect(Math.min(width - 2, Math.floor(position / perBar) * bar + bar / 2 - 1), 0, 2, HEIGHT);
  return bars * bar;
}

function mark(context, x, y, color, what) {
  context.fillStyle = color;
  context.beginPath();
  if (what === "hit") context.arc(x, y, 2.5, 0, 7);
  else {
    context.moveTo(x - 4, y - 4);
    context.lineTo(x + 4, y - 4);
    context.lineTo(x, y + 3);
  }
  context.fill();
}

// The frame under a point of the timeline.
export function frameAt(canvas, history, x) {
  const width = canvas.clientWidth,
    { frames } = history;
  const perBar = Math.max(1, Math.ceil((frames.length * NARROWEST) / width));
  const bar = Math.min(WIDEST, width / Math.ceil(frames.length / perBar));
  return Math.min(frames.length - 1, Math.max(0, Math.floor(x / bar) * perBar));
}
