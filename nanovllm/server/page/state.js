// The engine as a trace tells it: `apply` takes one object of a trace into the state. Pure data, no page.
//
// What its blocks hold is in `pool.js`. Requests are replaced, never changed, so that a copy need not copy them.

import { applyBlocks, countBlocks, FREE } from "./pool.js";

const MOST_FINISHED = 200; // finished requests that are remembered
// A request before anything is known of it. `output`: how many tokens it has got.
const UNKNOWN = {
  prompt: "",
  promptTokens: 0,
  maxTokens: 0,
  text: "",
  output: 0,
  computed: 0,
  status: "waiting",
  reason: "",
};

export function emptyState() {
  return {
    head: null,
    n: 0,
    t: 0,
    ms: 0,
    batch: [],
    running: [],
    waiting: [],
    events: [],
    changed: [],
    blocks: [],
    tables: new Map(),
    requests: new Map(),
    skipped: 0,
    stats: { usage: 0, hit_rate: 0, queries: 0, hits: 0, preemptions: 0, evictions: 0, output_tokens: 0, tok_s: 0 },
  };
}

export function copyState(state) {
  return {
    ...state,
    blocks: state.blocks.slice(),
    tables: new Map(state.tables),
    requests: new Map(state.requests),
  };
}

// Takes an object of a trace into `state`, in place. Throws on a kind that no trace has.
export function apply(state, object) {
  if (object.kind === "head") applyHead(state, object);
  else if (object.kind === "request") applyRequest(state, object);
  else if (object.kind === "step") applyStep(state, object);
  else if (object.kind === "gap") state.skipped += object.steps;
  else throw new Error(`kind ${JSON.stringify(object.kind)}: a trace has head, request, step and gap`);
}

function applyHead(state, head) {
  Object.assign(state, emptyState(), { head, blocks: new Array(head.num_blocks).fill(FREE) });
}

function applyRequest(state, { request, prompt_tokens, prompt, max_tokens }) {
  change(state, request, { prompt, promptTokens: prompt_tokens, maxTokens: max_tokens });
}

function applyStep(state, step) {
  const { n, t, ms, batch, running, waiting, events } = step;
  Object.assign(state, { n, t, ms, batch, running, waiting, events, stats: step.stats });
  applyBlocks(state, step);
  for (const event of events) {
    if (event.what === "finish" || event.what === "abort") {
      change(state, event.request, { status: "finished", reason: event.data?.reason ?? event.what });
    } else if (event.what === "preempt") change(state, event.request, { computed: 0 });
  }
  for (const [request, , first, count] of batch) {
    const { promptTokens, output } = state.requests.get(request) ?? UNKNOWN;
    const computed = first + count; // and one more, if that was all there was, is drawn
    change(state, request, { computed, output: Math.max(output, computed + 1 - promptTokens) });
  }
  for (const [request, pieces] of Object.entries(step.tokens)) {
    change(state, request, { text: (state.requests.get(request) ?? UNKNOWN).text + pieces.join("") });
  }
  for (const request of running) change(state, request, { status: "running" });
  for (const request of waiting) change(state, request, { status: "waiting" });
  forgetOldest(state);
}

function change(state, name, values) {
  state.requests.set(name, { ...(state.requests.get(name) ?? { ...UNKNOWN, name }), ...values });
}

function forgetOldest(state) {
  let extra = state.requests.size - state.running.length - state.waiting.length - MOST_FINISHED;
  for (const [name, request] of state.requests) {
    if (extra <= 0) return;
    if (request.status === "finished") {
      state.requests.delete(name);
      extra -= 1;
    }
  }
}

// What disagrees in the state after a step, as sentences; an empty list in every true trace.
export function findFaults(state) {
  const faults = [];
  const running = new Set(state.running);
  state.blocks.forEach((block, number) => {
    for (const owner of block.owners) {
      if (!running.has(owner)) faults.push(`block ${number}: its owner ${owner} is not running`);
    }
  });
  const usage = countBlocks(state).used / Math.max(1, state.blocks.length);
  if (Math.abs(usage - state.stats.usage) > 0.005)
    faults.push(`usage ${state.stats.usage}, but the blocks say ${usage}`);
  const tokens = state.batch.reduce((sum, entry) => sum + entry[3], 0);
  if (tokens > state.head.max_num_batched_tokens) faults.push(`a batch of ${tokens} tokens is above the budget`);
  for (const name of state.waiting) if (running.has(name)) faults.push(`${name} runs and waits`);
  return faults;
}
