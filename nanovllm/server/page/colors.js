// A request's color, and the pattern that tells it from the other requests of that color.
//
// Eight colors that color-blind readers tell apart (after Okabe and Ito); the next eight requests have stripes, then
// dots. Its letter stands beside the color wherever there is room.

import { h } from "./dom.js";

const FILLS = ["#56b4e9", "#e69f00", "#00a57a", "#d98bb9", "#f0e442", "#e0703a", "#8fa8e8", "#b5b0a5"];
export const INK = "#14181f"; // on every fill

// The place of a request's name in the order A, B, …, Z, A1, B1, …
export function requestIndex(name) {
  return name.charCodeAt(0) - 65 + 26 * (Number.parseInt(name.slice(1), 10) || 0);
}

export function fillOf(name) {
  return FILLS[Math.abs(requestIndex(name)) % FILLS.length];
}

// 0: plain, 1: stripes, 2: dots.
export function patternOf(name) {
  return Math.floor(Math.abs(requestIndex(name)) / FILLS.length) % 3;
}

// A request's letter on its color. `attributes`: of the element; with onclick it is a button.
export function chip(name, attributes = {}) {
  const tag = attributes.onclick ? "button" : "span";
  const type = attributes.onclick ? { type: "button" } : {};
  return h(
    tag,
    {
      ...type,
      ...attributes,
      class: `chip p${patternOf(name)} ${attributes.class ?? ""}`,
      style: { "background-color": fillOf(name) },
    },
    name,
  );
}
