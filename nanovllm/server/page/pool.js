// What every block of the cache holds, followed from the changes of block tables and digests.
//
// A block is {state: "free" | "cached" | "used", owners, last, first, group, digest}: `owners` are the requests that hold
// it, `last` those that held it before it was free, `first` the position of its first token (-1: unknown), `group` the
// group of layers whose keys and values it has. `tables` has the block tables of each running request, one for each
// group, with -1 for what was given back. Blocks and tables are replaced, never changed: a copy of the state shares them.

export const FREE = Object.freeze({ state: "free", owners: [], last: [], first: -1, group: 0, digest: "" });

// Takes a step's tables and digests into `state`. What is given back goes first, since others may have taken it.
export function applyBlocks(state, { full, running, tables, digests }) {
  if (full) {
    state.blocks.fill(FREE);
    state.tables.clear();
  }
  const before = new Map(), // of the blocks that something happens to
    taken = [];
  const touch = (number) => {
    if (!before.has(number)) {
      before.set(number, state.blocks[number] ?? FREE);
      state.blocks[number] = { ...before.get(number) };
    }
    return state.blocks[number];
  };
  const leave = (name, number) => {
    const block = touch(number);
    block.owners = block.owners.filter((owner) => owner !== name);
  };
  const runs = new Set(running);
  for (const name of state.tables.keys()) {
    if (runs.has(name)) continue;
    for (const number of state.tables.get(name).flat()) if (number >= 0) leave(name, number);
    state.tables.delete(name);
  }
  for (const [name, group, kept, given, added] of tables) {
    const groups = state.tables.get(name)?.slice() ?? [],
      table = groups[group] ?? [];
    table.forEach((number, i) => {
      if (number >= 0 && (i < given || i >= kept)) leave(name, number);
    });
    groups[group] = [...table.slice(0, kept), ...added].map((number, i) => (i < given ? -1 : number));
    state.tables.set(name, groups);
    for (let i = kept; i < groups[group].length; i += 1) taken.push([name, group, i, groups[group][i]]);
  }
  for (const [name, group, index, number] of taken) {
    if (number < 0) continue;
    const block = touch(number);
    Object.assign(block, { owners: [...block.owners, name], first: index * state.head.block_size, group });
  }
  digests[0].forEach((number, i) => (touch(number).digest = digests[1][i]));
  for (const [number, old] of before) settle(state, number, old);
  state.changed = full ? [] : [...before.keys()];
}

// The state of a block whose owners or digest have changed.
function settle(state, number, before) {
  const block = state.blocks[number];
  if (block.owners.length) Object.assign(block, { state: "used", last: [] });
  else if (block.digest)
    Object.assign(block, { state: "cached", last: before.owners.length ? before.owners : before.last });
  else state.blocks[number] = FREE;
}

// The block tables of a request, one for each group of layers: [[[logical, physical], …], …], without what was given back.
export function blockTables(state, name) {
  return (state.tables.get(name) ?? []).map((table) => [...table.entries()].filter(([, number]) => number >= 0));
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
