// What the page's address says behind `#`: view, lang, theme, request and step. So a link shows what its sender saw.

import { VIEWS } from "./controls.js";
import { indexOfStep } from "./history.js";
import { LANGUAGES, languageNow, setLanguage } from "./i18n.js";
import { seek } from "./replay.js";

const REMEMBER_AFTER_MS = 300; // browsers refuse too many changes
let timer = 0;

// The address of what is shown, with `change` in it.
export function address(app, change = {}) {
  const { view, theme, request } = { ...app, ...change },
    isBack = app.player.position >= 0 && !app.player.follow;
  const entries = {
    view,
    lang: languageNow(),
    ...(theme && { theme }),
    ...(request && { request }),
    ...(isBack && !app.player.playing && { step: app.state.n }),
  };
  return `#${new URLSearchParams(entries)}`;
}

export function rememberAddress(app) {
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", address(app)), REMEMBER_AFTER_MS);
}

// Shows what the address says. The language is its own, or else the browser's.
export function readAddress(app) {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (VIEWS.includes(asked.get("view"))) app.view = asked.get("view");
  const own = navigator.languages.map((name) => name.slice(0, 2)).find((name) => LANGUAGES.includes(name));
  setLanguage(LANGUAGES.includes(asked.get("lang")) ? asked.get("lang") : own || "en");
  setTheme(app, asked.get("theme") ?? "");
  if (asked.get("request")) app.request = asked.get("request");
  const step = Number(asked.get("step"));
  if (step > 0 && app.history.frames.length) seek(app.player, indexOfStep(app.history, step));
  app.render();
}

// "dark", "light", or else the system's.
export function setTheme(app, theme) {
  app.theme = ["dark", "light"].includes(theme) ? theme : "";
  document.documentElement.dataset.theme = app.theme;
}
