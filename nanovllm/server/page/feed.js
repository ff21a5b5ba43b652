// Talks to the engine's server: the feed of steps, which is open only while somebody looks, and the controls.
//
// The feed is fetched, not an EventSource, since that one cannot send the header of an API key.

const RETRY_MS = 2000;

// `key`: the server's API key, if it wants one.
export function createServer() {
  return { key: "" };
}

// Sends a request; `body` makes it a POST. Throws an Error with `status` when the server refuses.
export async function call(server, path, body = undefined, signal = undefined) {
  const headers = {
    ...(server.key && { Authorization: `Bearer ${server.key}` }),
    ...(body && { "Content-Type": "application/json" }),
  };
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    signal,
    body: body && JSON.stringify(body),
    cache: "no-store",
  });
  if (response.ok) return response;
  const text = await response.text();
  throw Object.assign(new Error(messageOf(text) || response.statusText), { status: response.status });
}

function messageOf(text) {
  return text.startsWith("{")
    ? (JSON.parse(text).error?.message ?? JSON.parse(text).detail ?? text)
    : text.slice(0, 200);
}

// The `data:` of each event of a response's stream, as text.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    await reader.cancel(); // a reader that leaves early closes the connection
  }
}

// Keeps the feed open while the page is visible. `take(object)` gets what comes; `tell("open"|"closed"|"lost", error)`.
export function openFeed(server, take, tell) {
  let abort = null;

  async function read() {
    abort = new AbortController();
    const { signal } = abort;
    while (!signal.aborted) {
      try {
        const response = await call(server, "page/trace", undefined, signal);
        tell("open");
        for await (const data of eventsOf(response)) take(JSON.parse(data));
      } catch (error) {
        if (signal.aborted) return;
        tell("lost", error);
        if (error.status === 401 || error.status === 404) return;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  function look() {
    if (document.hidden) {
      abort?.abort();
      abort = null;
      tell("closed");
    } else if (!abort) read();
  }

  document.addEventListener("visibilitychange", look);
  look();
  return () => {
    document.removeEventListener("visibilitychange", look);
    abort?.abort();
  };
}
