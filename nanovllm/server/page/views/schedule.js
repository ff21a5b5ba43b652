// The queues and this step's batch: who runs, who waits, and what fills the token budget.

import { chip } from "../colors.js";
import { h } from "../dom.js";
import { say } from "../i18n.js";

const MOST_CHIPS = 48;

// Running and waiting requests in their order. `app.select(name)` is called with the one that is chosen.
export function queues(app) {
  const { running, waiting, stats } = app.state; // a trace lists only the first of a long queue
  return h(
    "div",
    { class: "queues" },
    queue(app, "running", running, stats.num_running ?? running.length),
    queue(app, "waiting", waiting, stats.num_waiting ?? waiting.length),
  );
}

function queue(app, key, names, count) {
  const chips = names.slice(0, MOST_CHIPS).map((name) =>
    chip(name, {
      "data-key": `${key}-${name}`,
      "aria-pressed": String(app.request === name),
      onclick: () => app.select(name),
    }),
  );
  if (count > chips.length) chips.push(h("span", { class: "quiet" }, `+${count - chips.length}`));
  return h(
    "section",
    { class: "queue", title: say(`queue.${key}.how`) },
    h("h3", {}, say(`queue.${key}`), h("span", { class: "count" }, String(count))),
    h("div", { class: "chips" }, chips.length ? chips : h("span", { class: "quiet" }, say("queue.empty"))),
    h("p", { class: "quiet small" }, say(`queue.${key}.how`)),
  );
}

// The batch as a bar as long as the token budget. Decodes are narrow and come first; the rest of the budget is empty.
export function batchBar(app) {
  const { batch, head } = app.state,
    budget = head.max_num_batched_tokens;
  const used = batch.reduce((sum, entry) => sum + entry[3], 0);
  const parts = batch.map(([name, kind, first, count]) =>
    chip(name, { class: `part ${kind}`, title: sayEntry([name, kind, first, count]) }),
  );
  // A decode is one token of hundreds: it gets the width of its letter, and the rest is to scale.
  batch.forEach(([, kind, , count], i) => {
    parts[i].style.flex = kind === "decode" ? "0 1 20px" : `${count} 1 20px`;
    if (kind === "prefill") parts[i].textContent += ` ${count}`;
  });
  const rest = h("span", {
    class: "rest",
    style: { flex: `${Math.max(0, budget - used)} 1 0` },
    title: `${say("batch.left")}: ${budget - used}`,
  });
  return h(
    "section",
    { class: "batch" },
    h("h3", {}, say("batch.title", { n: used, budget })),
    h(
      "div",
      { class: "bar", role: "img", "aria-label": batch.map(sayEntry).join("; ") || say("batch.empty") },
      parts,
      rest,
    ),
    h(
      "div",
      { class: "legend small" },
      h("span", {}, h("i", { class: "key decode" }), say("batch.decode")),
      h("span", {}, h("i", { class: "key prefill" }), say("batch.prefill")),
      h("span", {}, h("i", { class: "key rest" }), `${say("batch.left")}: ${budget - used}`),
    ),
  );
}

function sayEntry([name, kind, first, count]) {
  return say(count === 1 ? "batch.one" : "batch.entry", {
    name,
    kind: say(`batch.${kind}`),
    from: first,
    to: first + count - 1,
  });
}
