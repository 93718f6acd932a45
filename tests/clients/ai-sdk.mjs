// The AI SDK's own client of one major version, told a line of JSON at a time what to do: see tests/ai_sdk.py.
import { createInterface } from "node:readline";

const ai = await import(process.argv[2]);
const chats = new Map();

class Chat extends ai.AbstractChat {
  constructor({ id, url, headers, body, messages, resubmit }) {
    const watchers = new Set();
    const look = () => watchers.forEach((watcher) => watcher());
    const state = {
      status: "ready",
      error: undefined,
      messages,
      pushMessage: (message) => ((state.messages = [...state.messages, message]), look()),
      popMessage: () => (state.messages = state.messages.slice(0, -1)),
      replaceMessage: (at, message) => ((state.messages = state.messages.with(at, structuredClone(message))), look()),
      snapshot: (thing) => structuredClone(thing),
    };
    const requests = [];
    super({
      id,
      state,
      transport: new ai.DefaultChatTransport({
        api: url,
        headers,
        body,
        fetch: async (...request) => {
          const response = await fetch(...request);
          requests.push({ url: String(request[0]), method: request[1].method, status: response.status });
          return response;
        },
      }),
      onData: (part) => this.data.push(part),
      ...(resubmit ? { sendAutomaticallyWhen: ai.lastAssistantMessageIsCompleteWithToolCalls } : {}),
    });
    Object.assign(this, { kept: state, watchers, requests, data: [], pending: Promise.resolve() });
  }

  get told() {
    const { status, error, messages } = this.kept;
    return { status, error: error?.message ?? null, messages, requests: this.requests, data: this.data };
  }

  until(text) {
    return new Promise((resolve) => {
      const look = () => JSON.stringify(this.kept.messages).includes(text) && (this.watchers.delete(look), resolve());
      this.watchers.add(look);
      look();
    });
  }
}

const does = {
  open: (chat, asked) => chats.set(asked.chat, new Chat(asked)),
  start: (chat, { message, options }) => void (chat.pending = chat.sendMessage(message, options)),
  send: (chat, { message, options }) => chat.sendMessage(message, options),
  regenerate: (chat, { options }) => chat.regenerate(options),
  resume: (chat) => chat.resumeStream(),
  begin_to_resume: (chat) => void (chat.pending = chat.resumeStream()),
  stop: (chat) => chat.stop(),
  until: (chat, { text }) => chat.until(text),
  wait: (chat) => chat.pending,
  look: () => {},
};

for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  let answer;
  try {
    if (asked.do === "check") {
      const schema = typeof ai.uiMessageChunkSchema === "function" ? ai.uiMessageChunkSchema() : ai.uiMessageChunkSchema;
      const results = await Promise.all(asked.chunks.map((chunk) => schema.validate(chunk)));
      const wrong = asked.chunks.filter((_, at) => !results[at].success);
      const messages = asked.messages.length ? await ai.safeValidateUIMessages({ messages: asked.messages }) : {};
      answer = { wrong, messages: messages.error ? String(messages.error) : null };
    } else {
      await does[asked.do](chats.get(asked.chat), asked);
      answer = chats.get(asked.chat).told;
    }
  } catch (error) {
    answer = { thrown: String(error?.stack ?? error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
