// The bar at the page's foot: timeline, play, pause, step, speed, scenes; and the same by keyboard.

import { h, replace } from "./dom.js";
import { call } from "./feed.js";
import { traceText } from "./history.js";
import { say } from "./i18n.js";
import { pause, play, RATES, seek } from "./replay.js";
import { drawTimeline, frameAt } from "./timeline.js";

const DELAYS_MS = [0, 100, 300, 1000];
const SCENES = ["shared", "fill", "long"];
export const VIEWS = ["blocks", "scheduler", "attention", "parallel"];
const STRIP = ["decode", "prefill", "usage", "hit", "preempt"]; // what the timeline shows
const KEYS = [
  ["space", "␣"],
  ["arrows", "← →"],
  ["end", "Home End"],
  ["views", "1 2 3 4"],
];

// Stops or goes on: the engine where the page may command it, a recorded trace, or else only what the page shows.
export async function toggle(app) {
  const { player } = app;
  if (app.mode === "live" && app.engine.teach) await command(app, { action: app.engine.paused ? "resume" : "pause" });
  else if (app.mode === "live") player.follow ? seek(player, player.position) : app.followNewest();
  else if (player.playing) pause(player);
  else play(player);
}

// One step forward: in what is remembered, and at its end by the engine itself.
export async function stepForward(app) {
  const { player } = app,
    last = app.history.frames.length - 1;
  player.playing && pause(player);
  if (player.position < last) seek(player, player.position + 1);
  else if (app.mode === "live" && app.engine.teach) {
    app.followNewest();
    await command(app, { action: "step" });
  }
}

export function stepBack(app) {
  app.player.playing && pause(app.player);
  seek(app.player, app.player.position - 1);
}

async function command(app, body, path = "page/control") {
  try {
    const answer = await (await call(app.server, path, body)).json();
    if (path === "page/control") app.engine = { ...app.engine, ...answer };
    app.notice("");
  } catch (error) {
    app.notice(say("refused", { error: error.message }));
  }
  app.render();
}

async function playScene(app, scene) {
  app.scene = scene;
  await command(app, { scene }, "page/scene");
}

async function clear(app) {
  app.scene = null;
  await command(app, {}, "page/clear");
}

export function onKey(app, event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (target.closest("input:not([type=range]), textarea, select")) return;
  if (key === " " && target.closest("button, a, summary")) return; // it presses what has the focus
  const act = {
    " ": () => toggle(app),
    ArrowRight: () => stepForward(app),
    ArrowLeft: () => stepBack(app),
    Home: () => seek(app.player, 0),
    End: () => app.followNewest(),
  }[key];
  const view = VIEWS[Number(key) - 1];
  if (!act && !view) return;
  event.preventDefault();
  if (act) act();
  else app.go({ view });
}

// Builds the bar into `root`; returns the function that shows the state of now.
export function controlBar(root, app) {
  const canvas = h("canvas", { class: "strip", "aria-hidden": "true" });
  const slider = h("input", {
    type: "range",
    id: "scrub",
    min: 0,
    value: 0,
    oninput: () => seek(app.player, Number(slider.value)),
  });
  const scrub = (event) => app.history.frames.length && seek(app.player, frameAt(canvas, app.history, event.offsetX));
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    scrub(event);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && scrub(event));
  const buttons = h("div", { class: "buttons" }),
    extras = h("div", { class: "buttons" });
  const file = h("input", {
    type: "file",
    accept: ".jsonl,.json,.txt",
    hidden: true,
    id: "file",
    onchange: () => {
      if (file.files.length) app.openFile(file.files[0]);
      file.value = "";
    },
  });
  const legend = h("div", { class: "strip-legend legend small" });
  root.append(h("div", { class: "strip-place" }, canvas), slider, legend, buttons, extras, file);

  function button(id, label, action, more = {}) {
    return h("button", { type: "button", id, "data-key": id, onclick: action, ...more }, label);
  }

  function choice(id, label, values, now, sayValue, choose) {
    return h(
      "label",
      { class: "inline" },
      h("span", { class: "small quiet" }, say(label)),
      " ",
      h(
        "select",
        { id, "data-key": id, onchange: (event) => choose(Number(event.target.value)) },
        values.map((n) => h("option", { value: n, selected: n === now }, sayValue(n))),
      ),
    );
  }

  function toggleLabel() {
    if (app.mode !== "live") return say(app.player.playing ? "control.pause" : "control.play");
    if (app.engine.teach) return say(app.engine.paused ? "control.resume" : "control.pause");
    return say(app.player.follow ? "control.hold" : "control.live");
  }

  return () => {
    const last = app.history.frames.length - 1,
      isLive = app.mode === "live",
      { teach } = app.engine;
    const width = drawTimeline(canvas, app.history, app.player.position);
    slider.style.width = `max(8rem, ${width}px)`; // its handle is below the step that it is at
    slider.max = Math.max(0, last);
    slider.value = app.player.position;
    slider.setAttribute("aria-label", say("timeline"));
    slider.setAttribute("aria-valuetext", say("timeline.aria", { n: app.state.n, last: app.history.latest.n }));
    file.setAttribute("aria-label", say("control.open"));
    replace(
      legend,
      h("span", {}, say("strip")),
      STRIP.map((key) => h("span", {}, h("i", { class: `key ${key}` }), say(`strip.${key}`))),
    );
    replace(
      buttons,
      button("back", "◀", () => stepBack(app), {
        title: `${say("control.back")} (←)`,
        "aria-label": say("control.back"),
      }),
      button("toggle", toggleLabel(), () => toggle(app), { class: "primary", title: "␣" }),
      button("step", "▶", () => stepForward(app), {
        title: `${say("control.step")} (→)`,
        "aria-label": say("control.step"),
      }),
      isLive && !app.player.follow && button("newest", say("control.live"), () => app.followNewest(), { title: "End" }),
      app.mode === "replay" &&
        choice(
          "rate",
          "control.rate.label",
          RATES,
          app.player.rate,
          (n) => say("control.rate", { n }),
          (n) => {
            app.player.rate = n;
          },
        ),
      isLive &&
        teach &&
        choice(
          "slow",
          "control.slow",
          DELAYS_MS,
          app.engine.delay_ms,
          (n) => (n ? say("control.slow.ms", { n }) : say("control.slow.off")),
          (n) => command(app, { action: "slow", delay_ms: n }),
        ),
      isLive &&
        teach &&
        h(
          "span",
          { class: "group", role: "group", "aria-label": say("scene.title") },
          SCENES.map((scene) =>
            button(`scene-${scene}`, say(`scene.${scene}`), () => playScene(app, scene), {
              title: say(`hint.${scene}`),
            }),
          ),
          button("clear", say("control.clear"), () => clear(app), { title: say("control.clear.how") }),
        ),
    );
    replace(
      extras,
      button("open", say("control.open"), () => file.click()),
      last >= 0 && isLive && button("save", say("control.save"), () => saveTrace(app)),
      h(
        "details",
        { class: "keys" },
        h("summary", { "data-key": "keys" }, say("shortcuts")),
        h(
          "dl",
          {},
          KEYS.map(([key, label]) => [h("dt", {}, h("kbd", {}, label)), h("dd", {}, say(`shortcut.${key}`))]),
        ),
      ),
    );
  };
}

function saveTrace(app) {
  const url = URL.createObjectURL(new Blob([traceText(app.history)], { type: "application/jsonl" }));
  h("a", { href: url, download: "nano-vllm-trace.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
