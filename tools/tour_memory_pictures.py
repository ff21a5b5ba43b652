"""The tour's pictures of memory and schedule, from the engine's own BlockManager and Scheduler.

Neither needs a model: which blocks a sequence gets, and who runs, depends on lengths and token ids alone.
"""

import random
from collections import Counter
from dataclasses import dataclass

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from tools.tour_svg import COLORS, EMPTY, INK, LINE, MUTED, PAPER, RED, Sheet

CACHE = 131_072  # tokens
LONGEST = 2048


def make_sequence(name: int, prompt: list[int], num_outputs: int) -> Sequence:
    """A sequence that ends after so many tokens."""
    params = SamplingParams(max_tokens=num_outputs, ignore_eos=True)
    return Sequence(str(name), prompt, params, len(prompt) + num_outputs, frozenset(), {}, seed=0)


def finish_step(scheduler: Scheduler, step: ScheduledStep) -> None:
    """Give every sequence that samples in the step a token, as a device would, and end those that are through."""
    for seq in step.samples:
        seq.append_token(0)
        if seq.is_finished:
            scheduler.finish(seq)


def headline() -> list[tuple[int, int]]:
    """(prompt's tokens, answer's tokens) of upstream's benchmark, draw for draw."""
    rng = random.Random(0)
    inputs = []
    for _ in range(256):
        inputs.append(rng.randint(100, 1024))
        for _ in range(inputs[-1]):
            rng.randint(0, 10_000)
    return [(length, rng.randint(100, 1024)) for length in inputs]


def filled(block_size: int, after: int) -> list[tuple[int, float]]:
    """(request, share filled) of each block after so many steps of the headline; request -1: the block is free."""
    manager = BlockManager(CACHE // block_size, block_size, enable_prefix_caching=False)
    scheduler = Scheduler(manager, 256, 16384)
    for i, (num_inputs, num_outputs) in enumerate(headline()):
        scheduler.add(make_sequence(i, [0] * num_inputs, num_outputs))
    for _ in range(after):
        finish_step(scheduler, scheduler.schedule())
    content = [(-1, 0.0)] * manager.num_blocks
    for seq in scheduler.running:
        for i, block in enumerate(seq.block_tables[0]):
            here = min(max(seq.num_computed_tokens - i * block_size, 0), block_size)
            content[block] = (int(seq.request_id), here / block_size)
    return content


def paging(language: str) -> str:
    """Chapter 1: one cache after 300 steps of the headline, once with reservations and once in blocks."""
    title = ("The same cache with reservations and in blocks", "同一块缓存：按最大长度预留，与分成小块")
    sheet = Sheet(980, 400, language, title)
    reserved, blocks = filled(LONGEST, 300), filled(256, 300)
    for x, name, content in ((20, "reserved", reserved), (510, "paged", blocks)):
        requests = len({request for request, _ in content} - {-1})
        share = sum(part for _, part in content) / len(content)
        head = {
            "reserved": ("64 reservations of 2,048 tokens", "预留：64 份，每份 2,048 个词元"),
            "paged": ("512 blocks of 256 tokens", "分页：512 块，每块 256 个词元"),
        }[name]
        sheet.text(x, 30, head, 15, bold=True)
        line = f"{requests} requests, {share:.0%} filled", f"{requests} 个请求，填充率 {share:.0%}"
        sheet.text(x, 50, line, 13, MUTED)
    for i, (request, share) in enumerate(reserved):
        sheet.rect(20 + i * 7, 64, 6, 300)
        sheet.rect(20 + i * 7, 64 + 300 * (1 - share), 6, 300 * share, COLORS[request % len(COLORS)])
    for i, (request, share) in enumerate(blocks):
        x, y = 510 + i % 32 * 14, 64 + i // 32 * 18.75
        if share < 1:
            sheet.rect(x, y, 13, 17.5)
        if request >= 0:
            sheet.rect(x, y, 13 * share, 17.5, COLORS[request % len(COLORS)])
    foot = (
        "left: a bar is a reservation; a colour is a request, grey holds no token; the benchmark's 256 requests after "
        "300 steps of the scheduler",
        "左：一根柱是一份预留；一种颜色是一个请求，灰色处没有存任何词元；基准测试的 256 个请求，"
        "由引擎的调度器跑 300 步之后",
    )
    sheet.text(20, 388, foot, 12, MUTED)
    return sheet.svg()


@dataclass(slots=True)
class Books:
    """A BlockManager's state that a picture shows."""

    tables: list[tuple[str, list[int], int]]  # (name, block table, tokens), of each sequence
    readers: Counter[int]  # by block: how many sequences hold it
    cached: list[int]  # free blocks that a lookup still finds
    free: list[int]  # in the order in which they will be taken


def shared_blocks() -> Books:
    """Four sequences come, of which the last is gone again; three begin with the same eight tokens. Blocks of 4."""
    manager = BlockManager(num_blocks=12, block_size=4)
    system = [7, 7, 7, 7, 8, 8, 8, 8]
    prompts = {"A": [*system, 1, 2, 3], "B": [*system, 4, 5], "C": [9, *system[1:], 6], "D": [*system, 1, 2, 5, 3, 3]}
    seqs = {}
    for name, prompt in prompts.items():
        seq = seqs[name] = make_sequence(0, list(prompt), 8)
        manager.admit(seq, manager.find_prefix(seq))
        seq.num_computed_tokens = len(prompt)
        manager.publish(seq)
    manager.release(seqs.pop("D"))
    tables = [(name, list(seq.block_tables[0]), seq.num_computed_tokens) for name, seq in seqs.items()]
    readers = Counter(block for _, table, _ in tables for block in table)
    gone = make_sequence(0, prompts["D"], 8)
    cached = [block for block in manager.find_prefix(gone)[0] if not readers[block]]
    probe = make_sequence(1, [0] * 4 * manager.num_free_blocks, 1)  # who takes all gets them in the list's order
    manager.admit(probe, [[]])
    return Books(tables, readers, cached, list(probe.block_tables[0]))


def blocks(language: str) -> str:
    """Chapter 2: block tables, the physical blocks that they name, and the free list."""
    books = shared_blocks()
    sheet = Sheet(980, 420, language, ("Block tables, blocks and the free list", "块表、物理块与空闲链表"))
    sheet.text(20, 30, ("block tables (logical blocks)", "块表（逻辑块）"), 15, bold=True)
    sheet.text(958, 236, ("the cache (physical blocks)", "缓存（物理块）"), 15, bold=True, anchor="end")
    width, place = 76, {block: 24 + block * 78 for block in range(12)}
    for i, (name, table, num_tokens) in enumerate(books.tables):
        left = 20 + i * 320
        sheet.text(left, 66, (f"{name}: {num_tokens} tokens", f"{name}：{num_tokens} 个词元"), 13, bold=True)
        for j, block in enumerate(table):
            x, shared = left + j * 92, books.readers[block] > 1
            sheet.rect(x, 78, 82, 30, COLORS[3] if shared else COLORS[i], LINE, 0.55, 4)
            sheet.text(x + 41, 98, f"{j} → {block}", 13, anchor="middle")
            sheet.line((x + 41, 108), (place[block] + width / 2, 246), tip=True)
    for block, x in place.items():
        owners = [i for i, (_, table, _) in enumerate(books.tables) if block in table]
        fill = EMPTY if not owners else COLORS[3] if len(owners) > 1 else COLORS[owners[0]]
        fill, opacity = (COLORS[3], 0.2) if block in books.cached else (fill, 0.55 if owners else 1)
        sheet.rect(x, 250, width, 44, fill, LINE, opacity, 4)
        sheet.text(x + width / 2, 269, str(block), 13, bold=True, anchor="middle")
        state = ("free", "空闲") if not owners else (f"ref_count {len(owners)}", f"引用 {len(owners)}")
        state = ("free, cached", "空闲，有缓存") if block in books.cached else state
        sheet.text(x + width / 2, 286, state, 11, MUTED, anchor="middle")
    sheet.text(20, 334, ("the free list: taken from the left", "空闲链表：从左端取"), 15, bold=True)
    for i, block in enumerate(books.free):
        sheet.rect(24 + i * 60, 346, 50, 30, COLORS[3] if block in books.cached else EMPTY, LINE, 0.25, 4)
        sheet.text(49 + i * 60, 366, str(block), 13, anchor="middle")
    note = (
        "D has ended: its third block still has its content, and stands last. Blocks of 4 tokens; the engine's books.",
        "D 已结束：它的第三块内容还在，排在链表末尾。每块 4 个词元，数据取自引擎自己的账本。",
    )
    sheet.text(20, 404, note, 12, MUTED)
    return sheet.svg()


@dataclass(slots=True)
class Timeline:
    """What each of some sequences did in each step."""

    computed: list[dict[int, int]]  # of each step: sequence -> tokens
    held: list[set[int]]  # the sequences that have blocks after the step
    preempted: list[list[int]]  # in the step
    free: list[int]  # blocks, after the step


def tight_schedule() -> Timeline:
    """Five sequences in 14 blocks of 16 tokens, with 40 tokens a step: chunks, decodes, preemptions, resumptions."""
    manager = BlockManager(14, 16)
    scheduler = Scheduler(manager, max_num_seqs=8, max_num_batched_tokens=40)
    lengths = [(24, 40), (70, 30), (30, 36), (20, 24), (44, 16)]
    seqs = [make_sequence(i, list(range(100 * i, 100 * i + n)), out) for i, (n, out) in enumerate(lengths)]
    for seq in seqs:
        scheduler.add(seq)
    timeline = Timeline([], [], [], [])
    while scheduler.running or scheduler.waiting:
        before = [seq.num_preemptions for seq in seqs]
        step = scheduler.schedule()
        by_row = {seq.row: i for i, seq in enumerate(seqs) if seq.row >= 0}
        tokens = zip(step.plan.rows, step.plan.query_lens, strict=True)
        timeline.computed.append({by_row[row]: n for row, n in tokens})
        timeline.preempted.append([i for i, seq in enumerate(seqs) if seq.num_preemptions > before[i]])
        finish_step(scheduler, step)
        timeline.held.append({i for i, seq in enumerate(seqs) if seq.block_tables})
        timeline.free.append(manager.num_free_blocks)
    return timeline


def schedule(language: str) -> str:
    """Chapter 3: who computes how much in each step, and the free blocks."""
    timeline = tight_schedule()
    steps = len(timeline.computed)
    title = ("Five sequences, step by step, in a cache that is too small", "缓存不够时，五个序列逐步的调度过程")
    sheet = Sheet(980, 400, language, title)
    cell, left = 850 / steps, 110
    sheet.text(20, 30, title, 15, bold=True)
    for i in range(5):
        y = 62 + i * 42
        sheet.text(20, y + 20, (f"sequence {i}", f"序列 {i}"), 13)
        first = next(s for s, tokens in enumerate(timeline.computed) if i in tokens)
        last = max(s for s, tokens in enumerate(timeline.computed) if i in tokens)
        for s, tokens in enumerate(timeline.computed[: last + 1]):
            x, num_tokens = left + s * cell, tokens.get(i, 0)
            if i in timeline.preempted[s]:
                sheet.rect(x, y, cell - 1, 32, RED)
            elif not num_tokens:
                sheet.rect(x, y + 12, cell - 1, 8, EMPTY)
            else:
                height = 8 if num_tokens == 1 else min(12 + num_tokens / 2, 32)
                sheet.rect(x, y + 32 - height, cell - 1, height, COLORS[i], opacity=1 if num_tokens > 1 else 0.6)
            if num_tokens > 1 and (s == first or num_tokens > 3):
                sheet.text(x + cell / 2, y + 29, str(num_tokens), 11, PAPER if i != 4 else INK, anchor="middle")
    y = 290
    sheet.text(20, y + 40, ("free blocks", "空闲块"), 13)
    for s, free in enumerate(timeline.free):
        sheet.rect(left + s * cell, y + 42 - 3 * free, cell - 1, 3 * free, LINE)
    sheet.line((left, y + 43), (left + 850, y + 43))
    sheet.text(left + 850, y - 4, str(timeline.free[-1]), 11, MUTED, anchor="end")
    sheet.text(left, y + 60, ("step 0", "第 0 步"), 11, MUTED)
    sheet.text(left + 850, y + 60, (f"step {steps - 1}", f"第 {steps - 1} 步"), 11, MUTED, anchor="end")
    note = (
        "tall: a chunk and its tokens; low: a decode; grey: waits; red: preempted. 14 blocks of 16, 40 tokens a step.",
        "高：提示的分块及其词元数；矮：解码；灰：等待；红：被抢占。14 块，每块 16 个词元，每步最多 40 个",
    )
    sheet.text(20, 386, note, 12, MUTED)
    return sheet.svg()
