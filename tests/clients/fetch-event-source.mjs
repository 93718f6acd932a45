// @microsoft/fetch-event-source as its users have it: it repeats its POST by itself, with the ID of the last event.
import { fetchEventSource } from "@microsoft/fetch-event-source";

globalThis.window = globalThis;
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} }; // it is made for browsers
const [url, body] = process.argv.slice(2);
await fetchEventSource(`${url}/v1/chat`, {
  method: "POST",
  headers: { "content-type": "application/json" },
  body,
  onmessage: (event) => event.event && console.log(event.id, event.event),
  onclose: () => {
    throw new Error("closed: try again"); // as its documentation has it for servers that should not close
  },
  onopen: async (response) => {
    if (response.status === 204) process.exit(0); // nothing is left
  },
  onerror: () => 100, // milliseconds
});
