// A turn that runs, or has just ended, over EventSource: node eventsource.mjs URL THREAD RESOURCE
// In a browser the class is there, and URL is your backend's, which proxies to the sidecar.
import { EventSource } from "eventsource";

const [url, thread, resource] = process.argv.slice(2);
const source = new EventSource(`${url}/v1/chat?${new URLSearchParams({ thread_id: thread, resource_id: resource })}`);
// EventSource knows events by name, and reconnects by itself, after the last one that it had.
for (const name of ["session", "system", "stream_event", "assistant", "user", "result", "end"])
  source.addEventListener(name, (event) => {
    console.log(event.lastEventId, name);
    if (name === "end") source.close(); // without this it asks once more, and 204 tells it to stop
  });
