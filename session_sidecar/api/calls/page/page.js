// The page of a session-sidecar: conversations, their forks as a tree, answers as they come. It uses the public calls
// alone. Whatever was said is text here and never markup: nothing in this file makes HTML of a string.

// 1. Where we are. What is shown is in the fragment of the URL, which is sent to nobody.

const BASE = new URL("..", import.meta.url); // of the API: it may be mounted below a prefix
const GONE = "The connection was lost for too long to follow this answer. What is here is what the transcript has.";
const LOST = "The transcript of this thread was lost: a new session has begun in its place.";
const PAGE = 50; // messages at a time, the last ones first
const SILENCE = 20_000; // ms: pings come every few seconds, so that is a dead connection
const MOST_RAW = 1000; // events kept to look at
const STRANGER = "me"; // the resource of whoever has none yet
const NAMES = ["resource", "thread", "compare", "q"];

const $ = (id) => document.getElementById(id);
const where = () => {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(NAMES.map((name) => [name, given.get(name) ?? ""]));
};

/** Show something else: what is not named stays. A thread that is left takes what it was compared with along. */
function go(changes, { replace = false, ...how } = {}) {
  const next = { ...where(), ...("thread" in changes ? { compare: "" } : {}), ...changes };
  const kept = new URLSearchParams(NAMES.filter((name) => next[name]).map((name) => [name, next[name]]));
  const url = kept.size ? `#${kept}` : location.pathname + location.search;
  history[replace ? "replaceState" : "pushState"](null, "", url);
  return show(how);
}

/** An element: `tag.class`, its properties and attributes (`onclick` is listened for), and what is in it, as text. */
function h(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node) node[key] = value;
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);
const quiet = (text, onclick, props = {}) => button(text, onclick, { className: "quiet", ...props });
const submit = (text, kind = "main") => h(`button.${kind}`, { type: "submit" }, text);
const field = (label, name, props = {}) =>
  h("label.field", {}, h("span", {}, label), h("input", { name, autocomplete: "off", spellcheck: false, ...props }));

// 2. The calls, and the token: it is kept for this tab, and is in no URL.

const KEPT = `session-sidecar token of ${BASE.pathname}`;
let token = sessionStorage.getItem(KEPT);
let asking = null; // the one question that is open, however many calls wait for its answer

/** What the sidecar refused, and what to do about it. */
class Problem extends Error {
  constructor(status, told) {
    super(told.detail ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: told.code ?? "", title: told.title ?? "", requestId: told.request_id });
    const fields = (told.errors ?? []).map(({ field, message }) => `${field} ${message}`);
    if (fields.length) this.message += ` ${fields.join("; ")}.`;
  }
}

const toldOf = (error) =>
  error instanceof Problem ? error.message : `The sidecar cannot be reached (${error.message}).`;

async function request(method, path, { query = {}, body, headers = {}, signal } = {}) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(query)) {
    if (value !== "" && value !== null && value !== undefined) url.searchParams.set(name, value);
  }
  for (;;) {
    const sent = token;
    const response = await fetch(url, {
      method,
      signal,
      cache: "no-store",
      headers: {
        ...headers,
        ...(body ? { "content-type": "application/json" } : {}),
        ...(sent ? { authorization: `Bearer ${sent}` } : {}),
      },
      body: body && JSON.stringify(body),
    });
    if (response.ok) return response;
    const problem = new Problem(response.status, await response.json().catch(() => ({})));
    if (response.status !== 401) throw problem;
    if (sent === token && !(await askForToken(sent !== null))) throw problem;
  }
}

async function call(method, path, options) {
  const response = await request(method, path, { ...options, headers: { accept: "application/json" } });
  return response.status === 204 ? null : response.json();
}

function askForToken(refused) {
  asking ??= ask({
    title: "This sidecar asks for a token",
    text: `${refused ? "The last one is not known, or has expired. " : ""}It is kept in this tab until that is closed.`,
    fields: [field("Token", "token", { type: "password", required: true })],
    yes: "Use it",
  }).then((given) => {
    asking = null;
    if (given === null) return false;
    keepToken(given.token.trim());
    return true;
  });
  return asking;
}

function keepToken(text) {
  token = text;
  if (text === null) sessionStorage.removeItem(KEPT);
  else sessionStorage.setItem(KEPT, text);
  $("forget").hidden = text === null;
}

// 3. Streams: server-sent events over fetch, which may send a token and goes on after the last event that it had.

const pause = (ms, signal) =>
  new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    addEventListener("online", done);
    signal?.addEventListener("abort", done);
  });

function within(ms, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("nothing has come for too long")), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** The events of a response, as they come. */
async function* parsed(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await within(SILENCE, reader.read());
      if (done) return;
      rest += value;
      if (!value.includes("\n")) continue; // of an event of megabytes
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
        if (fields.data) yield { id: fields.id, name: fields.event, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A stream to its `end`, however often the connection breaks; see docs/reconnecting.md. `told` hears of each break.
    Throws the Problem of a call that is refused. It ends where `signal` says so. */
async function* follow(method, path, { signal, told = () => {}, ...options }) {
  // The key covers a break before the first event, the ID of the last event every later one.
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16)).join("-");
  const headers = { accept: "text/event-stream", ...(options.body ? { "idempotency-key": key } : {}) };
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      const response = await request(method, path, { ...options, headers, signal });
      told("");
      if (response.status === 204) return; // nothing is left
      for await (const event of parsed(response)) {
        wait = 500;
        headers["last-event-id"] = event.id;
        yield event;
        if (event.name === "end") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      // What begins nothing is the caller's to hear; once it has begun, a sidecar that is going away may come back.
      if (error instanceof Problem && (error.status < 500 || !headers["last-event-id"])) throw error;
    }
    if (signal.aborted) return;
    told("The connection is lost. Trying again…");
    await pause(wait, signal);
  }
}

// 4. Text. Paragraphs, lists, headings, code: as much of Markdown as answers need. A link is the text that it is.

function written(text) {
  const found = document.createDocumentFragment();
  const lines = text.split("\n");
  const isItem = (line) => /^\s*(?:[-*+]|\d{1,9}[.)])\s+\S/.exec(line);
  for (let at = 0; at < lines.length; ) {
    const fence = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/.exec(lines[at]);
    if (fence) {
      const isEnd = (line) => line.trim().startsWith(fence[1]) && !line.replaceAll(fence[1][0], "").trim();
      const end = lines.findIndex((line, i) => i > at && isEnd(line));
      const stop = end < 0 ? lines.length : end;
      found.append(code(lines.slice(at + 1, stop).join("\n"), fence[2]));
      at = stop + 1;
    } else if (/^#{1,6}\s/.test(lines[at])) {
      found.append(h("p.heading", { dir: "auto" }, ...inline(lines[at++].replace(/^#+\s+/, ""))));
    } else if (isItem(lines[at])) {
      const ordered = /^\s*\d/.test(lines[at]);
      const items = [];
      for (; at < lines.length && lines[at].trim(); at++) {
        if (isItem(lines[at])) items.push(lines[at].replace(/^(\s*)(?:[-*+]|\d{1,9}[.)])\s+/, "$1"));
        else if (/^ {0,3}(```|~~~)/.test(lines[at])) break;
        else items.push(`${items.pop()}\n${lines[at].trim()}`);
      }
      const list = h(ordered ? "ol" : "ul", { dir: "auto" });
      for (const item of items)
        list.append(h(/^\s{2,}/.test(item) ? "li.deeper" : "li", {}, ...inline(item.trim())));
      found.append(list);
    } else if (!lines[at].trim()) {
      at++;
    } else {
      const start = at;
      const goesOn = (line) => line.trim() && !/^ {0,3}(```|~~~)|^#{1,6}\s/.test(line) && !isItem(line);
      do at++;
      while (at < lines.length && goesOn(lines[at]));
      found.append(h("p", { dir: "auto" }, ...inline(lines.slice(start, at).join("\n"))));
    }
  }
  return found;
}

function inline(text) {
  return text
    .split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)
    .filter(Boolean)
    .map((part) => {
      if (/^`.+`$/.test(part)) return h("code", {}, part.slice(1, -1));
      return /^\*\*.+\*\*$/.test(part) ? h("strong", {}, part.slice(2, -2)) : part;
    });
}

const code = (text, language = "") =>
  h("div.code", {}, language && h("span.language", {}, language), h("pre", { tabIndex: 0 }, h("code", {}, text)));

// 5. What a message holds.

const blocksOf = (message) => {
  const content = message.message.content ?? [];
  return typeof content === "string" ? [{ type: "text", text: content }] : content;
};
const textOf = (message) =>
  blocksOf(message)
    .filter((block) => block.type === "text")
    .map((block) => block.text)
    .join("\n\n");
const holdsResults = (message) => blocksOf(message).some((block) => block.type === "tool_result");
const isPrompt = (message) => message.type === "user" && !holdsResults(message) && !message.synthetic;
const short = (text, most = 80) => {
  const line = text.slice(0, 4 * most).replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
};
const IMAGES = ["image/png", "image/jpeg", "image/gif", "image/webp"];

function picture({ source = {} }) {
  if (source.type === "base64" && IMAGES.includes(source.media_type))
    return h("img", { src: `data:${source.media_type};base64,${source.data}`, alt: "image", loading: "lazy" });
  return h("p.aside", {}, `[image ${source.url ?? source.file_id ?? source.media_type ?? ""}]`);
}

const said = (text) => h("div.said", { dir: "auto" }, text);

/** A block of a person's or the model's, but for tool calls and their results. */
function shown(block, mine) {
  if (block.type === "text") return mine ? said(block.text) : h("div.text", {}, written(block.text));
  if (block.type === "thinking") return h("details.fold", {}, h("summary", {}, "Thinking"), said(block.thinking));
  if (block.type === "image") return picture(block);
  if (block.type === "document") return h("p.aside", {}, `[document ${block.title ?? block.source?.media_type ?? ""}]`);
  return h("details.fold", {}, h("summary", {}, block.type), code(JSON.stringify(block, null, 2), "json"));
}

/** A tool call: folded, with its input, its result, and what a subagent said in it. Parts may come in any order. */
class Tool {
  constructor() {
    this.name = h("b", {}, "Tool");
    this.what = h("span.what", {});
    this.state = h("span.how", {}, "running");
    this.input = h("div", {});
    this.within = h("ol.log.nested", { hidden: true });
    this.result = h("div", {});
    const summary = h("summary", {}, this.name, " ", this.what, " ", this.state);
    this.node = h("details.fold.tool", {}, summary, this.input, this.within, this.result);
  }
  called({ name, input }) {
    this.name.textContent = name;
    const first = Object.values(input ?? {}).find((value) => typeof value === "string");
    this.what.textContent = short(first ?? "", 60);
    this.input.replaceChildren(h("h4", {}, "Input"), code(JSON.stringify(input, null, 2), "json"));
  }
  answered({ content, is_error: failed }, more) {
    this.state.textContent = failed ? "error" : "done";
    this.node.classList.toggle("failed", Boolean(failed));
    const blocks = typeof content === "string" ? [{ type: "text", text: content }] : (content ?? []);
    const parts = blocks.map((block) => (block.type === "text" ? code(block.text) : shown(block)));
    this.result.replaceChildren(h("h4", {}, failed ? "Error" : "Result"), ...parts, more || "");
  }
}

// 6. A conversation: its messages with what can be done at each, and the turn that runs.

const count = (number) => number.toLocaleString("en");
const time = (stamp) => (stamp ? new Date(stamp).toLocaleString([], { dateStyle: "short", timeStyle: "short" }) : "");

/** The last messages of a thread, or the last before one: oldest first. */
const lastMessages = (key, signal, query = {}) =>
  call("GET", "v1/session/messages", { query: { ...key, order: "desc", limit: PAGE, ...query }, signal });

class Pane {
  /** `beside` is the one that something is compared with: it is only read. */
  constructor(beside = false) {
    this.beside = beside;
    this.title = h("h2", { dir: "auto" });
    this.facts = h("p.facts", {});
    this.tools = h("div.tools", {});
    this.form = h("div", {});
    this.trouble = h("div.problem", { role: "alert", hidden: true });
    this.note = h("p.note", { role: "status" });
    this.earlier = quiet("Earlier messages", () => this.loadEarlier(), { hidden: true, className: "quiet earlier" });
    this.log = h("ol.log", { role: "log", "aria-label": "Conversation" });
    this.ends = h("div.ends", {});
    this.scroll = h("div.scroll", { tabIndex: -1 }, this.earlier, this.log, this.ends);
    this.raw = h("ol", {});
    this.drawer = h("details.raw", { hidden: true }, h("summary", {}, "Raw events"), this.raw);
    this.drawer.addEventListener("toggle", () => this.showRaw());
    const label = { placeholder: "Message", "aria-label": "Message" };
    this.input = h("textarea", { ...label, rows: 2, name: "message", onkeydown: sendOnEnter });
    this.naming = h("div.naming", { hidden: true });
    this.sendButton = submit("Send");
    this.stopButton = button("Stop", () => this.stop(), { hidden: true, className: "stop" });
    const command = () => curlOf("v1/chat", { ...this.target, message: this.input.value || "Hello" });
    const curl = quiet("Copy as curl", () => copy(command()));
    this.composer = h(
      "form.composer",
      { onsubmit: (event) => this.submit(event), hidden: beside },
      this.naming,
      this.input,
      h("div.row", {}, curl, this.note, this.stopButton, this.sendButton),
    );
    const header = h("header", {}, h("div.row", {}, this.title, this.tools), this.facts);
    const parts = [this.form, this.trouble, this.scroll, this.drawer, this.composer];
    this.node = h("section.pane", {}, header, ...parts);
    this.seen = new IntersectionObserver(
      (entries) => entries.some((entry) => entry.isIntersecting) && this.loadEarlier(),
      { root: this.scroll, rootMargin: "200px" },
    );
    this.seen.observe(this.earlier);
    this.clear();
  }

  clear() {
    this.leaving?.abort();
    this.leaving = new AbortController(); // all that is under way for what was shown until now
    Object.assign(this, { key: null, session: null, opening: null, missing: false });
    // `before` is how many messages are not here yet, and `next` where to read on; `items` has the elements.
    Object.assign(this, { messages: [], items: new Map(), before: 0, next: null, loading: null });
    Object.assign(this, { inherited: null, forks: new Map(), line: [] });
    Object.assign(this, { running: false, begun: null, calls: new Map(), drafts: [], events: [], bill: null });
    for (const node of [this.log, this.ends, this.form, this.raw, this.tools, this.facts]) node.replaceChildren();
    this.drawer.hidden = true;
    this.earlier.hidden = true;
    this.told("");
    this.complain(null);
    this.busy(false);
  }

  get thread() {
    return this.key?.thread_id ?? "";
  }
  /** Where a message goes: to the thread that is shown, or to the one that is named for it. */
  get target() {
    const named = (name) => this.naming.querySelector(`[name=${name}]`).value;
    return this.key ?? { thread_id: named("thread_id"), resource_id: named("resource_id") };
  }
  told(text) {
    this.note.textContent = text;
  }
  complain(error) {
    this.trouble.hidden = error === null;
    if (error === null) return;
    if (!(error instanceof Problem)) console.warn(error);
    const text = toldOf(error);
    const request = error.requestId && h("small", {}, ` request ${error.requestId}`);
    this.trouble.replaceChildren(
      h("p", {}, error.code && h("code", {}, error.code), " ", text, request),
      quiet("Dismiss", () => this.complain(null)),
    );
  }
  /** Run something and say what is wrong with it; whether it went well. */
  async attempt(work) {
    this.complain(null);
    const { signal } = this.leaving;
    try {
      await work();
      return true;
    } catch (error) {
      if (!signal.aborted) this.complain(error);
      return false;
    }
  }

  /** A thread that is not there yet: its first message makes it. */
  draft(thread, resource) {
    this.clear();
    this.title.textContent = "New conversation";
    this.facts.textContent =
      "Its first message begins it. Enter sends, Shift+Enter is a new line, Esc stops, / searches, n comes here.";
    const named = { required: true, maxLength: 256 };
    this.naming.replaceChildren(
      field("Thread", "thread_id", { ...named, value: thread }),
      field("Resource", "resource_id", { ...named, value: resource }),
    );
    this.naming.hidden = false;
    this.input.focus();
  }

  /** Whose a new conversation is, as long as nobody has said it. */
  suggest(resource) {
    const field = this.naming.querySelector("[name=resource_id]");
    if (resource && field?.value === STRANGER) field.value = resource;
  }

  /** Show a thread. `stream` is its running turn, where this page has begun it: with its first event and its prompt. */
  open(key, how = {}) {
    this.opening = this.openNow(key, how);
    return this.opening;
  }

  async openNow(key, { stream, at, pressed, focus = true }) {
    this.clear();
    this.key = key;
    this.naming.hidden = true;
    this.title.textContent = key.thread_id;
    const { signal } = this.leaving;
    this.busy(Boolean(stream)); // so that nobody else joins it
    const opened = await this.attempt(async () => {
      this.session = await call("GET", "v1/session", { query: key, signal }).catch((error) => {
        this.missing = error.code === "session_not_found"; // its first message would make it
        throw error;
      });
      this.describe();
      if (stream?.inherited) this.fill(...stream.inherited); // the CLI has not written them yet
      else await this.load(signal);
    });
    if (signal.aborted) return;
    if (!opened) {
      this.busy(false);
      if (this.missing) this.draft(key.thread_id, key.resource_id);
      return;
    }
    if (stream) this.attach(stream, signal);
    else if (this.session.status === "running") this.rejoin();
    this.mark();
    if (at === undefined) this.toEnd();
    else await this.toPosition(at, pressed);
    if (focus && at === undefined && !this.beside) this.input.focus({ preventScroll: true });
  }

  describe() {
    const { session } = this;
    const about = session.metadata ?? {};
    this.title.textContent = about.title || about.first_prompt || session.thread_id;
    this.node.setAttribute("aria-label", `Thread ${session.thread_id}`);
    const usage = about.usage;
    const read = usage && usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens;
    const tokens = usage && `${count(read)} tokens in, ${count(usage.output_tokens)} out`;
    const parent = session.parent_thread_id;
    this.facts.replaceChildren(
      ...[
        h("bdi", { title: "thread" }, session.thread_id),
        about.tag && h("span.tag", {}, about.tag),
        parent && h("span", {}, "↳ fork of ", link(parent, { thread: parent })),
        usage && h("span", { title: "of all API replies of this branch, with what it has inherited" }, tokens),
        about.transcript && about.transcript !== "present" && h("strong", {}, `transcript ${about.transcript}`),
      ].filter(Boolean),
    );
    if (this.beside) {
      const open = quiet("Open", () => go({ thread: session.thread_id }));
      this.tools.replaceChildren(open, quiet("Close", () => go({ compare: "" })));
      return;
    }
    if (this.tools.childElementCount) return;
    const menu = h(
      "details.menu",
      {},
      h("summary", {}, "More"),
      h(
        "div",
        {},
        button("Export Markdown", () => this.attempt(() => exportAs(this.key, "md"))),
        button("Export JSONL", () => this.attempt(() => exportAs(this.key, "jsonl"))),
        button("Raw events", () => this.openRaw()),
        button("Delete…", () => this.attempt(() => deleteThread(this)), { className: "danger" }),
      ),
    );
    menu.addEventListener("click", ({ target }) => target.closest("button") && (menu.open = false));
    menu.addEventListener("focusout", ({ relatedTarget }) => menu.contains(relatedTarget) || (menu.open = false));
    this.tools.replaceChildren(
      quiet("Checkpoint", () => this.checkpointForm(), { title: "keep this point under a name" }),
      quiet("Name and tag", () => this.nameForm()),
      menu,
    );
  }

  /** Ask again what is known of the thread: its title, its tokens. */
  async refresh() {
    const { signal } = this.leaving;
    const { key } = this;
    const session = key && (await call("GET", "v1/session", { query: key, signal }).catch(() => null));
    if (!session || signal.aborted) return;
    this.session = session;
    this.describe();
  }

  // Its messages, and where each of them stands

  async load(signal) {
    const page = await lastMessages(this.key, signal);
    const total = this.session.metadata?.message_count ?? 0;
    this.fill(page.data, page.has_more ? Math.max(0, total - page.data.length) : 0, page.next);
  }

  /** The messages that are there, `before` of them being left out, to be read from `next` on. */
  fill(messages, before, next) {
    Object.assign(this, { messages, before, next, items: new Map() });
    this.earlier.hidden = next === null;
    this.log.replaceChildren();
    for (const message of messages) this.place(message, null);
  }


  /** The page before those that are there; whether there was one. The place that is read stays where it is. */
  loadEarlier(limit = PAGE) {
    if (this.next === null) return Promise.resolve(false);
    const { signal } = this.leaving;
    this.loading ??= this.attempt(async () => {
      const page = await lastMessages(this.key, signal, { limit, after: this.next });
      const { scrollHeight, scrollTop } = this.scroll;
      this.next = page.next;
      this.before = page.has_more ? Math.max(0, this.before - page.data.length) : 0;
      this.earlier.hidden = !page.has_more;
      const first = this.log.firstChild;
      const known = page.data.filter((message) => !this.items.has(message.uuid));
      this.messages.unshift(...known);
      for (const message of known) this.place(message, first);
      this.scroll.scrollTop = scrollTop + this.scroll.scrollHeight - scrollHeight;
      this.mark();
    }).finally(() => signal.aborted || (this.loading = null));
    return this.loading;
  }

  /** Take a message once, at the end. */
  add(message) {
    if (this.items.has(message.uuid)) return;
    const follows = this.isAtEnd();
    this.messages.push(message);
    this.place(message, this.drafts[0]?.node ?? null);
    if (follows) this.toEnd();
  }

  tool(id) {
    if (!this.calls.has(id)) this.calls.set(id, new Tool());
    return this.calls.get(id);
  }

  /** The message's element, before another one. Results go to their calls, and are no element of their own. */
  place(message, before) {
    const mine = message.type === "user";
    const parts = [];
    for (const block of blocksOf(message)) {
      if (block.type === "tool_result") {
        const act = button("Fork after this result", () => this.forkForm(message, act));
        this.tool(block.tool_use_id).answered(block, !this.beside && h("div.acts", {}, act));
      } else if (block.type === "tool_use") {
        const tool = this.tool(block.id);
        tool.called(block);
        parts.push(tool.node);
      } else if (!(mine && holdsResults(message))) parts.push(shown(block, mine));
    }
    const item = parts.length ? this.item(message, parts) : null;
    this.items.set(message.uuid, item);
    if (item) this.log.insertBefore(item, before);
  }

  item(message, parts) {
    const kind = message.synthetic ? "synthetic" : message.type;
    const who = { user: "You", assistant: "Claude", synthetic: "Claude Code" }[kind];
    const acts = this.beside || message.synthetic ? null : h("div.acts", {}, ...this.acts(message));
    const when = h("time", { dateTime: message.timestamp ?? "" }, time(message.timestamp));
    const item = h(`li.message.${kind}`, {}, h("div.who", {}, h("b", {}, who), " ", when), ...parts, acts);
    item.dataset.uuid = message.uuid;
    return item;
  }

  acts(message) {
    const of = (text, work, title) => button(text, (event) => work(event.currentTarget), { title });
    if (isPrompt(message))
      return [
        of("Edit", () => this.editForm(message), "ask something else here, in a fork"),
        of("Fork before", (from) => this.forkBefore(message, from), "a fork that ends before this prompt"),
      ];
    if (blocksOf(message).some((block) => block.type === "tool_use")) return [];
    const fork = of("Fork here", (from) => this.forkForm(message, from), "a fork that ends with this answer");
    return [fork, textOf(message) && of("Regenerate", () => this.regenerate(message), "ask once more, in a fork")];
  }

  /** How many messages the conversation has. */
  get length() {
    return this.before + this.messages.length;
  }
  /** The place of a message in the whole conversation, or -1. */
  position(uuid) {
    const at = this.messages.findIndex((message) => message.uuid === uuid);
    return at < 0 ? -1 : this.before + at;
  }
  /** The first element at or after a place. */
  itemAt(position) {
    const rest = this.messages.slice(Math.max(0, position - this.before));
    return rest.map((message) => this.items.get(message.uuid)).find(Boolean) ?? null;
  }
  isAtEnd() {
    return this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 80;
  }
  toEnd() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }
  async toPosition(position, label) {
    while (position < this.before && (await this.loadEarlier(200)));
    const target = this.itemAt(position) ?? this.ends;
    target.scrollIntoView({ block: "center" });
    await this.marking;
    const buttons = [...target.querySelectorAll(".pager button:not(:disabled)")];
    (buttons.find((one) => one.ariaLabel === label) ?? buttons[0])?.focus({ preventScroll: true });
  }

  /** Dim what is inherited and show where forks are, as far as the family is known. */
  mark() {
    const { signal } = this.leaving;
    this.marking = lookForForks(this).then(
      () => signal.aborted || this.showMarks(),
      (error) => signal.aborted || console.warn("the places of forks are not known:", error),
    );
    return this.marking;
  }

  showMarks() {
    const focused = document.activeElement?.closest(".pager") ? document.activeElement.textContent : null;
    for (const pager of this.node.querySelectorAll(".pager, .onward")) pager.remove();
    this.messages.forEach((message, at) => {
      const item = this.items.get(message.uuid);
      item?.classList.toggle("inherited", this.before + at < (this.inherited ?? 0));
    });
    for (const [position, found] of this.forks) {
      if (position < this.before) continue;
      const threads = [...found.values()];
      if (position >= this.length && threads.length) this.ends.append(onward(threads, position));
      else if (found.size > 1) this.itemAt(position)?.prepend(pager(found, this.lineAt(position), position));
    }
    const buttons = focused === null ? [] : [...this.node.querySelectorAll(".pager button")];
    buttons.find((one) => one.textContent === focused)?.focus();
  }

  /** Whose branch is seen at a place: the thread's own, or of one of those that it comes from. */
  lineAt(position) {
    return this.line.find(({ from, to }) => from <= position && position < to)?.thread ?? this.thread;
  }

  // The turn that runs

  busy(running) {
    this.running = running;
    this.stopButton.hidden = !running;
    this.sendButton.hidden = running;
    this.log.setAttribute("aria-busy", running);
  }

  async submit(event) {
    event.preventDefault();
    await this.opening; // until then it is not known whether the thread is there
    const text = this.input.value;
    if (!text.trim() || this.running) return;
    const key = this.target;
    const pending = h("li.message.user.pending", {}, h("div.who", {}, h("b", {}, "You")), said(text));
    this.input.value = "";
    this.log.append(pending);
    this.toEnd();
    const begun = await this.begin("v1/chat", { ...key, message: text }, pending);
    if (!begun && !this.input.value) this.input.value = text;
  }

  /** Begin a turn, of this thread or of another that is shown then; whether it has begun. */
  begin(path, body, pending = null) {
    const { signal } = this.leaving;
    return this.attempt(async () => {
      const leaving = new AbortController();
      const stream = { prompt: body.message };
      const at = body.from_thread_id === this.thread ? this.position(body.at_message_id) - this.before + 1 : 0;
      if (at > 0) stream.inherited = [this.messages.slice(0, at), this.before, this.next];
      this.begun = { thread_id: body.thread_id, resource_id: body.resource_id };
      this.busy(true);
      this.told("Waiting for the first word…");
      stream.events = follow("POST", path, { body, signal: leaving.signal, told: (text) => stream.told?.(text) });
      let first;
      try {
        first = await stream.events.next();
      } finally {
        pending?.remove();
        this.begun = null;
        if (!signal.aborted) this.busy(false);
        if (!signal.aborted) this.told("");
      }
      if (signal.aborted) leaving.abort(); // something else is looked at by now; the turn goes on
      if (signal.aborted || first.done) return;
      stream.first = first.value;
      stream.end = () => leaving.abort();
      const { thread_id: thread, resource_id: resource } = body;
      if (this.key && this.thread === thread) this.attach(stream, this.leaving.signal);
      else await go({ resource, thread }, { stream });
    });
  }

  /** Join the turn that runs, or has just ended. */
  rejoin() {
    if (this.running || !this.key) return;
    const leaving = new AbortController();
    const stream = { end: () => leaving.abort() };
    const told = (text) => stream.told?.(text);
    stream.events = follow("GET", "v1/chat", { query: this.key, signal: leaving.signal, told });
    this.attach(stream, this.leaving.signal);
  }

  /** Show a turn as it goes on, until its end or until something else is shown. */
  async attach(stream, signal) {
    signal.addEventListener("abort", () => stream.end?.());
    this.busy(true);
    stream.told = (text) => signal.aborted || this.told(text || (this.running ? "Answering… Esc stops it." : ""));
    stream.told("");
    let ended = false;
    try {
      if (stream.first) this.take(stream.first, stream.prompt);
      for await (const event of stream.events) {
        if (signal.aborted) return;
        ended ||= event.name === "end";
        this.take(event, stream.prompt);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.code === "replay_gone") this.aside(GONE);
      else this.complain(error);
    }
    if (signal.aborted) return;
    this.busy(false);
    if (!this.note.textContent.startsWith("Answered")) this.told(ended ? this.note.textContent : "");
    await this.reconcile(signal);
  }

  /** Something may have been said elsewhere. */
  async catchUp() {
    const { signal } = this.leaving;
    await this.opening;
    if (this.session && !this.running && !signal.aborted) await this.reconcile(signal);
  }

  /** What the transcript has by now, if there is something that the stream did not say; drafts are over. */
  async reconcile(signal) {
    const page = await lastMessages(this.key, signal).catch(() => null);
    if (signal.aborted) return;
    const follows = this.isAtEnd();
    this.dropDrafts();
    const kept = page?.data ?? [];
    const missed = kept.findIndex((message) => !this.items.has(message.uuid));
    const isBetween = missed >= 0 && kept.slice(missed).some((message) => this.items.has(message.uuid));
    if (isBetween) await this.attempt(() => this.load(signal));
    else for (const message of kept) this.add(message);
    if (signal.aborted) return;
    if (this.bill) this.log.append(this.bill);
    this.bill = null;
    if (follows) this.toEnd();
    await this.refresh();
    if (signal.aborted) return;
    this.mark();
  }

  /** One event of a turn. */
  take(event, prompt) {
    const { name, data } = event;
    this.keepRaw(event);
    const aside = data.parent_tool_use_id ? this.tool(data.parent_tool_use_id) : null;
    const now = new Date().toISOString();
    if (name === "session") {
      const prompted = { uuid: data.turn_id, type: "user", message: { content: prompt }, timestamp: now };
      if (prompt && data.origin === "message") this.add(prompted);
      if (data.outcome === "restarted") this.aside(LOST);
    } else if (name === "stream_event" && !aside) this.takeDelta(data.event);
    else if (name === "assistant" && !aside) {
      this.drafts.shift()?.node.remove();
      this.add({ ...data, timestamp: data.timestamp ?? now });
    } else if (name === "user" && !aside) this.add({ synthetic: !holdsResults(data), ...data });
    else if (aside && data.message) this.nest(aside, data);
    else if (data.subtype === "api_retry")
      this.told(`The model's API refuses (${data.error_status ?? "no answer"}). Attempt ${data.attempt}…`);
    else if (name === "result") this.bill = billOf(data);
    else if (name === "end") this.ended(data);
  }

  /** A subagent's message, in the call that has started it. */
  nest(tool, data) {
    const parts = blocksOf(data).map((block) => {
      if (block.type === "tool_result") {
        this.tool(block.tool_use_id).answered(block);
        return null;
      }
      if (block.type !== "tool_use") return shown(block, data.type === "user");
      this.tool(block.id).called(block);
      return this.tool(block.id).node;
    });
    if (!parts.some(Boolean) || this.items.has(data.uuid)) return;
    this.items.set(data.uuid, null);
    tool.within.hidden = false;
    const who = data.type === "user" ? "To the subagent" : "Subagent";
    tool.within.append(h(`li.message.${data.type}`, {}, h("div.who", {}, h("b", {}, who)), ...parts));
  }

  /** What is said word by word goes into one text node each; the whole message takes its place when it has come. */
  takeDelta(event) {
    if (event.type === "message_start") this.dropDrafts(); // after a cut the API says it all once more
    else if (event.type === "content_block_start") {
      const text = document.createTextNode("");
      const { type, name } = event.content_block;
      const summary = h("summary", {}, type === "thinking" ? "Thinking…" : `${name ?? type}…`);
      const body = type === "text" ? said(text) : h("details.fold", {}, summary, said(text));
      const node = h("li.message.assistant.draft", {}, h("div.who", {}, h("b", {}, "Claude")), body);
      this.drafts.push({ node, text, index: event.index });
      const follows = this.isAtEnd();
      this.log.append(node);
      if (follows) this.toEnd();
    } else if (event.type === "content_block_delta") {
      const follows = this.isAtEnd();
      const { text, thinking, partial_json: json } = event.delta;
      this.drafts.find((draft) => draft.index === event.index)?.text.appendData(text ?? thinking ?? json ?? "");
      if (follows) this.toEnd();
    }
  }
  dropDrafts() {
    for (const draft of this.drafts.splice(0)) draft.node.remove();
  }

  ended({ status, error }) {
    this.told({ completed: "Answered.", interrupted: "Stopped. What was said so far is kept.", failed: "" }[status]);
    if (error) this.complain(new Problem(error.status, error));
  }

  aside(text) {
    this.log.append(h("li.aside", {}, text));
  }

  stop() {
    const body = this.begun ?? this.key;
    if (this.running && body) this.attempt(() => call("POST", "v1/chat/interrupt", { body }));
  }

  // Forks

  /** The last message before a prompt that a fork can end with, or null. */
  async beforePrompt(message) {
    while (this.position(message.uuid) === this.before && this.next !== null && (await this.loadEarlier()));
    const at = this.messages.indexOf(message);
    const isEnd = (one) => one.type === "assistant" || holdsResults(one);
    return this.messages.slice(0, Math.max(at, 0)).findLast(isEnd) ?? null;
  }

  async forkBefore(message, from) {
    const before = await this.beforePrompt(message);
    if (before) this.forkForm(before, from);
    else this.told("Nothing comes before the first prompt. Edit it: that begins a new conversation.");
  }

  /** Ask where a fork goes; beside the button that was pressed. */
  forkForm(message, from) {
    const body = (form) => ({
      resource_id: this.key.resource_id,
      from_thread_id: this.thread,
      thread_id: form.elements.thread_id.value,
      at_message_id: message.uuid,
      ...(form.elements.message.value.trim() ? { message: form.elements.message.value } : {}),
    });
    this.askBeside(from.closest(".acts"), {
      label: "Fork",
      yes: "Fork",
      message: "",
      hint: "Without a message the model is not called.",
      name: unused(this.thread),
      curl: (form) => curlOf("v1/chat/fork", body(form)),
      work: (form) => this.fork(body(form)),
    });
  }

  fork(body) {
    if (body.message) return this.begin("v1/chat/fork", body);
    return this.attempt(async () => {
      await call("POST", "v1/chat/fork", { body });
      await go({ thread: body.thread_id });
    });
  }

  async editForm(message) {
    const before = await this.beforePrompt(message);
    const acts = this.items.get(message.uuid)?.querySelector(".acts");
    this.askBeside(acts, {
      label: "Edit",
      yes: before ? "Ask in a fork" : "Begin anew",
      message: textOf(message),
      required: true,
      hint: before
        ? "This prompt stays as it is: the new one is asked in a fork that ends before it."
        : "Nothing comes before this prompt, so there is nothing to fork: this begins a new conversation.",
      name: unused(this.thread),
      work: (form) => this.again(message, before, form.elements.thread_id.value, form.elements.message.value),
    });
  }

  /** Ask a prompt once more: another text or the same, with the images that it had. */
  again(prompt, before, thread, text) {
    const others = blocksOf(prompt).filter((block) => block.type === "image" || block.type === "document");
    const message = others.length ? [...others, { type: "text", text }] : text;
    const to = { resource_id: this.key.resource_id, thread_id: thread, message };
    if (!before) return this.begin("v1/chat", to);
    return this.begin("v1/chat/fork", { ...to, from_thread_id: this.thread, at_message_id: before.uuid });
  }

  async regenerate(answer) {
    let prompt;
    do prompt = this.messages.slice(0, this.messages.indexOf(answer)).findLast(isPrompt);
    while (!prompt && (await this.loadEarlier()));
    if (!prompt) return this.told("The prompt of this answer is not known.");
    const before = await this.beforePrompt(prompt);
    return this.attempt(async () => this.again(prompt, before, await free(this.key), textOf(prompt)));
  }

  /** A form below what was pressed: a name for the new thread, and what is said in it first. */
  askBeside(place, { label, yes, message, required = false, hint, name, curl, work }) {
    this.node.querySelector("form.beside")?.remove();
    const close = () => {
      form.remove();
      place?.querySelector("button")?.focus();
    };
    const text = h("textarea", { name: "message", rows: 3, value: message, required, onkeydown: sendOnEnter });
    const form = h(
      "form.beside",
      {
        "aria-label": label,
        onsubmit: async (event) => {
          event.preventDefault();
          const all = [...form.querySelectorAll("button")];
          for (const one of all) one.disabled = true;
          if (await work(form)) form.remove();
          for (const one of all) one.disabled = false;
        },
        onkeydown: (event) => {
          if (event.key !== "Escape") return;
          event.stopPropagation();
          close();
        },
      },
      h("label.field", {}, h("span", {}, required ? "Message" : "Message (may be left out)"), text),
      field("New thread", "thread_id", { value: name, required: true, maxLength: 256 }),
      h("p.hint", {}, hint),
      h("div.row", {}, curl && quiet("Copy as curl", () => copy(curl(form))), quiet("Cancel", close), submit(yes)),
    );
    place?.after(form);
    text.focus();
    form.scrollIntoView({ block: "nearest" });
  }

  // Checkpoints and names

  checkpointForm() {
    this.askAbove({
      label: "Checkpoint",
      yes: "Keep this point",
      fields: [
        ["title", "Name", `${short(this.title.textContent, 60)} (checkpoint)`, true],
        ["thread_id", "New thread", unused(`${this.thread}-checkpoint`, 1), true],
      ],
      hint: "A checkpoint is a fork without a message. Forking it is how one comes back to it.",
      work: async ({ thread_id: thread, title }) => {
        const to = { resource_id: this.key.resource_id, thread_id: thread };
        await call("POST", "v1/chat/fork", { body: { ...to, from_thread_id: this.thread } });
        await call("PATCH", "v1/session", { body: { ...to, title } });
        this.told(`Kept as ${thread}.`);
        await family.load();
      },
    });
  }

  nameForm() {
    const about = this.session.metadata ?? {};
    this.askAbove({
      label: "Name and tag",
      yes: "Save",
      fields: [
        ["title", "Title", about.title ?? "", false],
        ["tag", "Tag", about.tag ?? "", false],
      ],
      hint: "The SDK keeps both in the transcript.",
      work: async ({ title, tag }) => {
        const changes = {};
        if (title && title !== about.title) changes.title = title;
        if (tag !== (about.tag ?? "")) changes.tag = tag || null;
        if (Object.keys(changes).length) await call("PATCH", "v1/session", { body: { ...this.key, ...changes } });
        await this.refresh();
      },
    });
  }

  askAbove({ label, yes, fields, hint, work }) {
    const close = () => {
      form.remove();
      this.tools.querySelector("button")?.focus();
    };
    const form = h(
      "form.beside",
      {
        "aria-label": label,
        onsubmit: async (event) => {
          event.preventDefault();
          const given = Object.fromEntries(new FormData(form));
          if (await this.attempt(() => work(given))) close();
        },
        onkeydown: (event) => {
          if (event.key !== "Escape") return;
          event.stopPropagation();
          close();
        },
      },
      ...fields.map(([name, text, value, required]) => field(text, name, { value, required, maxLength: 256 })),
      h("p.hint", {}, hint),
      h("div.row", {}, quiet("Cancel", close), submit(yes)),
    );
    this.form.replaceChildren(form);
    form.querySelector("input").select();
  }

  // What has come, as it came

  keepRaw(event) {
    this.events.push(event);
    if (this.events.length > MOST_RAW) this.events.shift();
    if (!this.drawer.open) return;
    this.raw.append(rawItem(event));
    if (this.raw.childElementCount > MOST_RAW) this.raw.firstChild.remove();
  }
  openRaw() {
    this.drawer.hidden = false;
    this.drawer.open = true;
    this.drawer.querySelector("summary").focus();
  }
  showRaw() {
    this.raw.replaceChildren(...(this.drawer.open ? this.events.map(rawItem) : []));
    if (!this.drawer.open) this.drawer.hidden = true;
    else if (!this.events.length) this.raw.append(h("li", {}, "None yet: those of the next answer come here."));
  }
}

function rawItem({ id, name, data }) {
  const kind = data.subtype ?? data.event?.type ?? "";
  const summary = h("summary", {}, h("b", {}, name), " ", kind, " ", h("small", {}, id));
  return h("li", {}, h("details", {}, summary, code(JSON.stringify(data, null, 2))));
}

/** What one turn took. `total_cost_usd` goes on over turns and into forks; this is since the result before. */
function billOf(result) {
  const used = Object.values(result.model_usage_since_last_result ?? {});
  if (!used.length) return null;
  const sum = (...names) => used.flatMap((one) => names.map((name) => one[name] ?? 0)).reduce((a, b) => a + b);
  const seconds = ((result.duration_ms ?? 0) / 1000).toFixed(1);
  const read = sum("inputTokens", "cacheReadInputTokens", "cacheCreationInputTokens");
  const tokens = `${count(read)} tokens in, ${count(sum("outputTokens"))} out`;
  return h("li.bill", {}, `${tokens} · $${sum("costUSD").toFixed(4)} · ${seconds} s`);
}

function sendOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.currentTarget.form.requestSubmit();
}

// 7. The family of forks: a tree, and the places where branches part.

const family = {
  root: null,
  nodes: new Map(), // by thread: {node, parent}, in the order of the tree
  counts: new Map(), // by session: what is known of the uuids of its messages, oldest first

  load: once(async () => {
    const { resource, thread } = where();
    if (!thread) return family.take(null);
    const query = { thread_id: thread, resource_id: resource };
    const found = await call("GET", "v1/session/branches", { query }).catch(() => null);
    const now = where();
    if (now.thread !== thread || now.resource !== resource) return;
    family.take(found?.root ?? null, found?.truncated);
  }),

  take(root, truncated = false) {
    family.root = root;
    family.nodes = new Map();
    const walk = (node, parent) => {
      family.nodes.set(node.thread_id, { node, parent });
      for (const child of node.children) walk(child, node);
    };
    if (root) walk(root, null);
    drawTree(truncated);
    main.mark();
    if (beside.key) beside.mark();
  },

  /** A thread and those that it comes from, the root first. */
  line(thread) {
    const found = [];
    let one = family.nodes.get(thread);
    while (one) {
      found.unshift(one.node);
      one = one.parent && family.nodes.get(one.parent.thread_id);
    }
    return found;
  },

  /** The uuids of a thread's messages, oldest first: as many as `enough` wants, or all. */
  async uuids(node, enough) {
    if (node.status === "deleted") return [];
    const known = family.counts.get(node.sdk_session_id) ?? { uuids: [], reading: Promise.resolve() };
    family.counts.set(node.sdk_session_id, known);
    known.reading = known.reading.then(async () => {
      for (let more = true; more && !enough(known.uuids); ) {
        const query = { thread_id: node.thread_id, resource_id: where().resource };
        Object.assign(query, { limit: 200, after: known.uuids.at(-1) });
        const page = await call("GET", "v1/session/messages", { query });
        known.uuids.push(...page.data.map((message) => message.uuid));
        more = page.has_more;
      }
    });
    await known.reading.catch(() => family.counts.delete(node.sdk_session_id)); // a compaction begins anew
    return known.uuids;
  },

  /** Whether a thread has a message at a place. */
  async has(node, place) {
    return (await family.uuids(node, (known) => known.length > place)).length > place;
  },

  /** How many messages of `parent` there are up to one; null where that is not known. A fork without a message has new
      uuids for the same messages, so they are counted where they were first said. */
  async upTo(parent, uuid, pane) {
    const here = pane?.position(uuid) ?? -1;
    if (here >= 0) return here + 1;
    const uuids = await family.uuids(parent, (known) => known.includes(uuid));
    return uuids.indexOf(uuid) + 1 || null;
  },
};

/** Where the branches of a family part, as seen in a pane. `forks` has what goes on from each place: by whose branch it
    is, the thread to show for it. `inherited` is how many messages come from the parent. */
async function lookForForks(pane) {
  const line = family.line(pane.thread);
  if (!line.length) return;
  const cuts = [0]; // how much each of the line has from the one before
  for (let i = 1; i < line.length; i++)
    cuts.push((await family.upTo(line[i - 1], line[i].parent_message_id, pane)) ?? cuts.at(-1));
  const ends = line.map((_, i) => Math.min(...cuts.slice(i + 1), Infinity)); // from where on it is not seen here
  const forks = new Map();
  for (const [i, node] of line.entries()) {
    for (const child of node.children) {
      const cut = child === line[i + 1] ? cuts[i + 1] : await family.upTo(node, child.parent_message_id, pane);
      if (cut === null || cut > ends[i]) continue;
      forks.set(cut, (forks.get(cut) ?? new Map()).set(child.thread_id, child.thread_id));
    }
  }
  for (const [place, found] of forks) {
    for (const [i, node] of line.entries()) {
      if (place < cuts[i] || place > ends[i]) continue;
      const isLast = i === line.length - 1;
      const goesOn = isLast ? place < pane.length : place < ends[i] || (await family.has(node, place));
      if (!goesOn) continue;
      let to = i; // a fork has what its parent says from here too: the nearest one is shown
      while (to + 1 < line.length && cuts[to + 1] > place) to++;
      found.set(node.thread_id, line[to].thread_id);
    }
    if (place >= pane.length) found.delete(pane.thread);
  }
  pane.line = line.map((node, i) => ({ thread: node.thread_id, from: cuts[i], to: ends[i] }));
  pane.inherited = cuts.at(-1);
  pane.forks = forks;
}

const titleOf = (thread) => family.nodes.get(thread)?.node.title || thread;

function link(text, to, how) {
  return button(text, () => go(to, how), { className: "link", dir: "auto" });
}

/** What goes on where a thread ends. */
function onward(threads, position) {
  const links = threads.flatMap((name, i) => [i ? ", " : "", link(titleOf(name), { thread: name }, { at: position })]);
  const many = threads.length === 1 ? "A branch goes" : `${threads.length} branches go`;
  return h("p.onward", {}, `↳ ${many} on from here: `, ...links);
}

/** `‹ 2/3 ›` where branches part, in the order of the tree. */
function pager(found, current, position) {
  const all = [...family.nodes.keys()].filter((thread) => found.has(thread));
  const at = all.indexOf(current);
  const to = (step, sign, label) => {
    const other = found.get(all[at + step]);
    const show = () => go({ thread: other }, { at: position, pressed: label });
    return button(sign, show, { disabled: other === undefined, "aria-label": label, title: other ?? "" });
  };
  return h(
    "div.pager",
    { role: "group", "aria-label": `Branch ${at + 1} of ${all.length} from here` },
    h("span.mark", { "aria-hidden": "true" }, "↳"),
    to(-1, "‹", "Previous branch"),
    h("span", {}, `${at + 1}/${all.length}`),
    to(1, "›", "Next branch"),
  );
}

/** The tree: forks of the same message are below that message. */
function drawTree(truncated) {
  const { thread, compare } = where();
  const alone = !family.root || !family.root.children.length;
  $("family").hidden = alone;
  const refocus = focusIn($("tree"));
  const branch = (node) => {
    const name = node.title || node.thread_id;
    const isCurrent = node.thread_id === thread;
    const open = h(
      "button.name",
      {
        type: "button",
        dir: "auto",
        title: node.thread_id,
        disabled: node.status === "deleted",
        "aria-current": isCurrent ? "page" : null,
        onclick: () => go({ thread: node.thread_id }),
      },
      name,
      name !== node.thread_id && h("small", {}, ` ${node.thread_id}`),
    );
    const toggle = () => go({ compare: node.thread_id === compare ? "" : node.thread_id });
    const beside = button("⇄", toggle, {
      className: "compare",
      title: "Compare with the current branch",
      "aria-label": `Compare with ${name}`,
      "aria-pressed": String(node.thread_id === compare),
    });
    const status = node.status !== "idle" && h("span.how", {}, node.status);
    const row = h("div.node", {}, open, status, !isCurrent && node.status !== "deleted" && beside);
    row.dataset.thread = node.thread_id;
    const points = new Map();
    for (const child of node.children) {
      const at = child.parent_message_id;
      points.set(at, [...(points.get(at) ?? []), child]);
    }
    const below = [...points.values()].map((forks) =>
      h("li.point", {}, h("p", { dir: "auto" }, "↳ ", pointOf(forks[0])), h("ul", {}, ...forks.map(branch))),
    );
    return h("li", {}, row, below.length > 0 && h("ul.points", {}, ...below));
  };
  const more = truncated && h("p.hint", {}, "The family is larger than is shown.");
  $("tree").replaceChildren(...(alone ? [] : [h("ul.tree", {}, branch(family.root))]), more || "");
  refocus();
}

/** Where the focus is in a list that is drawn anew: call what this gives to put it there again. */
function focusIn(place) {
  const focused = document.activeElement;
  const thread = place.contains(focused) ? focused.closest("[data-thread]")?.dataset.thread : undefined;
  return () => {
    const rows = thread === undefined ? [] : [...place.querySelectorAll("[data-thread]")];
    rows.find((row) => row.dataset.thread === thread)?.querySelector("button")?.focus();
  };
}

function pointOf({ branch_point: point }) {
  return point ? `after “${short(point.preview, 60) || point.type}”` : "from a message that is gone";
}

// 8. Two branches side by side, from where they part.

async function compare() {
  const { resource, thread, compare: other } = where();
  document.body.classList.toggle("comparing", Boolean(other));
  if (!other) {
    beside.clear();
    beside.node.remove();
    main.log.querySelector(".common")?.remove();
    for (const item of main.log.children) item.hidden = false;
    return;
  }
  $("panes").append(beside.node);
  if (beside.thread !== other || beside.key.resource_id !== resource)
    await beside.open({ thread_id: other, resource_id: resource }, { focus: false });
  for (const pane of [main, beside]) {
    while (pane.next !== null && (await pane.loadEarlier(200)));
    await pane.mark();
  }
  if (where().compare !== other || where().thread !== thread) return;
  const common = await partingOf(thread, other);
  for (const pane of [main, beside]) foldCommon(pane, common);
}

/** How many messages two threads of a family have in common. */
async function partingOf(one, other) {
  const lines = [family.line(one), family.line(other)];
  let same = 0;
  while (same < lines[0].length && lines[0][same] === lines[1][same]) same++;
  if (same === 0) return 0;
  const parted = lines.filter((line) => line.length > same);
  const cuts = await Promise.all(parted.map((line) => family.upTo(line[same - 1], line[same].parent_message_id)));
  return Math.min(...cuts.map((cut) => cut ?? 0));
}

function foldCommon(pane, common) {
  pane.log.querySelector(".common")?.remove();
  const shared = pane.messages.slice(0, Math.max(0, common - pane.before));
  const items = shared.map((message) => pane.items.get(message.uuid)).filter(Boolean);
  for (const item of pane.log.children) item.hidden = items.includes(item);
  if (!common) return;
  const show = button("Show them", () => {
    for (const item of items) item.hidden = false;
    show.parentElement.remove();
  });
  pane.log.prepend(h("li.common", {}, `↳ ${common} message${common === 1 ? "" : "s"} in common. `, show));
  pane.scroll.scrollTop = 0;
}

// 9. The list of threads, the search, whose they are.

const resources = new Set();
const list = {
  rows: [],
  next: null,
  asked: 0,

  load: once(async () => list.read(false)),

  async read(further) {
    const { resource, q } = where();
    const mine = ++list.asked;
    const limit = further ? 50 : Math.min(200, Math.max(50, list.rows.length));
    const query = { resource_id: resource, q, include: "metadata", limit, after: further ? list.next : "" };
    try {
      const page = await call("GET", "v1/sessions", { query });
      if (mine !== list.asked) return;
      list.rows = further ? [...list.rows, ...page.data] : page.data;
      list.next = page.next;
      $("list-problem").hidden = true;
    } catch (error) {
      if (mine !== list.asked) return;
      list.rows = [];
      list.next = null;
      $("list-problem").hidden = false;
      $("list-problem").textContent = toldOf(error);
    }
    list.draw();
  },

  draw() {
    const { resource, thread, q } = where();
    for (const row of list.rows) resources.add(row.resource_id);
    $("resources").replaceChildren(...[...resources].sort().map((name) => h("option", { value: name })));
    const refocus = focusIn($("list"));
    $("list").replaceChildren(...list.rows.map((row) => list.entry(row, resource, thread)));
    refocus();
    main.suggest(list.rows[0]?.resource_id);
    const none = q ? "Nothing was found." : "There is no thread yet.";
    if (!list.rows.length && $("list-problem").hidden) $("list").append(h("li.hint", {}, none));
    $("more").hidden = list.next === null;
    $("more").textContent = q ? "Look further" : "More";
  },

  entry(row, resource, thread) {
    const about = row.metadata ?? {};
    const isCurrent = row.thread_id === thread && row.resource_id === resource;
    const small = [
      h("bdi", {}, row.thread_id),
      !resource && h("bdi", {}, `· ${row.resource_id}`),
      about.tag && h("span.tag", {}, about.tag),
      row.status === "running" && h("span.how", {}, "running"),
    ];
    const title = [row.parent_thread_id && "↳ ", short(about.title || about.first_prompt || row.thread_id, 100)];
    const show = () => go({ resource: row.resource_id, thread: row.thread_id });
    const open = h(
      "button.entry",
      { type: "button", "aria-current": isCurrent ? "page" : null, onclick: show },
      h("span.title", { dir: "auto" }, title),
      h("small", {}, small),
    );
    const item = h("li", {}, open);
    item.dataset.thread = row.thread_id;
    return item;
  },

  /** Whether a turn runs on a thread, told by the feed. */
  set(event, running) {
    const isIt = (row) => row.thread_id === event.thread_id && row.resource_id === event.resource_id;
    for (const row of list.rows.filter(isIt)) row.status = running ? "running" : "idle";
    list.draw();
    const node = family.nodes.get(event.thread_id)?.node;
    if (node && event.resource_id === where().resource) {
      node.status = running ? "running" : "idle";
      drawTree();
    }
  },
};

/** A name for a fork that no known thread has: `trip-2`, `trip-3`. */
function unused(thread, number = 2) {
  const stem = thread.replace(/-\d{1,4}$/, "").slice(0, 240) || thread;
  const known = new Set([...family.nodes.keys(), ...list.rows.map((row) => row.thread_id)]);
  while (known.has(`${stem}-${number}`)) number++;
  return `${stem}-${number}`;
}

/** Such a name that no thread has at all, of those that this page does not know either. */
async function free({ thread_id: thread, resource_id: resource }) {
  for (let number = 2; ; number++) {
    const name = unused(thread, number);
    const query = { thread_id: name, resource_id: resource, metadata: false };
    const isThere = await call("GET", "v1/session", { query }).then(
      () => true,
      (error) => {
        if (error.code !== "session_not_found") throw error;
        return false;
      },
    );
    if (!isThere) return name;
    number = Number(name.match(/\d+$/)[0]);
  }
}

/** One at a time, and once more if it was asked for meanwhile. */
function once(work) {
  let running = null;
  let again = false;
  return () => {
    again = running !== null;
    running ??= (async () => {
      do {
        again = false;
        await work();
      } while (again);
    })().finally(() => (running = null));
    return running;
  };
}

// 10. What happens elsewhere: the feed.

let feeding = null;

async function feed(resource) {
  feeding?.abort();
  feeding = new AbortController();
  const { signal } = feeding;
  const state = (text, kind) => {
    $("feed").textContent = text;
    $("feed").dataset.state = kind;
  };
  const told = (text) => signal.aborted || state(text ? "offline" : "live", text ? "lost" : "live");
  try {
    const events = follow("GET", "v1/events", { query: { resource_id: resource }, signal, told });
    for await (const { data } of events) happened(data);
  } catch (error) {
    if (!signal.aborted) state("no live updates", "lost");
  }
}

function happened(event) {
  const { resource, thread, compare: other } = where();
  const here = event.resource_id === resource;
  const isOf = (name) => name !== undefined && (name === thread || family.nodes.has(name));
  const isOurs = here && (isOf(event.thread_id) || isOf(event.parent_thread_id));
  if (event.type === "turn_started" || event.type === "turn_ended") {
    list.set(event, event.type === "turn_started");
    if (event.type === "turn_ended") list.load(); // for the name that a first turn gives
    for (const pane of [main, beside]) {
      if (!here || pane.thread !== event.thread_id || pane.running) continue;
      if (event.type === "turn_started") pane.rejoin();
      else pane.catchUp();
    }
    return;
  }
  list.load();
  if (event.type === "reset" || isOurs) family.load();
  const panes = [main, beside].filter((pane) => here && pane.thread === event.thread_id);
  if (event.type === "titled") for (const pane of panes) pane.refresh();
  if (event.type === "deleted" && panes.includes(main)) main.told("This thread was deleted.");
  if (event.type === "deleted" && here && event.thread_id === other) go({ compare: "" });
  if (event.type === "reset") main.catchUp();
}

// 11. Questions, copies, files.

/** A question that has to be answered first: what was filled in, or null. */
function ask({ title, text, fields = [], yes, danger = false }) {
  return new Promise((resolve) => {
    let answer = null;
    const form = h(
      "form",
      { method: "dialog", onsubmit: () => (answer = Object.fromEntries(new FormData(form))) },
      h("h2", {}, title),
      text && h("p", {}, text),
      ...fields,
      h("div.row", {}, quiet("Cancel", () => dialog.close()), submit(yes, danger ? "danger" : "main")),
    );
    const closed = () => {
      dialog.remove();
      resolve(answer);
    };
    const dialog = h("dialog", { "aria-label": title, onclose: closed }, form);
    document.body.append(dialog);
    dialog.showModal();
  });
}

async function deleteThread(pane) {
  const answer = await ask({
    title: "Delete this thread?",
    text: `“${short(pane.title.textContent)}” (${pane.thread}) is forgotten. Its forks stay.`,
    fields: [h("label", {}, h("input", { type: "checkbox", name: "transcript" }), " The transcript too, for good")],
    yes: "Delete",
    danger: true,
  });
  if (answer === null) return;
  await call("DELETE", "v1/session", { query: { ...pane.key, transcript: answer.transcript ? "delete" : "keep" } });
  const parent = family.nodes.get(pane.thread)?.parent;
  await go({ thread: parent && parent.status !== "deleted" ? parent.thread_id : "" });
  list.load();
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A call for a shell. A token is not part of it: it is taken from the environment. */
function curlOf(path, body) {
  const url = quoted(new URL(path, BASE).href);
  const allow = token === null ? "" : ' -H "authorization: Bearer $SIDECAR_TOKEN"';
  return `curl -N ${url} -H 'content-type: application/json'${allow} -d ${quoted(JSON.stringify(body))}`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    main.told("Copied.");
  } catch {
    const field = h("textarea", { rows: 6, readOnly: true, value: text, "aria-label": "Text to copy" });
    await ask({ title: "Copy this", fields: [field], yes: "Done" });
  }
}

async function* allMessages(key) {
  for (let after = ""; after !== null; ) {
    const page = await call("GET", "v1/session/messages", { query: { ...key, limit: 200, after } });
    yield* page.data;
    after = page.next;
  }
}

async function exportAs(key, kind) {
  const parts = kind === "md" ? [`# ${main.title.textContent}\n\n`] : [];
  const write = kind === "md" ? markdown : (message) => `${JSON.stringify(message)}\n`;
  for await (const message of allMessages(key)) parts.push(write(message));
  const file = URL.createObjectURL(new Blob(parts, { type: kind === "md" ? "text/markdown" : "application/jsonl" }));
  h("a", { href: file, download: `${key.thread_id.replace(/[^\w.-]+/g, "_").slice(0, 100)}.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(file), 60_000);
}

function markdown(message) {
  const fenced = (text, language = "") => {
    const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map((run) => run[0].length + 1)));
    return `${fence}${language}\n${text}\n${fence}`;
  };
  const json = (value) => JSON.stringify(value, null, 2);
  const parts = blocksOf(message).map((block) => {
    const { type, content } = block;
    if (type === "text") return block.text;
    if (type === "thinking") return block.thinking.replace(/^/gm, "> ");
    if (type === "tool_use") return `**${block.name}**\n\n${fenced(json(block.input), "json")}`;
    if (type === "tool_result") return fenced(typeof content === "string" ? content : json(content));
    return `[${type}]`;
  });
  const said = message.type === "user" ? "You" : "Claude";
  const who = holdsResults(message) ? "Result" : message.synthetic ? "Claude Code" : said;
  return `## ${who}\n\n${parts.join("\n\n")}\n\n`;
}

// 12. All of it together.

const main = new Pane();
const beside = new Pane(true);
let last = {}; // what is shown
let typing = null; // a search that is still being written

async function show(how = {}) {
  const now = where();
  const before = last;
  last = now;
  $("resource").value = now.resource;
  if (document.activeElement !== $("search") && typing === null) $("search").value = now.q;
  if (now.resource !== before.resource) feed(now.resource);
  if (now.resource !== before.resource || now.q !== before.q) list.load();
  else list.draw();
  let opening = null;
  if (now.thread !== before.thread || now.resource !== before.resource || how.stream) {
    fold();
    document.title = now.thread ? `${now.thread} · session-sidecar` : "session-sidecar";
    if (now.thread && now.resource) opening = main.open({ thread_id: now.thread, resource_id: now.resource }, how);
    else main.draft(now.thread || freshName(), now.resource || list.rows[0]?.resource_id || STRANGER);
    if (family.nodes.has(now.thread) && now.resource === before.resource) drawTree();
    else family.take(null);
    opening = Promise.all([opening, family.load()]);
  } else drawTree();
  await opening;
  if (where().compare !== (before.compare ?? "") || now.compare) await compare();
}

const freshName = () => `chat-${Date.now().toString(36)}`;

function fold(open = false) {
  document.body.classList.toggle("side-open", open);
  $("menu").setAttribute("aria-expanded", open);
}

$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    typing = null;
    go({ q: $("search").value }, { replace: true });
  }, 200);
});
$("resource").addEventListener("change", () => go({ resource: $("resource").value, thread: "" }));
$("new").addEventListener("click", () => {
  if (where().thread) go({ thread: "" });
  fold();
  main.input.focus();
});
$("more").addEventListener("click", () => list.read(true));
$("menu").addEventListener("click", () => fold(!document.body.classList.contains("side-open")));
$("skip").addEventListener("click", () => main.input.focus());
$("forget").addEventListener("click", () => {
  keepToken(null);
  location.reload();
});
addEventListener("popstate", () => show());
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const isTyping = event.target.matches?.("input, textarea");
  if (event.key === "Escape") {
    const menu = document.querySelector(".menu[open]");
    if (menu) menu.open = false;
    else if (document.body.classList.contains("side-open")) fold();
    else main.stop();
  } else if (isTyping) return;
  else if (event.key === "/") {
    event.preventDefault();
    if (matchMedia("(max-width: 60rem)").matches) fold(true);
    $("search").focus();
  } else if (event.key === "n") {
    event.preventDefault();
    $("new").click();
  }
});

$("panes").append(main.node);
keepToken(token);
show();
call("GET", "version").then(
  ({ model }) => ($("model").hidden = model !== "offline"),
  () => {}, // whoever may not call hears so of the list
);
