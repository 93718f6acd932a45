// One turn over fetch, to its end, however often the connection breaks: node fetch.mjs URL BODY
import { EventSourceParserStream } from "eventsource-parser/stream";

export async function* follow(url, body) {
  // The key covers a break before the first event, the ID of the last event every later one.
  const headers = { "content-type": "application/json", "idempotency-key": crypto.randomUUID() };
  for (;;) {
    try {
      const response = await fetch(`${url}/v1/chat`, { method: "POST", headers, body });
      if (response.status === 204) return; // nothing is left
      if (response.status !== 200) throw Object.assign(new Error((await response.json()).code), { refused: true });
      const events = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
      for await (const event of events) {
        headers["last-event-id"] = event.id;
        yield event;
        if (event.event === "end") return;
      }
    } catch (error) {
      if (error.refused) throw error;
      console.error(`the connection broke (${error.message}); going on`);
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

for await (const event of follow(...process.argv.slice(2))) console.log(event.id, event.event);
