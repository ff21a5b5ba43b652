"""The tour's pictures of what was measured on GPUs. `docs/tour/figures.json` has the figures, each with its source."""

import json
from pathlib import Path
from typing import Any

import torch

import benchmarks.roofline
from benchmarks.ceilings import Ceilings
from benchmarks.model_shape import model_shape
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from tools.tour_memory_pictures import headline
from tools.tour_svg import COLORS, LINE, MUTED, PAPER, Sheet, Words

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "tour" / "figures.json"
SHAPES = ROOT / "benchmarks" / "shapes"


def figures(name: str) -> dict[str, Any]:
    """Measured figures of that name, with their source."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))[name]


WITHOUT: dict[str, Words] = {
    "everything on": ("everything on", "全部开启"),
    "overlap": ("no overlap of host and device", "关闭主机与设备的重叠"),
    "CUDA graphs": ("no CUDA graphs", "关闭 CUDA graph"),
    "prefix cache": ("no prefix cache", "关闭前缀缓存"),
    "fused kernels": ("no fused kernels: plain PyTorch", "不用融合内核：普通 PyTorch"),
    "small-batch linear": ("no small-batch linear kernel", "关闭小批量线性内核"),
    "early launch": ("no early launch", "关闭提前启动"),
}


def ablation(language: str) -> str:
    """Chapter 6: what remains with one optimization off at a time, as it was measured."""
    measured = figures("ablation")
    title = ("One optimization off at a time, one H200", "逐项关闭优化，一张 H200")
    sheet = Sheet(980, 360, language, title)
    sheet.text(20, 30, title, 15, bold=True)
    panels = (("headline", ("256 requests", "256 个请求"), 270), ("one stream", ("one stream", "单个请求"), 630))
    for key, head, x in panels:
        values = measured[key]
        sheet.text(x, 56, (f"{head[0]}, tok/s", f"{head[1]}，tok/s"), 13, bold=True)
        for i, name in enumerate(WITHOUT):
            (rate, percent), y = values[name], 66 + i * 36
            sheet.rect(x, y, 2.2 * percent, 26, COLORS[2] if i == 0 else COLORS[0], opacity=0.8)
            sheet.text(x + 2.2 * percent + 6, y + 18, f"{rate:,} · {percent} %", 12)
    for i, words in enumerate(WITHOUT.values()):
        sheet.text(20, 84 + i * 36, words, 13)
    note = (
        f"per cent: of the rate with everything on. Measured: {measured['source']}",
        f"百分比：相对于全部开启时。实测见 {measured['source']}",
    )
    sheet.text(20, 346, note, 12, MUTED)
    return sheet.svg()


def ranks(language: str) -> str:
    """Chapter 8: where each matrix is cut, and what the sum costs, as it was measured."""
    title = ("One sum for two matrices, and what it costs", "两个矩阵只求一次和，以及它的代价")
    sheet = Sheet(980, 400, language, title)
    hidden, inner = 4096, 12288  # Qwen3-8B's MLP
    with torch.device("meta"):
        up = [ColumnParallelLinear(hidden, inner, TensorParallel(r, 2)).weight.shape for r in range(2)]
        down = [RowParallelLinear(inner, hidden, TensorParallel(r, 2)).weight.shape for r in range(2)]
    head = ("Qwen3-8B's MLP on two ranks", "Qwen3-8B 的 MLP，两个 rank")
    sheet.text(20, 30, head, 15, bold=True)
    for r in range(2):
        y = 66 + r * 150
        sheet.text(20, y - 6, f"rank {r}", 13, bold=True)
        sheet.rect(20, y, 60, 90, COLORS[5], LINE, 0.4, 4)
        sheet.text(50, y + 49, "x", 14, bold=True, anchor="middle")
        for x, shape, words in (
            (110, up[r], ("cut by columns", "列并行")),
            (270, down[r], ("cut by rows", "行并行")),
        ):
            sheet.rect(x, y, 124, 90, COLORS[r], LINE, 0.45, 4)
            sheet.text(x + 62, y + 38, words, 13, bold=True, anchor="middle")
            sheet.text(x + 62, y + 58, f"[{shape[0]}, {shape[1]}]", 12, anchor="middle")
        sheet.line((80, y + 45), (108, y + 45), tip=True)
        sheet.line((234, y + 45), (268, y + 45), tip=True)
        sheet.line((394, y + 45), (430, 186), tip=True)
        sheet.text(
            252, y + 108, ("its own share: no communication", "只用自己的一份：无通信"), 11, MUTED, anchor="middle"
        )
    sheet.rect(432, 160, 92, 52, COLORS[4], LINE, 0.6, 4)
    sheet.text(478, 183, "all-reduce", 13, bold=True, anchor="middle")
    sheet.text(478, 201, "PartialSum", 11, anchor="middle")
    for y in (111, 261):
        sheet.line((524, 186), (546, 186 + (y - 186) // 2), tip=True)
    sheet.text(478, 232, ("both get the sum", "两边都得到和"), 11, MUTED, anchor="middle")
    measured = figures("all_reduce")
    left, base = 600, 330
    line = ("µs of a sum with its norm, 2 H200s", "求和连同归一化的时间（µs），2 张 H200")
    sheet.text(left - 20, 30, line, 15, bold=True)
    for i, num_rows in enumerate(measured["rows"]):
        x = left + i * 90
        for j, name in enumerate(("NCCL and norm", "one kernel")):
            value = measured[name][i]
            sheet.rect(x + j * 34, base - 8.5 * value, 30, 8.5 * value, COLORS[6] if j == 0 else COLORS[2], opacity=0.8)
            sheet.text(x + j * 34 + 15, base - 8.5 * value - 5, f"{value}", 11, anchor="middle")
        sheet.text(x + 32, base + 18, f"{num_rows} × 4,096", 11, MUTED, anchor="middle")
    sheet.line((left - 10, base), (left + 345, base))
    sheet.rect(left - 20, 48, 12, 12, COLORS[6], opacity=0.8)
    sheet.text(left - 2, 58, ("NCCL, then the norm", "NCCL，再做归一化"), 12)
    sheet.rect(left + 160, 48, 12, 12, COLORS[2], opacity=0.8)
    sheet.text(left + 178, 58, ("both in one kernel", "两者合为一个内核"), 12)
    sheet.text(left + 168, base + 36, ("tokens × features", "词元数 × 特征数"), 11, MUTED, anchor="middle")
    note = (
        f"sizes: of the stored weights, [output, input] features. Measured: {measured['source']}",
        f"方括号内是所存权重的形状 [输出特征, 输入特征]。实测见 {measured['source']}",
    )
    sheet.text(20, 388, note, 12, MUTED)
    return sheet.svg()


def least_seconds(read: float, matmul: float) -> dict[str, float]:
    """What the benchmark takes at least with Qwen3-0.6B, at so many TB/s and TFLOP/s."""
    lengths = headline()
    ceilings = Ceilings(read * 1e12, 0, matmul * 1e12)
    line = benchmarks.roofline.roofline(
        model_shape(SHAPES / "qwen3-0.6b", 2), [n for n, _ in lengths], [n for _, n in lengths], ceilings
    )
    return {"keys and values": line.kv_read_s, "weights": line.weight_read_s, "prompts": line.prefill_s}


def roofline(language: str) -> str:
    """Chapter 9: what the roofline is made of, and how near engines come to it, as it was measured."""
    measured = figures("roofline")
    title = ("The benchmark's roofline, and which share of it engines reach", "基准测试的屋顶线，各引擎达到多少")
    sheet = Sheet(980, 330, language, title)
    sheet.text(20, 30, title, 15, bold=True)
    words = {
        "keys and values": ("reading keys and values", "读取键和值"),
        "weights": ("reading weights", "读取权重"),
        "prompts": ("computing prompts", "计算提示"),
    }
    seconds = least_seconds(measured["read TB/s"], measured["matmul TFLOP/s"])
    least = sum(seconds.values())
    x, scale = 180.0, 720 / least
    sheet.text(20, 74, (f"at least {least:.1f} s", f"至少 {least:.1f} s"), 13)
    for i, value in enumerate(seconds.values()):
        sheet.rect(x, 54, value * scale, 30, COLORS[i], PAPER, 0.8)
        x += value * scale
    for i, (name, value) in enumerate(seconds.items()):
        sheet.rect(180 + i * 260, 96, 12, 12, COLORS[i], opacity=0.8)
        sheet.text(198 + i * 260, 107, (f"{words[name][0]}, {value:.2f} s", f"{words[name][1]}，{value:.2f} s"), 12)
    for i, (name, share) in enumerate(measured["percent"].items()):
        y = 136 + i * 40
        label = ("upstream nano-vLLM", "上游 nano-vLLM") if name == "upstream" else name
        sheet.text(20, y + 19, label, 13)
        sheet.rect(180, y, 7.2 * share, 28, COLORS[2 if i == 0 else 5], opacity=0.8)
        sheet.text(186 + 7.2 * share, y + 19, f"{share:g} %", 12)
    sheet.line((900, 48), (900, 296), dashed=True)
    sheet.text(906, 150, "100 %", 12, MUTED)
    note = (
        f"one H100; the seconds are of nano-vLLM's run; each share is of its own run's roofline, some on another day "
        f"({measured['source']})",
        f"一张 H100；秒数取自 nano-vLLM 那次运行；各比例都相对自己那次运行的屋顶线，有的测于另一天"
        f"（{measured['source']}）",
    )
    sheet.text(20, 318, note, 12, MUTED)
    return sheet.svg()
