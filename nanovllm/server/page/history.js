// Remembers a trace step by step, so that one can go back and forth in it; a live one forgets its oldest steps.

import { apply, copyState, emptyState } from "./state.js";

const KEYFRAME_EVERY = 64; // steps between two copies of the state; to go back replays at most so many

// A frame is {objects, step, summary, after}: what came up to and with a step; `after` is a copy of the state, or null.
// The oldest frames are forgotten beyond `limit` of them, or beyond `mostEntries` of the batches, which take the memory.
export function createHistory(limit = 4096, mostEntries = 128 * limit) {
  return {
    limit,
    mostEntries,
    entries: 0,
    head: null,
    frames: [],
    base: emptyState(),
    latest: emptyState(),
    pending: [],
    count: 0,
    cursor: { index: -1, state: emptyState() },
  };
}

// Takes an object of a trace. Returns how many of the oldest frames were forgotten. A new head begins anew.
export function add(history, object) {
  if (object.kind === "head") {
    Object.assign(history, createHistory(history.limit, history.mostEntries), { head: object });
    apply(history.base, object);
  }
  apply(history.latest, object);
  if (object.kind === "head") return 0;
  history.pending.push(object);
  if (object.kind !== "step") return 0;
  history.count += 1;
  const after = history.count % KEYFRAME_EVERY ? null : copyState(history.latest);
  history.frames.push({ objects: history.pending, step: object, summary: summarize(object), after });
  history.pending = [];
  history.entries += object.batch.length;
  return history.frames.length > history.limit || history.entries > history.mostEntries ? forgetOldest(history) : 0;
}

function summarize({ n, batch, events, stats }) {
  const tokens = { prefill: 0, decode: 0 };
  for (const [, kind, , count] of batch) tokens[kind] += count;
  const has = (what) => events.some((event) => event.what === what);
  return { n, ...tokens, usage: stats.usage, preempt: has("preempt"), evict: has("evict"), hit: has("hit") };
}

function forgetOldest(history) {
  const index = history.frames.findIndex((frame) => frame.after);
  if (index < 0) return 0;
  history.base = history.frames[index].after;
  for (const { step } of history.frames.splice(0, index + 1)) history.entries -= step.batch.length;
  history.cursor = { index: -1, state: copyState(history.base) };
  return index + 1;
}

// The state after frame `index`. Read it before the next call: it is changed in place.
export function stateAt(history, index) {
  if (index >= history.frames.length - 1) return history.latest;
  let { index: from, state } = history.cursor;
  if (from > index || index - from > KEYFRAME_EVERY || from < 0) {
    from = Math.max(index, -1);
    while (from >= 0 && !history.frames[from].after) from -= 1;
    state = copyState(from < 0 ? history.base : history.frames[from].after);
  }
  for (; from < index; from += 1) history.frames[from + 1].objects.forEach((object) => apply(state, object));
  history.cursor = { index, state };
  return state;
}

// The index of the frame of step `n`, or of the one nearest to it.
export function indexOfStep(history, n) {
  const index = history.frames.findIndex((frame) => frame.step.n >= n);
  return index < 0 ? history.frames.length - 1 : index;
}

// The newest events up to frame `index`, newest first: [{n, event}, …].
export function eventsUntil(history, index, most) {
  const found = [];
  for (let i = Math.min(index, history.frames.length - 1); i >= 0 && found.length < most; i -= 1) {
    const { n, events } = history.frames[i].step;
    for (let k = events.length - 1; k >= 0; k -= 1) found.push({ n, event: events[k] });
  }
  return found.slice(0, most);
}

// What is remembered as the text of a trace file, whose first step has all blocks.
export function traceText(history) {
  if (!history.frames.length) return history.head ? JSON.stringify(history.head) + "\n" : "";
  const first = copyState(stateAt(history, 0));
  const tables = [...first.tables].flatMap(([name, groups]) =>
    groups.map((table, group) => [name, group, 0, 0, table]),
  );
  const found = [...first.blocks.entries()].filter(([, { digest }]) => digest);
  const digests = [found.map(([number]) => number), found.map(([, { digest }]) => digest)];
  const requests = [...first.requests.values()].map((request) => ({
    kind: "request",
    request: request.name,
    prompt_tokens: request.promptTokens,
    prompt: request.prompt,
    max_tokens: request.maxTokens,
  }));
  const objects = [
    history.head,
    ...requests,
    { ...history.frames[0].step, full: true, tables, digests },
    ...history.frames.slice(1).flatMap((frame) => frame.objects),
  ];
  return objects.map((object) => JSON.stringify(object) + "\n").join("");
}
