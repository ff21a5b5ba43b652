"""The tour's pictures of what the device does, from the engine's own functions, run on the CPU."""

from dataclasses import dataclass
from math import log10
from typing import Any

import torch

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts
from nanovllm.kernels.prepare_inputs import StepInputs, prepare_inputs
from nanovllm.kernels.sampling.gumbel_noise import gumbel, noise_bits, noise_keys, spread_indices
from nanovllm.step_plan import NewRow, StepPlan
from nanovllm.worker.cuda_graph import StepShape
from nanovllm.worker.input_batch import InputBatch
from tools.tour_memory_pictures import finish_step, make_sequence
from tools.tour_svg import COLORS, EMPTY, INK, LINE, MUTED, Sheet

BLOCK, NUM_BLOCKS = 8, 12
TABLES = [[4, 9, 1], [7, 2]]
COMPUTED, NEW = [20, 8], [1, 5]  # the first sequence decodes, the second computes a chunk


def slots_of_a_step() -> tuple[list[int], list[int], list[int]]:
    """(positions, slots, lengths) that `prepare_inputs` makes of one decode and one chunk."""
    tables = torch.zeros(1, 2, 3, dtype=torch.int32)
    for row, table in enumerate(TABLES):
        tables[0, row, : len(table)] = torch.tensor(table)
    inputs = StepInputs.allocate(sum(NEW), 2, 1, "cpu")
    rows, ends = torch.arange(2, dtype=torch.int32), torch.tensor([0, *NEW]).cumsum(0).int()
    ids, computed = torch.zeros(2, 32, dtype=torch.int32), torch.tensor(COMPUTED, dtype=torch.int32)
    prepare_inputs(rows, ends, ids, computed, tables, BLOCK, inputs)
    return inputs.positions.tolist(), inputs.slot_mapping[0].tolist(), inputs.seq_lens.tolist()


def splits_of(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(sequence, begin, end) of each program's part of the contexts, in the order in which the device starts them."""
    splits = DecodeSplits.allocate(len(lengths), 1, 1, 8, "cpu", target_splits=8, min_split=256)
    split_contexts(torch.tensor(lengths, dtype=torch.int32), 1, splits)
    return [(seq, begin, end) for seq, begin, end, *_ in splits.table.tolist() if seq >= 0]


def attention(language: str) -> str:
    """Chapter 4: a step's tokens go to their slots; contexts are read in splits."""
    title = ("Tokens to slots, and contexts in splits", "词元写入槽位，上下文切段读取")
    sheet = Sheet(980, 520, language, title)
    positions, slots, lengths = slots_of_a_step()
    head = ("a step's six tokens: one decode of A, a chunk of five of B", "这一步的六个词元：A 解码一个，B 预填充五个")
    sheet.text(20, 30, head, 15, bold=True)
    tokens = [("A", 0)] * NEW[0] + [("B", 1)] * NEW[1]
    place = {block: 20 + block * 79 for block in range(NUM_BLOCKS)}
    for i, ((name, seq), position, slot) in enumerate(zip(tokens, positions, slots, strict=True)):
        x = 150 + i * 120
        sheet.rect(x, 44, 106, 44, COLORS[seq], LINE, 0.55, 4)
        sheet.text(x + 53, 62, (f"{name}, position {position}", f"{name}，位置 {position}"), 12, anchor="middle")
        sheet.text(x + 53, 80, (f"slot {slot}", f"槽位 {slot}"), 12, bold=True, anchor="middle")
        target = place[slot // BLOCK] + 4 + slot % BLOCK * 8.6
        sheet.line((x + 53, 88), (target, 170), tip=True)
    for block, x in place.items():
        sheet.rect(x, 174, 75, 34, EMPTY, LINE)
        sheet.text(x + 37, 224, str(block), 12, MUTED, anchor="middle")
        for seq, table in enumerate(TABLES):
            if block in table:
                start = table.index(block) * BLOCK
                for offset in range(min(max(lengths[seq] - start, 0), BLOCK)):
                    new = start + offset >= COMPUTED[seq]
                    sheet.rect(x + 3 + offset * 8.6, 178, 7.6, 26, COLORS[seq], opacity=1 if new else 0.35)
    tables = f"A {TABLES[0]}, B {TABLES[1]}"
    under = (
        f"the cache: 12 blocks of 8 slots; block tables {tables}; slot = block · 8 + position mod 8",
        f"缓存：12 块，每块 8 个槽位；块表 {tables}；槽位 = 块号 · 8 + 位置 mod 8",
    )
    sheet.text(20, 248, under, 12, MUTED)
    contexts = [2000, 700, 300, 90]
    parts = splits_of(contexts)
    head = (
        f"another step, four decodes: {len(parts)} programs for each key/value head, long splits first",
        f"另一步，四个解码：每个键/值头 {len(parts)} 个 program，长段先启动",
    )
    sheet.text(20, 290, head, 15, bold=True)
    for seq, length in enumerate(contexts):
        y = 308 + seq * 44
        sheet.text(20, y + 20, (f"{length:,} tokens", f"{length:,} 个词元"), 13)
        for order, (owner, begin, end) in enumerate(parts):
            if owner == seq:
                x, width = 130 + begin * 0.37, (end - begin) * 0.37 - 3
                sheet.rect(x, y, width, 30, COLORS[seq], LINE, 0.5, 3)
                sheet.text(x + width / 2, y + 20, str(order), 12, bold=True, anchor="middle")
        if sum(owner == seq for owner, *_ in parts) > 1:
            sheet.text(880, y + 20, ("then merged", "最后合并"), 12, MUTED)
    note = (
        "the numbers are the order of the start; slots and splits by the engine's prepare_inputs and split_contexts",
        "数字是启动次序；槽位和分段由引擎的 prepare_inputs 与 split_contexts 算出",
    )
    sheet.text(20, 506, note, 12, MUTED)
    return sheet.svg()


class CountingBatch(InputBatch):
    """Rows that count the numbers which the host sends for them."""

    sent = 0

    def _send_batch(self, plan: StepPlan, slot: int, shape: StepShape) -> None:
        self.sent += 2 * len(plan.rows)
        super()._send_batch(plan, slot, shape)

    def _contents(self, new: NewRow) -> list[tuple[int, Any]]:
        contents = super()._contents(new)
        self.sent += 2 * sum(len(values) for _, values in contents)  # each with its index
        return contents


@dataclass(slots=True)
class Traffic:
    """What the host sent in a step, as numbers of 32 bits, and how many tokens the device computed."""

    sent: int
    tokens: int


def traffic() -> list[Traffic]:
    """Six requests of 60 to 160 tokens with 40 to 90 of answer, blocks of 16 tokens, 256 tokens a step."""
    manager = BlockManager(256, 16)
    scheduler = Scheduler(manager, max_num_seqs=8, max_num_batched_tokens=256)
    batch = CountingBatch(8, 512, 32, "cpu", 2)
    for i in range(6):
        scheduler.add(make_sequence(i, [i] * (60 + 20 * i), 40 + 10 * i))
    steps = []
    while scheduler.running or scheduler.waiting:
        step, batch.sent = scheduler.schedule(), 0
        batch.apply(step.plan, len(steps) % 2, StepShape.of(step.plan))
        batch.sent += 2 * len(step.plan.new_blocks)
        steps.append(Traffic(batch.sent, step.plan.num_tokens))
        finish_step(scheduler, step)
    return steps


def rows(language: str) -> str:
    """Chapter 5: the numbers that the host sends in each step of a small run."""
    steps = traffic()
    silent = sum(not step.sent for step in steps)
    title = ("What the host sends, step by step", "主机每一步发送的数据")
    sheet = Sheet(980, 330, language, title)
    sheet.text(20, 30, title, 15, bold=True)
    line = (
        f"six requests, {sum(step.tokens for step in steps):,} tokens computed in {len(steps)} steps; "
        f"in {silent} of them the host sends nothing",
        f"六个请求，{len(steps)} 步共计算 {sum(step.tokens for step in steps):,} 个词元；"
        f"其中 {silent} 步主机什么也不发送",
    )
    sheet.text(20, 52, line, 13, MUTED)
    cell, base = 900 / len(steps), 270
    for power in range(4):
        y = base - 16 - 44 * power
        sheet.line((60, y), (960, y), color=EMPTY)
        sheet.text(54, y + 4, f"{10**power:,}", 11, MUTED, anchor="end")
    for i, step in enumerate(steps):
        x = 60 + i * cell
        if step.sent:
            height = 16 + 44 * log10(step.sent)
            sheet.rect(x, base - height, cell - 1.5, height, COLORS[1 if step.tokens > 8 else 0])
    sheet.line((60, base), (960, base))
    sheet.text(60, base + 18, ("step 0", "第 0 步"), 11, MUTED)
    sheet.text(960, base + 18, (f"step {len(steps) - 1}", f"第 {len(steps) - 1} 步"), 11, MUTED, anchor="end")
    note = (
        "numbers of 32 bits, on a logarithmic scale. Orange: prompts enter; blue: a new block, or another list of rows",
        "纵轴：32 位数的个数，对数刻度。橙：提示进入；蓝：新块，或活跃行的列表有变化。由引擎的 InputBatch 统计",
    )
    sheet.text(20, 318, note, 12, MUTED)
    return sheet.svg()


LOGITS = [3.0, 2.4, 1.8, 1.0, 0.5, 0.0, -0.5, -1.0]


def noise_at(seed: int, position: int) -> list[float]:
    """The noise of each token of a small vocabulary, by the engine's hash."""
    keys = noise_keys(*(torch.tensor([value], dtype=torch.int32) for value in (seed, 0, position)))
    return gumbel(noise_bits(spread_indices(len(LOGITS), torch.device("cpu")), *keys)).tolist()


def sampler(language: str) -> str:
    """Chapter 7: logit + noise, and the largest wins; the noise is a function of seed and position."""
    title = ("A draw is an argmax: logit + noise", "采样即取最大：logit + 噪声")
    sheet = Sheet(980, 340, language, title)
    sheet.text(20, 30, title, 15, bold=True)
    for panel, (seed, position) in enumerate(((7, 100), (7, 101), (7, 102), (8, 100))):
        left, noise = 20 + panel * 240, noise_at(seed, position)
        scores = [x + g for x, g in zip(LOGITS, noise, strict=True)]
        best = max(range(len(scores)), key=scores.__getitem__)
        words = (f"seed {seed}, position {position}", f"种子 {seed}，位置 {position}")
        sheet.text(left, 60, words, 13, bold=True)
        zero = 230
        sheet.line((left, zero), (left + 212, zero))
        for i, (logit, g) in enumerate(zip(LOGITS, noise, strict=True)):
            x, top, end = left + 2 + i * 26, zero - 20 * logit, zero - 20 * (logit + g)
            sheet.rect(x, min(zero, top), 10, abs(20 * logit), COLORS[0], opacity=0.75)
            sheet.rect(x + 10, min(top, end), 10, abs(20 * g), COLORS[1], opacity=0.85)
            if i == best:
                sheet.rect(x - 2, end - 6, 24, 4, INK)
                sheet.text(x + 10, end - 10, str(i), 12, bold=True, anchor="middle")
            sheet.text(x + 10, 282, str(i), 11, MUTED, anchor="middle")
        sheet.text(left, 306, (f"drawn: token {best}", f"抽中：词元 {best}"), 13)
    note = (
        "under each pair its token's id; blue: the logits, equal in all four; orange: the engine's noise, up or down",
        "横轴：词元 id；蓝：logit，四幅相同；橙：引擎的噪声，叠加其上，可正可负",
    )
    sheet.text(20, 326, note, 12, MUTED)
    return sheet.svg()
