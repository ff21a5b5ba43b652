// The events as lines, newest first; each names the function that did it and opens its source text.

import { chip } from "./colors.js";
import { h, replace } from "./dom.js";
import { eventsUntil } from "./history.js";
import { languageNow, say, sayEvent } from "./i18n.js";

const MOST = 60;
const KEYWORDS =
  "and|as|async|await|break|class|continue|def|elif|else|except|False|finally|for|from|if|import|in|is|" +
  "lambda|None|not|or|pass|raise|return|True|try|while|with|yield";
const TOKEN = new RegExp(`("""[\\s\\S]*?"""|"[^"\\n]*"|'[^'\\n]*')|(#.*)|\\b(${KEYWORDS})\\b`, "g");

// Shows the events up to the player's position in `list`.
export function showEvents(list, app) {
  const found = eventsUntil(app.history, app.player.position, MOST);
  const newest = found[0]?.n;
  const shown = [languageNow(), app.history.head?.started, found.length, newest, newest === app.state.n].join();
  if (list.shown === shown && list.history === app.history) return; // as in most steps
  Object.assign(list, { shown, history: app.history });
  const lines = found.map(({ n, event }, i) =>
    h(
      "li",
      { class: `event ${event.what} ${n === app.state.n ? "now" : ""}` },
      h(
        "span",
        { class: "event-head" },
        h("span", { class: `badge ${event.what}` }, say(`what.${event.what}`)),
        event.request &&
          chip(event.request, { "data-key": `event-chip-${n}-${i}`, onclick: () => app.select(event.request) }),
        h("span", { class: "quiet small" }, `${say("stat.step")} ${n}`),
      ),
      h("span", {}, sayEvent(event.text)),
      event.by &&
        h(
          "button",
          {
            type: "button",
            class: "by",
            "data-key": `by-${n}-${i}`,
            onclick: () => openSource(app.state.head, event.by),
          },
          sayFunction(app.state.head, event.by),
        ),
    ),
  );
  replace(list, lines.length ? lines : h("li", { class: "quiet" }, say("events.none")));
}

function sayFunction(head, name) {
  const file = head.functions?.[name]?.file.split("/").pop();
  return `${file ? `${file}: ` : ""}${name.split(".").pop()}`;
}

// Opens the dialog with a function's source text, as the engine that made the trace had it.
export function openSource(head, name) {
  const dialog = document.getElementById("source"),
    found = head.functions?.[name];
  replace(
    dialog,
    h(
      "header",
      {},
      h("h2", {}, say("source.open", { name })),
      h("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, say("close")),
    ),
    found
      ? [
          h("p", { class: "quiet" }, say("source.where", found)),
          h("pre", { tabindex: 0 }, h("code", {}, colored(found.source))),
        ]
      : h("p", {}, say("source.missing")),
  );
  dialog.showModal();
}

function colored(source) {
  const parts = [];
  let end = 0;
  for (const match of source.matchAll(TOKEN)) {
    const kind = match[1] ? "string" : match[2] ? "comment" : "keyword";
    parts.push(source.slice(end, match.index), h("span", { class: kind }, match[0]));
    end = match.index + match[0].length;
  }
  return [...parts, source.slice(end)];
}
