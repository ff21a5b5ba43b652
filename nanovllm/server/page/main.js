// Puts the page together: where the steps come from, and when the page is drawn again.

import { address, readAddress, rememberAddress, setTheme } from "./address.js";
import { chatPanel } from "./chat.js";
import { controlBar, onKey, VIEWS } from "./controls.js";
import { showEvents } from "./events.js";
import { h, replace } from "./dom.js";
import { call, createServer, openFeed } from "./feed.js";
import { add, createHistory, stateAt } from "./history.js";
import { languageNow, say, setLanguage } from "./i18n.js";
import { showFigures, showRequests } from "./panels.js";
import { createPlayer, pause, readTrace, seek } from "./replay.js";
import { emptyState } from "./state.js";
import { attentionView } from "./views/attention.js";
import { blocksView } from "./views/blocks.js";
import { parallelView } from "./views/parallel.js";
import { schedulerView } from "./views/scheduler.js";

const DRAWING_SHARE = 0.25; // of a core, at most: the engine may run on this machine too
const BUILDERS = { blocks: blocksView, scheduler: schedulerView, attention: attentionView, parallel: parallelView };
const place = (id) => document.getElementById(id);

// mode: "live", "replay" or "none"; engine: what /page/state says; request: the chosen one; hovered: the pointed one; scene: played last.
const app = {
  mode: "none",
  engine: { teach: false, paused: false, delay_ms: 0 },
  feed: "closed",
  model: "",
  server: createServer(),
  history: createHistory(),
  player: null,
  state: emptyState(),
  view: VIEWS[0],
  theme: "",
  request: null,
  hovered: null,
  scene: null,
  render,
  notice,
  go,
  openFile,
  followNewest,
  select,
  hover,
  knownRequests,
  findRequest,
};
const shows = {};
let closeFeed = () => {},
  restUntil = 0,
  waiting = 0;

// Draws the page soon, once for all that has changed until then; never while nobody looks.
function render() {
  if (waiting || document.hidden) return;
  waiting = setTimeout(() => requestAnimationFrame(drawAndRest), Math.max(0, restUntil - performance.now()));
}

function drawAndRest(begun) {
  const rest = () => {
    const now = performance.now();
    restUntil = now + (now - begun) * (1 / DRAWING_SHARE - 1);
  };
  waiting = 0;
  draw();
  rest();
  setTimeout(rest); // after this the browser lays out and paints: what that takes counts too
}

function draw() {
  app.state = stateAt(app.history, app.player.position);
  const isEmpty = app.player.position < 0 || !app.state.head;
  document.documentElement.lang = languageNow() === "zh" ? "zh-Hans" : "en";
  document.title = say("title");
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", say(element.dataset.label));
  }
  replace(
    place("views"),
    VIEWS.map((view, i) =>
      h(
        "a",
        {
          href: address(app, { view }),
          "data-key": view,
          title: String(i + 1),
          "aria-current": view === app.view && "page",
        },
        say(`view.${view}`),
      ),
    ),
  );
  place("model").textContent = app.history.head?.model?.split("/").pop() ?? app.model;
  showSource();
  place("empty").hidden = !isEmpty;
  place("empty").textContent = say(app.mode === "none" ? "no_engine" : "waiting_for_steps");
  showHint();
  const { skipped, head } = app.state;
  place("gap").textContent = [
    skipped && say("gap", { n: skipped }),
    head?.engines > 1 && say("engines", { n: head.engines }),
  ]
    .filter(Boolean)
    .join(" ");
  for (const view of VIEWS) place(`view-${view}`).hidden = isEmpty || view !== app.view;
  if (!isEmpty) {
    shows[app.view] ??= BUILDERS[app.view](place(`view-${app.view}`), app);
    shows[app.view]();
  }
  showFigures(place("figures"), app.state);
  showRequests(place("requests"), app);
  showEvents(place("events"), app);
  place("chat").hidden = app.mode !== "live";
  shows.chat();
  shows.controls();
  rememberAddress(app);
}

// What to do or to look at, for whoever sees the page for the first time.
function showHint() {
  const { mode, engine, player, scene, state } = app;
  let key = "";
  if (mode === "replay") key = player.position <= 0 ? "replay" : "";
  else if (mode === "live" && !engine.teach) key = "live";
  else if (mode === "live") key = scene ?? (state.requests.size ? "" : "teach");
  place("hint").hidden = !key;
  place("hint").textContent = key && say(`hint.${key}`);
}

function showSource() {
  const isBehind = app.mode === "live" && !app.player.follow;
  const key =
    app.mode !== "live"
      ? app.mode === "replay"
        ? "recorded"
        : "none"
      : app.feed === "lost"
        ? "lost"
        : isBehind
          ? "hold"
          : app.engine.paused
            ? "paused"
            : "live";
  place("from").textContent = say(`source.${key}`);
  place("from").className = `pill ${key}`;
}

function notice(text) {
  place("notice").textContent = text;
  place("notice").hidden = !text;
}

function go(change) {
  if (change.lang) setLanguage(change.lang);
  if (change.theme) setTheme(app, change.theme);
  if (change.view) app.view = change.view;
  render();
}

function select(name) {
  app.request = app.request === name ? null : name;
  render();
}

function hover(name) {
  app.hovered = name;
  render();
}

function knownRequests() {
  return new Set(app.history.latest.requests.keys());
}

// The name of the request that came after those in `known` with this prompt, or null.
function findRequest({ prompt, known }) {
  const fresh = [...app.history.latest.requests.values()].filter(({ name }) => !known.has(name));
  const found = fresh.find((request) => request.prompt.includes(prompt.slice(0, 40)));
  return (found ?? (fresh.length === 1 ? fresh[0] : null))?.name ?? null;
}

function followNewest() {
  app.player.follow = app.mode === "live";
  app.player.position = app.history.frames.length - 1;
  render();
}

function take(object) {
  if (object.kind === "lost") {
    app.feed = "lost";
    notice(say("lost"));
    render();
    return;
  }
  if (object.kind === "head") {
    app.feed = "open";
    const before = app.history.head;
    notice(before && object.restarts > before.restarts ? say("restarted") : "");
    app.request = null;
  }
  const forgotten = add(app.history, object),
    { player } = app;
  if (object.kind === "head") Object.assign(player, { position: -1, follow: true });
  else player.position = player.follow ? app.history.frames.length - 1 : Math.max(0, player.position - forgotten);
  render();
}

function openTrace(text) {
  try {
    const history = readTrace(text);
    closeFeed();
    app.history = history;
    app.mode = "replay";
    app.request = null;
    app.player.playing = false;
    clearTimeout(app.player.timer);
    app.player = createPlayer(history, render);
    notice("");
    seek(app.player, 0);
  } catch (error) {
    notice(say("bad_trace", { error: error.message }));
  }
  render();
}

async function openFile(file) {
  openTrace(await file.text());
}

// Asks whether there is an engine that may be watched, and watches it.
async function findEngine() {
  if (location.protocol === "file:") return;
  try {
    app.engine = await (await call(app.server, "page/state")).json();
  } catch (error) {
    if (error.status === 401) place("key").showModal();
    else if (error.status !== 404) notice(say("refused", { error: error.message }));
    return;
  }
  app.mode = "live";
  app.model = app.engine.model;
  closeFeed();
  closeFeed = openFeed(app.server, take, (feed, error) => {
    app.feed = feed;
    notice(error ? say("refused", { error: error.message }) : "");
    render();
  });
  render();
}

function start() {
  app.player = createPlayer(app.history, render);
  shows.chat = chatPanel(place("chat-body"), app);
  shows.controls = controlBar(place("controls"), app);
  const trace = place("trace");
  if (trace) openTrace(JSON.parse(trace.textContent));
  readAddress(app);
  if (!trace) findEngine();
  addEventListener("hashchange", () => readAddress(app));
  addEventListener("resize", render);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && app.player.playing) pause(app.player);
    render();
  });
  document.addEventListener("keydown", (event) => onKey(app, event));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
  });
  place("language").addEventListener("click", () => go({ lang: languageNow() === "en" ? "zh" : "en" }));
  place("theme").addEventListener("click", () => {
    const isDark = app.theme ? app.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    go({ theme: isDark ? "light" : "dark" });
  });
  place("key-form").addEventListener("submit", () => {
    app.server.key = place("key-input").value;
    findEngine();
  });
}

start();
