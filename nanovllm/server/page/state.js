// The engine as a trace tells it: `apply` takes one object of a trace into the state. Pure data, no page.
//
// A block is {state: "free" | "cached" | "used", owners, last, first, digest}: `owners` are the requests that hold it,
// `last` those that held it before it was free, `first` the position of its first token (-1: unknown).
// Blocks and requests are replaced, never changed, so that a copy of the state need not copy them.

const FREE = Object.freeze({ state: "free", owners: [], last: [], first: -1, digest: "" });
const MOST_FINISHED = 200; // finished requests that are remembered

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
    requests: new Map(),
    skipped: 0,
    stats: { usage: 0, hit_rate: 0, queries: 0, hits: 0, preemptions: 0, evictions: 0, output_tokens: 0, tok_s: 0 },
  };
}

export function copyState(state) {
  return { ...state, blocks: state.blocks.slice(), requests: new Map(state.requests) };
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
  const seen = state.requests.get(request);
  state.requests.set(request, {
    text: "",
    pieces: 0,
    computed: 0,
    status: "waiting",
    reason: "",
    ...seen,
    name: request,
    prompt,
    promptTokens: prompt_tokens,
    maxTokens: max_tokens,
  });
}

function applyStep(state, step) {
  const { n, t, ms, batch, running, waiting, events } = step;
  Object.assign(state, { n, t, ms, batch, running, waiting, events, stats: step.stats });
  if (step.full) state.blocks.fill(FREE);
  state.changed = step.full ? [] : step.blocks.map(([block]) => block);
  for (const [block, kind, owners, first, digest] of step.blocks) {
    const before = state.blocks[block] ?? FREE;
    const last = kind === "cached" ? (before.owners.length ? before.owners : before.last) : [];
    state.blocks[block] = kind === "free" ? FREE : { state: kind, owners, last, first, digest };
  }
  for (const event of events) {
    if (event.what === "finish" || event.what === "abort") {
      change(state, event.request, { status: "finished", reason: event.data?.reason ?? event.what });
    } else if (event.what === "preempt") change(state, event.request, { computed: 0 });
  }
  for (const [request, , first, count] of batch) change(state, request, { computed: first + count });
  for (const [request, pieces] of Object.entries(step.tokens)) {
    const { text, pieces: before } = state.requests.get(request) ?? { text: "", pieces: 0 };
    change(state, request, { text: text + pieces.join(""), pieces: before + pieces.length });
  }
  for (const request of running) change(state, request, { status: "running" });
  for (const request of waiting) change(state, request, { status: "waiting" });
  forgetOldest(state);
}

function change(state, name, values) {
  const unknown = {
    name,
    prompt: "",
    promptTokens: 0,
    maxTokens: 0,
    text: "",
    pieces: 0,
    computed: 0,
    status: "waiting",
    reason: "",
  };
  state.requests.set(name, { ...(state.requests.get(name) ?? unknown), ...values });
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

// The blocks of a request in the order of its tokens: [[logical, physical], …]. Groups of layers have equal logicals.
export function blockTable(state, name) {
  const size = state.head?.block_size ?? 1;
  return state.blocks
    .map((block, physical) => [Math.floor(block.first / size), physical])
    .filter(([, physical]) => state.blocks[physical].owners.includes(name))
    .sort((a, b) => a[0] - b[0] || a[1] - b[1]);
}

// How many blocks are in each state; `shared` are the used ones with several owners.
export function countBlocks(state) {
  const counts = { used: 0, cached: 0, free: 0, shared: 0 };
  for (const block of state.blocks) {
    counts[block.state] += 1;
    if (block.owners.length > 1) counts.shared += 1;
  }
  return counts;
}

// What disagrees in the state after a step, as sentences; an empty list in every true trace.
export function findFaults(state) {
  const faults = [];
  const running = new Set(state.running);
  state.blocks.forEach((block, number) => {
    if ((block.state === "used") !== block.owners.length > 0) faults.push(`block ${number}: owners and state disagree`);
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
