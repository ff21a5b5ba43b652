// The view of the scheduler: the batch against its budget, the queues, and a line for each sequence of the step.

import { chip } from "../colors.js";
import { h, replace } from "../dom.js";
import { say } from "../i18n.js";
import { batchBar, queues } from "./schedule.js";

const MOST_LINES = 64;

// Builds the view into `root`; returns the function that shows the state of now.
export function schedulerView(root, app) {
  return () =>
    replace(
      root,
      h("h2", {}, say("view.scheduler")),
      h("p", { class: "quiet" }, say("batch.how")),
      batchBar(app),
      queues(app),
      entries(app),
    );
}

function entries(app) {
  const { batch, requests } = app.state;
  if (!batch.length) return h("p", { class: "quiet" }, say("batch.empty"));
  const columns = ["request", "kind", "positions", "tokens", "progress"];
  const lines = batch.slice(0, MOST_LINES).map(([name, kind, first, count]) => {
    const { promptTokens, output, maxTokens } = requests.get(name);
    const total = promptTokens + (kind === "decode" ? Math.max(maxTokens, output) : output);
    const done = Math.min(total, first + count);
    return h(
      "tr",
      {},
      h("td", {}, chip(name, { "data-key": `entry-${name}`, onclick: () => app.select(name) })),
      h("td", {}, h("i", { class: `key ${kind}` }), say(`batch.${kind}`)),
      h("td", { class: "number" }, count > 1 ? `${first} – ${first + count - 1}` : String(first)),
      h("td", { class: "number" }, String(count)),
      h(
        "td",
        {},
        total ? h("progress", { max: total, value: done, "aria-label": `${done} / ${total}` }) : "",
        h("span", { class: "quiet small" }, total ? ` ${done} / ${total}` : ""),
      ),
    );
  });
  return h(
    "section",
    { class: "scroll" },
    h("h3", {}, say("scheduler.entries")),
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map((key) => h("th", { scope: "col" }, say(`scheduler.${key}`))),
        ),
      ),
      h("tbody", {}, lines),
    ),
  );
}
