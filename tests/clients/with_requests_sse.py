"""requests-sse as its users have it: it repeats its POST by itself, with the ID of the last event."""

import json
import sys
from datetime import timedelta

from requests_sse import EventSource

url, body = sys.argv[1:]
again = timedelta(milliseconds=100)
with EventSource(f"{url}/v1/chat", "POST", reconnection_time=again, timeout=10, json=json.loads(body)) as source:
    for event in source:
        print(event.last_event_id, event.type, flush=True)
        if event.type == "end":
            break
