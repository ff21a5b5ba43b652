// The chat beside the engine: the same streaming API that every client of the server uses.

import { chip } from "./colors.js";
import { h, replace } from "./dom.js";
import { call, eventsOf } from "./feed.js";
import { say } from "./i18n.js";

// Builds the chat into `root`; returns the function that shows it in the language of now.
export function chatPanel(root, app) {
  let messages = [],
    abort = null,
    error = "";
  const log = h("ol", { class: "chat-log", "aria-live": "polite" });
  const input = h("textarea", { rows: 2, id: "ask", enterkeyhint: "send" });
  const send = h("button", { class: "primary", id: "send" });
  const fresh = h("button", {
    type: "button",
    id: "new-chat",
    onclick: () => {
      abort?.abort();
      messages = [];
      show();
    },
  });
  const form = h(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        if (abort) abort.abort();
        else if (input.value.trim()) ask(input.value.trim());
      },
    },
    input,
    h("div", { class: "row" }, send, fresh),
  );
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!abort) form.requestSubmit();
    }
  });
  root.append(log, form);

  async function ask(text) {
    const history = [...messages, { role: "user", content: text }].map(({ role, content }) => ({ role, content }));
    // The engine names requests in order of arrival: the next new one with this text is ours.
    const answer = {
      role: "assistant",
      content: "",
      thought: "",
      name: null,
      prompt: text,
      known: app.knownRequests(),
    };
    messages.push({ role: "user", content: text }, answer);
    input.value = "";
    error = "";
    abort = new AbortController();
    show();
    try {
      const body = { model: app.model, messages: history, stream: true };
      for await (const data of eventsOf(await call(app.server, "v1/chat/completions", body, abort.signal))) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data),
          delta = chunk.choices?.[0]?.delta ?? {};
        if (chunk.error) throw new Error(chunk.error.message);
        answer.content += delta.content ?? "";
        answer.thought += delta.reasoning_content ?? "";
        show();
      }
    } catch (failure) {
      if (failure.name !== "AbortError") error = say("refused", { error: failure.message });
    }
    abort = null;
    show();
  }

  function show() {
    input.placeholder = say("chat.placeholder");
    input.setAttribute("aria-label", say("chat.placeholder"));
    send.textContent = say(abort ? "chat.stop" : "chat.send");
    fresh.textContent = say("chat.new");
    fresh.hidden = !messages.length;
    replace(
      log,
      messages.map((message, i) => {
        if (message.role === "assistant") message.name ??= app.findRequest(message);
        return h(
          "li",
          { class: message.role },
          h(
            "div",
            { class: "quiet small" },
            say(message.role === "user" ? "chat.you" : "chat.model"),
            " ",
            message.name &&
              chip(message.name, {
                "data-key": `chat-${i}`,
                title: say("chat.blocks", { name: message.name }),
                onclick: () => app.select(message.name),
              }),
          ),
          message.thought && h("p", { class: "quiet text" }, message.thought),
          h("p", { class: "text" }, message.content),
        );
      }),
      error && h("li", { class: "error", role: "alert" }, error),
    );
    log.scrollTop = log.scrollHeight;
  }
  return show;
}
