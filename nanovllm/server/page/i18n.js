// Every word of the page, in English and Chinese.

const WORDS = {
  title: ["nano-vLLM: the engine at work", "nano-vLLM：看引擎运行"],
  tagline: ["the engine at work", "看引擎运行"],
  skip: ["Skip to the picture", "跳到主图"],
  views: ["Views", "视图"],
  "view.blocks": ["Blocks", "KV 块"],
  "view.scheduler": ["Scheduler", "调度器"],
  "view.attention": ["Attention", "注意力"],
  "view.parallel": ["Parallel layers", "并行层"],
  language: ["中文", "English"],
  "language.label": ["Language: 中文", "语言：English"],
  theme: ["Dark or light", "深色或浅色"],
  // where the steps come from
  "source.live": ["live", "实时"],
  "source.paused": ["paused", "已暂停"],
  "source.recorded": ["recorded", "回放"],
  "source.lost": ["no connection", "连接断开"],
  "source.none": ["no engine", "没有引擎"],
  "source.hold": ["looking back", "查看历史"],
  waiting_for_steps: [
    "No step yet. Ask the engine something: every step it takes appears here.",
    "还没有步。向引擎提个问题，它走的每一步都会出现在这里。",
  ],
  no_engine: [
    "There is no engine behind this page. Open a recorded trace (a .jsonl file), or drop one here.",
    "这个页面背后没有引擎。请打开一份录好的轨迹（.jsonl 文件），或把文件拖到这里。",
  ],
  bad_trace: ["This is no trace. Line {error}", "这不是轨迹文件。第 {error}"],
  lost: ["The engine has ended, and is being started again.", "引擎已终止，正在重新启动。"],
  restarted: [
    "The engine was started again: its cache is empty, and what ran has failed.",
    "引擎已重新启动：缓存已清空，原先运行的请求已失败。",
  ],
  refused: ["The server refused: {error}", "服务器拒绝：{error}"],
  "key.title": ["This server wants an API key", "此服务器需要 API 密钥"],
  "key.label": ["API key", "API 密钥"],
  "key.send": ["Use it", "使用"],
  // figures
  figures: ["Figures", "指标"],
  "stat.step": ["step", "步"],
  "stat.tok_s": ["tokens/s", "词元/秒"],
  "stat.usage": ["cache in use", "缓存占用"],
  "stat.hit_rate": ["prefix hit rate", "前缀命中率"],
  "stat.preemptions": ["preemptions", "抢占"],
  "stat.evictions": ["evictions", "驱逐"],
  "stat.ms": ["ms a step", "毫秒/步"],
  gap: [
    "{n} steps are left out, so that watching costs the engine nothing to speak of.",
    "略去了 {n} 步，这样观看几乎不占引擎的时间。",
  ],
  engines: ["The server runs {n} engines; this is the first of them.", "服务器运行着 {n} 个引擎，这里显示第一个。"],
  // blocks
  "blocks.title": ["{n} KV blocks of {size} tokens", "{n} 个 KV 块，每块 {size} 个词元"],
  "blocks.how": [
    "A block holds the keys and values of {size} tokens of one sequence, or of several that begin alike.",
    "一个块存放 {size} 个词元的键和值，属于一个序列，或由几个开头相同的序列共享。",
  ],
  "blocks.aria": [
    "{n} blocks: {used} used, {shared} of them shared, {cached} cached but free, {free} empty. {owners}",
    "共 {n} 块：使用中 {used}，其中共享 {shared}；已缓存的空闲块 {cached}；空块 {free}。{owners}",
  ],
  "blocks.owner": ["{name}: {n}.", "{name}：{n} 块。"],
  "legend.used": ["used", "使用中"],
  "legend.shared": ["shared prefix", "共享前缀"],
  "legend.cached": ["free, content cached", "空闲，内容仍缓存"],
  "legend.free": ["empty", "空"],
  "legend.changed": ["changed in this step", "本步有变化"],
  "legend.evicted": ["evicted", "被驱逐"],
  "block.used": [
    "Block {b}: held by {owners}; tokens {from} to {to}{digest}",
    "物理块 {b}：由 {owners} 持有；词元 {from} 到 {to}{digest}",
  ],
  "block.cached": [
    "Block {b}: free, but its content{digest} can be revived by a prefix hit",
    "物理块 {b}：空闲，但内容{digest}还在，前缀命中即可复用",
  ],
  "block.free": ["Block {b}: empty", "物理块 {b}：空"],
  "block.digest": [", digest {digest}", "，摘要 {digest}"],
  "block.none": ["Point at a block, or walk with the arrow keys.", "指向某个块，或用方向键移动。"],
  "table.title": ["Block table of {name}: logical → physical", "{name} 的块表：逻辑块 → 物理块"],
  "table.none": ["{name} holds no block now.", "{name} 现在不持有任何块。"],
  "table.nobody": ["No request holds a block now.", "现在没有请求持有块。"],
  "table.logical": ["logical", "逻辑块"],
  "table.physical": ["physical", "物理块"],
  "table.shared": ["shared with {owners}", "与 {owners} 共享"],
  "table.more": ["and {n} more", "另有 {n} 个"],
  "table.group.full": ["Layer group {n}: sees every token", "第 {n} 组层：能看到所有词元"],
  "table.group.window": [
    "Layer group {n}: sees the last {window} tokens (sliding window)",
    "第 {n} 组层：只看最近 {window} 个词元（滑动窗口）",
  ],
  "table.groups": [
    "Each group of layers has a table of its own, and all take blocks from one pool. A group with a window gives blocks back as soon as no token to come sees them: its table begins later.",
    "每组层各有一张块表，所有组共用一个块池。带滑动窗口的组会把后续词元再也看不到的块立即交还，所以它的块表从后面的逻辑块开始。",
  ],
  "table.how": [
    "The request sees one row of tokens. Its blocks lie anywhere in the cache.",
    "请求看到的是连续的词元，而它的块可以散落在缓存的任何地方。",
  ],
  // scheduler
  "queue.running": ["Running", "运行队列"],
  "queue.waiting": ["Waiting", "等待队列"],
  "queue.running.how": ["in order of arrival; the last one is preempted first", "按到达顺序排列，最后一个最先被抢占"],
  "queue.waiting.how": ["the first one enters next", "队首最先进入"],
  "queue.empty": ["nobody", "空"],
  "batch.title": ["This step's batch: {n} of {budget} tokens", "本步的批：预算 {budget} 个词元，用了 {n} 个"],
  "batch.empty": ["no batch in this step", "本步没有批"],
  "batch.decode": ["decode", "解码"],
  "batch.prefill": ["prefill chunk", "分块预填充"],
  "batch.left": ["left of the budget", "剩余预算"],
  "batch.entry": ["{name}: {kind}, positions {from} to {to}", "{name}：{kind}，位置 {from} 到 {to}"],
  "batch.one": ["{name}: {kind}, position {from}", "{name}：{kind}，位置 {from}"],
  "batch.how": [
    "The scheduler fills the budget anew in every step: first one token for each decode, then the prompt " +
      "under way, then new arrivals.",
    "调度器每一步都重新填满预算：先给每个解码一个词元，再算没算完的提示，最后接纳新到的请求。",
  ],
  "scheduler.entries": ["Who computes what", "谁在算什么"],
  "scheduler.request": ["request", "请求"],
  "scheduler.kind": ["kind", "类型"],
  "scheduler.positions": ["positions", "位置"],
  "scheduler.tokens": ["tokens", "词元数"],
  "scheduler.progress": ["computed, of at most", "已计算 / 最多"],
  // requests
  requests: ["Requests", "请求"],
  "requests.none": ["No request yet.", "还没有请求。"],
  "status.running": ["running", "运行中"],
  "status.waiting": ["waiting", "等待中"],
  "status.finished": ["finished", "已完成"],
  "request.tokens": ["{prompt} + {output} tokens", "{prompt} + {output} 个词元"],
  // events
  events: ["Events", "事件"],
  "events.none": ["Nothing has happened yet.", "还没有发生任何事。"],
  "what.arrive": ["arrival", "到达"],
  "what.admit": ["admission", "接纳"],
  "what.hit": ["prefix hit", "前缀命中"],
  "what.chunk": ["chunk", "分块"],
  "what.preempt": ["preemption", "抢占"],
  "what.evict": ["eviction", "驱逐"],
  "what.finish": ["end", "完成"],
  "what.abort": ["abort", "中止"],
  "source.open": ["Source of {name}", "{name} 的源码"],
  "source.where": ["{file}, line {line}", "{file}，第 {line} 行"],
  "source.missing": ["The trace has no source of this function.", "轨迹里没有这个函数的源码。"],
  close: ["Close", "关闭"],
  // attention
  "attention.title": ["Attention of {name} in step {n}", "第 {n} 步中 {name} 的注意力"],
  "attention.choose": ["Request", "请求"],
  "attention.none": ["No request computes in this step. Go to another step.", "这一步没有请求在计算，请换一步。"],
  "attention.write": [
    "1. Write: slot = physical block × {size} + offset",
    "1. 写入：槽位 = 物理块 × {size} + 块内偏移",
  ],
  "attention.write.how": [
    "The step computes keys and values of {n} tokens, positions {from} to {to}, and scatters them to " +
      "these slots (slot_mapping).",
    "这一步计算 {n} 个词元（位置 {from} 到 {to}）的键和值，并写入下面的槽位（slot_mapping）。",
  ],
  "attention.write.one": [
    "The step computes key and value of one token, position {from}, and stores them in this slot " + "(slot_mapping).",
    "这一步计算一个词元（位置 {from}）的键和值，并写入下面的槽位（slot_mapping）。",
  ],
  "attention.slot": ["block {b}: slot {from}", "物理块 {b}：槽位 {from}"],
  "attention.slots": ["block {b}: slots {from} to {to}", "物理块 {b}：槽位 {from} 到 {to}"],
  "attention.read": [
    "2. Read: through the block table, {n} tokens in {blocks} blocks",
    "2. 读取：沿块表读 {blocks} 个块里的 {n} 个词元",
  ],
  "attention.read.how": [
    "Each bar is a logical block; below it is the physical block where its keys and values lie. Dark: " +
      "written in this step. The queries read all that is filled.",
    "每一条是一个逻辑块，下面是存放它的物理块。深色是本步写入的部分；查询读取所有已填充的部分。",
  ],
  "attention.split": [
    "3. Split: the decodes of this step, cut for many multiprocessors",
    "3. 切分：把本步的解码切给许多流式多处理器",
  ],
  "attention.split.how": [
    "One sequence alone would keep few multiprocessors busy, so its context is cut into splits of one " +
      "size; each has a softmax of its own, and the results are merged. The number is the order in which the " +
      "device starts them: long ones first.",
    "单个序列只能让少数处理器忙起来，所以把它的上下文切成等长的段：每段各自做 softmax，最后合并结果。数字是设备启动它们的次序，长的先走。",
  ],
  "attention.split.cpu": [
    "This trace ran on a CPU, which reads a context in one piece. Here is how a GPU would cut it:",
    "这份轨迹在 CPU 上运行，上下文一次读完。换成 GPU 会这样切：",
  ],
  "attention.split.gpu": ["A device of so many multiprocessors cuts it so:", "有这么多处理器的设备会这样切："],
  "attention.split.sms": ["multiprocessors", "流式多处理器个数"],
  "attention.split.heads": ["KV heads", "KV 头数"],
  "attention.split.piece": ["{name}: tokens {from} to {to}", "{name}：词元 {from} 到 {to}"],
  "attention.split.none": [
    "No decode in this step: prompt chunks are cut by their queries instead.",
    "这一步没有解码：提示分块按查询来切。",
  ],
  // parallel layers
  "parallel.title": [
    "A layer over {ranks} ranks: where the all-reduce is",
    "一层分到 {ranks} 个 rank：all-reduce 在哪里",
  ],
  "parallel.ranks": ["ranks", "rank 数"],
  "parallel.hidden": ["hidden size", "隐藏维度"],
  "parallel.layers": ["layers", "层数"],
  "parallel.column": ["column parallel", "列并行"],
  "parallel.row": ["row parallel", "行并行"],
  "parallel.column.how": ["cut by output features: no communication", "按输出特征切：无需通信"],
  "parallel.row.how": ["cut by input features: a partial sum on each rank", "按输入特征切：每个 rank 得到部分和"],
  "parallel.input": ["hidden states, whole on every rank", "隐藏状态，每个 rank 都有完整一份"],
  "parallel.attention": [
    "attention: each rank its own heads and its own KV cache",
    "注意力：每个 rank 算自己的头，存自己的 KV 缓存",
  ],
  "parallel.mlp": ["gate · up: each rank its own features", "gate · up：每个 rank 算自己的特征"],
  "parallel.reduce": ["all-reduce", "all-reduce（全归约）"],
  "parallel.reduce.how": [
    "the partial sums of all ranks, added up, then residual and norm",
    "把所有 rank 的部分和相加，再加残差、做归一化",
  ],
  "parallel.bytes": [
    "This step has {tokens} tokens: an all-reduce sums {tokens} × {hidden} × 2 bytes = {bytes}; two a " +
      "layer, {layers} layers: {total} a step.",
    "本步有 {tokens} 个词元：一次 all-reduce 归约 {tokens} × {hidden} × 2 字节 = {bytes}；每层两次，共 {layers} 层：每步 {total}。",
  ],
  "parallel.ring": [
    "In a ring each of {ranks} ranks sends 2 × ({ranks} − 1) / {ranks} of that: {sent} a step.",
    "用环形算法，{ranks} 个 rank 中每个都要发送其中的 2 × ({ranks} − 1) / {ranks}：每步 {sent}。",
  ],
  "parallel.ran": [
    "This trace ran on {n} rank(s): with one, nothing is sent.",
    "这份轨迹在 {n} 个 rank 上运行；只有一个时不需要通信。",
  ],
  "parallel.unknown": [
    "The trace does not tell the model's size; these are Qwen3-0.6B's. Change them as you like.",
    "轨迹里没有模型尺寸，这里用的是 Qwen3-0.6B 的，可以自行修改。",
  ],
  // controls
  controls: ["Controls", "控制"],
  timeline: ["Timeline of steps", "步的时间线"],
  "timeline.aria": ["step {n} of {last}", "第 {n} 步，共 {last} 步"],
  "control.play": ["Play", "播放"],
  "control.pause": ["Pause", "暂停"],
  "control.resume": ["Resume", "继续"],
  "control.hold": ["Hold", "定格"],
  "control.back": ["Back one step", "后退一步"],
  "control.step": ["One step", "单步"],
  "control.live": ["To the newest", "回到最新"],
  "control.rate": ["{n} steps/s", "{n} 步/秒"],
  "control.rate.label": ["Speed", "速度"],
  "control.slow": ["Slow motion", "慢动作"],
  "control.slow.off": ["full speed", "全速"],
  "control.slow.ms": ["{n} ms a step", "每步 {n} 毫秒"],
  "control.open": ["Open a trace", "打开轨迹"],
  "control.save": ["Save the trace", "保存轨迹"],
  "control.clear": ["Clear", "清空"],
  "hint.replay": [
    "A recording of the real engine. Press Play, take steps with the arrow keys, or drag the timeline. Every event names the function that did it: open its source.",
    "这是真实引擎的一段录制。点“播放”，用方向键逐步前进，或拖动时间线。每个事件都标出触发它的函数，点开即可看源码。",
  ],
  "hint.live": [
    "This engine serves others, so the page shows no texts, and of a busy engine only some of its steps. “nanovllm serve --teach” starts an engine to play with.",
    "这个引擎正在为他人服务：页面不显示文本，繁忙时也只显示部分步骤。用 nanovllm serve --teach 启动一个可以随意操作的引擎。",
  ],
  "hint.teach": [
    "Ask something, or make the engine work with the buttons at the foot of the page. Slow motion lets you follow; Pause and ▶ take single steps.",
    "向它提问，或用页面底部的按钮给引擎加负载。慢动作便于看清；暂停后用 ▶ 单步执行。",
  ],
  "hint.shared": [
    "Ten requests begin with the same tokens. The first one computes them; the others find its blocks (prefix hit) and share them: watch the striped blocks.",
    "十个请求开头相同。第一个计算这些词元，其余的直接找到它的块并共用（前缀命中）：看带条纹的块。",
  ],
  "hint.fill": [
    "All requests fit at first, and then grow until no block is free. The latest arrival is preempted and waits; when it resumes, it finds those of its blocks that nobody has taken.",
    "起初所有请求都放得下，之后越长越多，直到没有空闲块：最晚到达的请求被抢占并排队；恢复时，尚未被别人占用的块还能命中。",
  ],
  "hint.long": [
    "A prompt longer than a step's budget comes behind three short requests. It is computed in chunks beside their decodes, so they go on in every step.",
    "三个短请求之后来了一个超过单步预算的长提示。它被分块计算，与其他请求的解码同步进行，谁也不用停下来等。",
  ],
  strip: ["Tokens of each step:", "每一步的词元："],
  "strip.decode": ["decode", "解码"],
  "strip.prefill": ["prefill", "预填充"],
  "strip.usage": ["cache in use", "缓存占用"],
  "strip.hit": ["prefix hit", "前缀命中"],
  "strip.preempt": ["preemption", "抢占"],
  "control.clear.how": ["End these requests, and empty the cache", "结束这些请求，并清空缓存"],
  "scene.title": ["Make it happen", "制造场景"],
  "scene.shared": ["Ten requests with one beginning", "十个开头相同的请求"],
  "scene.fill": ["Fill the cache", "填满缓存"],
  "scene.long": ["One long prompt", "一个长提示"],
  shortcuts: ["Keyboard", "快捷键"],
  "shortcut.space": ["pause or go on", "暂停或继续"],
  "shortcut.arrows": ["one step forward or back", "前进或后退一步"],
  "shortcut.views": ["views", "切换视图"],
  "shortcut.end": ["to the first or newest step", "到第一步或最新一步"],
  // chat
  chat: ["Chat", "对话"],
  "chat.placeholder": ["Ask the engine something", "问引擎一个问题"],
  "chat.send": ["Send", "发送"],
  "chat.stop": ["Stop", "停止"],
  "chat.new": ["New chat", "新对话"],
  "chat.you": ["You", "你"],
  "chat.model": ["Model", "模型"],
  "chat.blocks": ["its blocks: {name}", "它的块：{name}"],
};

export const LANGUAGES = ["en", "zh"];
export const KEYS = Object.keys(WORDS);
let column = 0;

export function setLanguage(language) {
  column = LANGUAGES.indexOf(language);
}

export function languageNow() {
  return LANGUAGES[column];
}

// The words of a key in the language of now, with {name} filled in. Throws on a key that is not there.
export function say(key, values = {}) {
  if (!WORDS[key]) throw new Error(`no words for ${key}`);
  return WORDS[key][column].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// An event's own text, which the trace has in both languages.
export function sayEvent(text) {
  return text[languageNow()];
}
