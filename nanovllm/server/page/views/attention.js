// The view of paged attention: the slots that a step writes, the blocks that it reads, and their cut into splits.

import { chip, fillOf } from "../colors.js";
import { h, replace } from "../dom.js";
import { say } from "../i18n.js";
import { splitContexts } from "../splits.js";
import { blockTables } from "../pool.js";
import { sayGroup } from "./blocks.js";

const MULTIPROCESSORS = [8, 36, 80, 132],
  OF_AN_H100 = 132,
  KV_HEADS = 8;
const MOST_READ = 128,
  MOST_SEQUENCES = 16;

// Builds the view into `root`; returns the function that shows the state of now.
export function attentionView(root, app) {
  let multiprocessors = OF_AN_H100;

  function show() {
    const { state } = app;
    const entry = state.batch.find(([name]) => name === app.request) ?? state.batch[0];
    if (!entry) {
      replace(root, h("h2", {}, say("view.attention")), h("p", { class: "quiet" }, say("attention.none")));
      return;
    }
    const [name] = entry;
    replace(
      root,
      h("h2", {}, say("attention.title", { name, n: state.n })),
      h(
        "div",
        { class: "chips", role: "group", "aria-label": say("attention.choose") },
        state.batch.map(([other]) =>
          chip(other, {
            "data-key": `attention-${other}`,
            "aria-pressed": String(other === name),
            onclick: () => app.select(other),
          }),
        ),
      ),
      written(state, entry),
      read(state, entry),
      splits(state),
    );
  }

  function splits(state) {
    const decodes = state.batch.filter((entry) => entry[1] === "decode").slice(0, MOST_SEQUENCES);
    const heads = state.head.num_kv_heads ?? KV_HEADS;
    const choice = h(
      "select",
      {
        "data-key": "sms",
        onchange: (event) => {
          multiprocessors = Number(event.target.value);
          show();
        },
      },
      MULTIPROCESSORS.map((n) => h("option", { value: n, selected: n === multiprocessors }, String(n))),
    );
    const intro = say(state.head.device === "cpu" ? "attention.split.cpu" : "attention.split.gpu");
    return h(
      "section",
      {},
      h("h3", {}, say("attention.split")),
      h("p", { class: "quiet" }, say("attention.split.how")),
      h(
        "p",
        {},
        intro,
        " ",
        h("label", { class: "inline" }, choice, " ", say("attention.split.sms")),
        h("span", { class: "quiet" }, ` · ${heads} ${say("attention.split.heads")}`),
      ),
      decodes.length ? cut(decodes, heads) : h("p", { class: "quiet" }, say("attention.split.none")),
    );
  }

  function cut(decodes, heads) {
    const lengths = decodes.map(([, , first]) => first + 1),
      longest = Math.max(...lengths);
    const pieces = splitContexts(lengths, heads, multiprocessors).map((piece, order) => ({ ...piece, order }));
    return h(
      "div",
      { class: "splits" },
      decodes.map(([name], seq) =>
        h(
          "div",
          { class: "split-row" },
          chip(name),
          h(
            "div",
            { class: "split-bar" },
            pieces
              .filter((piece) => piece.seq === seq)
              .sort((a, b) => a.begin - b.begin)
              .map(({ begin, end, order }) =>
                h(
                  "span",
                  {
                    title: say("attention.split.piece", { name, from: begin, to: end - 1 }),
                    style: { width: `${(100 * (end - begin)) / longest}%`, "background-color": fillOf(name) },
                  },
                  String(order + 1),
                ),
              ),
          ),
          h("span", { class: "quiet small" }, String(lengths[seq])),
        ),
      ),
    );
  }
  return show;
}

function written(state, [name, , first, count]) {
  const size = state.head.block_size,
    last = first + count - 1;
  const lines = (blockTables(state, name)[0] ?? [])
    .filter(([logical]) => logical * size <= last && (logical + 1) * size > first)
    .map(([logical, b]) => {
      const from = Math.max(first, logical * size) % size,
        to = Math.min(last, (logical + 1) * size - 1) % size;
      return h(
        "li",
        {},
        say(from === to ? "attention.slot" : "attention.slots", { b, from: b * size + from, to: b * size + to }),
      );
    });
  return h(
    "section",
    {},
    h("h3", {}, say("attention.write", { size })),
    h(
      "p",
      { class: "quiet" },
      say(count === 1 ? "attention.write.one" : "attention.write.how", { n: count, from: first, to: last }),
    ),
    h("ul", { class: "slots" }, lines),
  );
}

function read(state, [name, , first, count]) {
  const size = state.head.block_size,
    end = first + count,
    table = (blockTables(state, name)[0] ?? []).filter(([i]) => i * size < end);
  const share = (tokens) => `${(100 * Math.max(0, Math.min(size, tokens))) / size}%`;
  const bars = table.slice(0, MOST_READ).map(([logical, physical]) => {
    const begin = logical * size;
    return h(
      "li",
      {},
      h("span", { class: "logical" }, String(logical)),
      h(
        "span",
        { class: "fill" },
        h("span", { style: { width: share(end - begin), "background-color": fillOf(name) } }),
        h("span", {
          class: "new",
          style: { left: share(first - begin), width: share(Math.min(size, end - begin) - Math.max(0, first - begin)) },
        }),
      ),
      h("span", { class: "physical" }, String(physical)),
    );
  });
  return h(
    "section",
    {},
    h("h3", {}, say("attention.read", { n: end, blocks: table.length })),
    state.head.windows?.length > 1 && h("p", { class: "quiet" }, sayGroup(state.head.windows, 0)),
    h("p", { class: "quiet" }, say("attention.read.how")),
    h(
      "ol",
      { class: "fills" },
      bars,
      table.length > MOST_READ && h("li", { class: "quiet" }, say("table.more", { n: table.length - MOST_READ })),
    ),
  );
}
