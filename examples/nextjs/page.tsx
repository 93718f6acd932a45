"use client"; // app/page.tsx

import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport, type UIMessage } from "ai";
import { type FormEvent, useEffect, useState } from "react";

const SIDECAR = process.env.NEXT_PUBLIC_SIDECAR ?? "http://127.0.0.1:8000";
const RESOURCE = "alice"; // whoever has logged in
const CHAT = "demo";
const headers = { "X-Resource-Id": RESOURCE };
const transport = new DefaultChatTransport({ api: `${SIDECAR}/v1/ai-sdk/chat`, headers });

export default function Page() {
  const [loaded, setLoaded] = useState<UIMessage[]>();
  useEffect(() => {
    fetch(`${SIDECAR}/v1/ai-sdk/chat/${CHAT}`, { headers })
      .then((answer) => (answer.ok ? answer.json() : [])) // 404: nothing has been said yet
      .then(setLoaded);
  }, []);
  return loaded ? <Chat loaded={loaded} /> : null;
}

function Chat({ loaded }: { loaded: UIMessage[] }) {
  // `resume` asks for the running turn once the page is there: 204 where none runs.
  const { messages, sendMessage, regenerate, status, error } = useChat({ id: CHAT, messages: loaded, resume: true, transport });
  const busy = status === "submitted" || status === "streaming";
  const send = (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault();
    void sendMessage({ text: String(new FormData(event.currentTarget).get("text")) });
    event.currentTarget.reset();
  };
  // The client's own `stop` only stops reading. This stops the turn, and its stream then ends.
  const stop = () => {
    const last = messages.at(-1)?.metadata as { threadId?: string } | undefined;
    const body = JSON.stringify({ thread_id: last?.threadId ?? CHAT, resource_id: RESOURCE });
    void fetch(`${SIDECAR}/v1/chat/interrupt`, { method: "POST", headers: { "content-type": "application/json" }, body });
  };
  return (
    <main style={{ maxWidth: "40rem", margin: "2rem auto", fontFamily: "sans-serif" }}>
      {messages.map((message) => (
        <p key={message.id} data-role={message.role}>
          <b>{message.role}:</b>{" "}
          {message.parts.map((part, at) => (part.type === "text" ? <span key={at}>{part.text}</span> : null))}
        </p>
      ))}
      {error && <pre role="alert">{error.message}</pre>}
      <form onSubmit={send}>
        <input name="text" placeholder="Say something" disabled={busy} required autoFocus />{" "}
        {busy ? <button type="button" onClick={stop}>Stop</button> : <button>Send</button>}{" "}
        {!busy && messages.length > 0 && <button type="button" onClick={() => void regenerate()}>Again</button>}
      </form>
      <small data-status={status}>{status}</small>
    </main>
  );
}
