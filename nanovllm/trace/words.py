"""An event in words, English and Chinese."""

from nanovllm.engine.step_trace import Event

ENDS = {
    "stop": ("it has drawn a stop token or a stop string", "生成了停止词元或停止字符串"),
    "length": ("it has reached its maximum length", "达到了最大长度"),
    "error": ("its logits gave no token", "它的 logits 给不出词元"),
    "abort": ("", ""),
}


def words(event: Event) -> dict[str, str]:
    """{"en": …, "zh": …}. Raises KeyError for an event that the tracer does not make."""
    name, data = event.name, event.data
    match event.what:
        case "arrive":
            en, zh = f"{name} arrives and joins the end of the queue.", f"{name} 到达，排到等待队列末尾。"
        case "admit":
            n = len(data["blocks"])
            en = f"{name} is admitted: its prompt has room in {_blocks(n)}."
            zh = f"{name} 被接纳：它的提示占用 {n} 个块。"
        case "hit":
            n, tokens = len(data["blocks"]), data["tokens"]
            en = f"The cache has the beginning of {name}: it takes {_blocks(n)} as they are, {tokens} tokens for free."
            zh = f"前缀命中：缓存中已有 {name} 的开头，直接共用 {n} 个块，{tokens} 个词元无需计算。"
        case "chunk":
            start, end, of = data["from"], data["to"], data["of"]
            en = f"A chunk of {name}'s prompt, tokens {start} to {end} of {of}: that is all the step's budget allows."
            zh = f"{name} 的提示的一个分块：第 {start} 到 {end} 个词元，共 {of} 个。这一步的预算只够这么多。"
            if end == of:
                en = f"The last chunk of {name}'s prompt, tokens {start} to {end} of {of}."
                zh = f"{name} 的提示的最后一个分块：第 {start} 到 {end} 个词元，共 {of} 个。"
        case "preempt":
            n = len(data["blocks"])
            en = f"No block is free, so {name}, the latest arrival, is preempted and gives {_blocks(n)} back."
            zh = f"没有空闲块了：最晚到达的 {name} 被抢占，交还 {n} 个块。"
        case "evict":
            block = data["block"]
            en = f"Block {block} gets a new owner; what was cached in it is lost."
            zh = f"块 {block} 换了主人，其中缓存的内容被驱逐。"
        case "finish":
            en, zh = ENDS[data["reason"]]
            en, zh = f"{name} is finished: {en}.", f"{name} 完成：{zh}。"
        case "abort":
            en, zh = f"{name} is aborted.", f"{name} 被中止。"
        case what:
            raise KeyError(what)
    return {"en": en, "zh": zh}


def _blocks(number: int) -> str:
    return "1 block" if number == 1 else f"{number} blocks"
