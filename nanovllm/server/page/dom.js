// Makes elements: `h` for HTML, `s` for SVG; `replace` turns the children of an element into others.
//
// `replace` keeps the elements that are there and changes what differs in them: the page is drawn many times a second,
// and a click is lost if its button is another one when the finger goes up.

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "x", onclick: f, style: {width: "3px"}}, "text", element, [more])
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  element.handlers = [];
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) {
      element[name] = value;
      element.handlers.push(name);
    } else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...nodesOf(children));
  return element;
}

function nodesOf(children) {
  const shown = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  return shown.map((child) => (child instanceof Node ? child : document.createTextNode(child)));
}

// An element whose `data-key` is another one is another element; the focus goes to the one with the same key.
export function replace(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  changeChildren(parent, nodesOf(children));
  if (focused === undefined || document.activeElement.dataset.key === focused) return;
  parent.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function changeChildren(parent, wanted) {
  const there = [...parent.childNodes];
  wanted.forEach((node, i) => (i < there.length ? change(there[i], node) : parent.append(node)));
  there.slice(wanted.length).forEach((node) => node.remove());
}

function change(node, wanted) {
  if (node.nodeName !== wanted.nodeName || node.dataset?.key !== wanted.dataset?.key) node.replaceWith(wanted);
  else if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
  } else {
    changeAttributes(node, wanted);
    for (const name of new Set([...(node.handlers ?? []), ...wanted.handlers])) node[name] = wanted[name];
    node.handlers = wanted.handlers;
    changeChildren(node, [...wanted.childNodes]);
    if (node.nodeName === "OPTION") node.selected = wanted.selected;
  }
}

function changeAttributes(node, wanted) {
  for (const { name } of [...node.attributes]) {
    if (!wanted.hasAttribute(name) && name !== "open") node.removeAttribute(name); // whoever opened it may close it
  }
  for (const { name, value } of wanted.attributes) {
    if (node.getAttribute(name) === value) continue;
    if (name === "style")
      node.style.cssText = value; // the attribute itself is what the page's policy forbids
    else node.setAttribute(name, value);
  }
}

const colors = new Map();

// A theme's color as the browser computes it, for a canvas. To ask the browser costs a layout, so it is asked once.
export function themeColor(name) {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const key = `${document.documentElement.dataset.theme} ${isDark} ${name}`;
  if (!colors.has(key)) {
    const probe = document.getElementById("probe");
    probe.style.color = `var(${name})`;
    colors.set(key, getComputedStyle(probe).color);
  }
  return colors.get(key);
}

// Sizes a canvas to its place on the page and returns its context, whose unit is a CSS pixel.
export function prepareCanvas(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
