"""Clients of a server that measure it: a process with an event loop and plain sockets, which cost little per token.

Run by `benchmarks/serving.py`: reads requests from stdin as JSON, each with the time at which to send it, and how many
may run at once; says "ready", reads the time that theirs count from, and writes a JSON list of what came back.
"""

import asyncio
import json
import sys
import time
from typing import Any


async def ask(port: int, start: float, request: dict[str, Any]) -> dict[str, Any]:
    """Send one request at its time. Returns when each chunk came, in seconds after the sending."""
    await asyncio.sleep(max(0.0, start + request["at"] - time.time()))
    body = json.dumps(request["body"]).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
    status = int((await reader.readline()).split()[1])
    times, texts, num_tokens, leave_after = [], [], 0, request.get("leave_after")
    try:
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                if status != 200 and line.startswith(b"{"):
                    return {"status": status, "error": line.decode()}
                continue
            found = line.rfind(b'"completion_tokens":')
            if found >= 0 and b'"choices":[]' in line:
                num_tokens = int(line[found + 20 :].split(b",")[0].split(b"}")[0])
            elif b'"choices":[{' in line:
                times.append(time.perf_counter() - began)
                if request.get("keeps_text"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
            if leave_after is not None and len(times) >= leave_after:
                return {"status": status, "times": times, "has_left": True}
        end = {"num_tokens": num_tokens, "text": "".join(texts), "end": time.time() - start}
        return {"status": status, "times": times} | end
    finally:
        writer.close()


async def main() -> None:
    work = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    turns = asyncio.Semaphore(work["at_once"] or len(work["requests"]))

    async def ask_in_turn(request: dict[str, Any]) -> dict[str, Any]:
        async with turns:
            return await ask(work["port"], start, request)

    json.dump(await asyncio.gather(*map(ask_in_turn, work["requests"])), sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
