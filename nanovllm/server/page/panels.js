// The small panels beside the views: the figures of the step, and each request with its text so far.

import { chip } from "./colors.js";
import { h, replace } from "./dom.js";
import { say } from "./i18n.js";

const MOST_REQUESTS = 24,
  TAIL = 160; // requests, characters

export function showFigures(place, { stats, n, ms }) {
  const percent = (share) => `${Math.round(100 * share)} %`;
  const figures = [
    ["step", n],
    ["tok_s", Math.round(stats.tok_s)],
    ["usage", percent(stats.usage), stats.usage],
    ["hit_rate", percent(stats.hit_rate), stats.hit_rate],
    ["preemptions", stats.preemptions],
    ["evictions", stats.evictions],
    ["ms", ms.toFixed(1)],
  ];
  replace(
    place,
    figures.map(([key, value, share]) =>
      h(
        "div",
        { class: "figure" },
        h("dt", {}, say(`stat.${key}`)),
        h("dd", { id: `stat-${key}` }, String(value)),
        share !== undefined &&
          h("span", { class: "meter", "aria-hidden": "true" }, h("span", { style: { width: `${100 * share}%` } })),
      ),
    ),
  );
}

// Running ones first, in order, then waiting ones, then the newest that have ended.
export function showRequests(place, app) {
  const { requests, running, waiting } = app.state;
  const ended = [...requests.values()].filter(({ status }) => status === "finished").reverse();
  const shown = [...running, ...waiting]
    .map((name) => requests.get(name))
    .filter(Boolean)
    .concat(ended);
  if (!shown.length) {
    replace(place, h("li", { class: "quiet" }, say("requests.none")));
    return;
  }
  replace(
    place,
    shown.slice(0, MOST_REQUESTS).map((request) =>
      h(
        "li",
        {
          class: `request ${request.status}`,
          onpointerenter: () => app.hover(request.name),
          onpointerleave: () => app.hover(null),
        },
        h(
          "div",
          {},
          chip(request.name, {
            "data-key": `request-${request.name}`,
            "aria-pressed": String(app.request === request.name),
            onclick: () => app.select(request.name),
            onfocus: () => app.hover(request.name),
            onblur: () => app.hover(null),
          }),
          h("span", { class: "small" }, ` ${say(`status.${request.status}`)}`),
          h(
            "span",
            { class: "quiet small to-end" },
            say("request.tokens", { prompt: request.promptTokens, output: request.output }),
          ),
        ),
        h("p", { class: "prompt quiet" }, request.prompt.replace(/\s+/g, " ").trim()),
        h("p", { class: "text" }, tail(request.text)),
      ),
    ),
  );
}

const tail = (text) => (text.length > TAIL ? `…${text.slice(-TAIL)}` : text.trimStart());
