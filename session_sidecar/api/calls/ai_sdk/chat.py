"""`/v1/ai-sdk/chat`: what `useChat` calls. The same turns and the same history as of `/v1/chat`, in other frames."""

import urllib.parse

from starlette.responses import Response

from session_sidecar.api.calls.ai_sdk.chunks import ui_messages
from session_sidecar.api.calls.ai_sdk.messages import user, written
from session_sidecar.api.calls.ai_sdk.parts import dumped
from session_sidecar.api.calls.ai_sdk.requests import Loading, Resuming, Sending
from session_sidecar.api.calls.chat import TurnResponse, begun_by
from session_sidecar.api.http import Incoming
from session_sidecar.api.streams.frames import Dialect
from session_sidecar.observe.tracing import as_the_caller_says
from session_sidecar.sessions.chats import AskedExchanges

STREAM_HEADER = "x-vercel-ai-ui-message-stream"
AI_SDK = Dialect(ui_messages, {STREAM_HEADER: "v1"})


async def send_message(call: Incoming[Sending]) -> Response:
    """`POST /v1/ai-sdk/chat`: run a turn with the last of the messages; the AI SDK's client makes this call.

    The message before it says where it goes. On, where a thread of the chat ends with it. Else into a new branch, which
    is what editing a message and regenerating an answer come to: its thread has a name of its own, the `threadId` in
    the metadata of `start`, and what was there stays.
    """
    request = begun_by(call.request, call.asked.turn())
    with as_the_caller_says(call.request.headers):
        turn = await call.services.chats.begin(request, call.asked.parents, branch=call.asked.branch)
    return TurnResponse(call, turn, AI_SDK)


async def resume_stream(call: Incoming[Resuming]) -> Response:
    """`GET /v1/ai-sdk/chat/{id}/stream`: the stream of the running turn, from its beginning.

    204 where none runs: what has ended is in the history. Of several branches it is the turn that was begun last.
    """
    turn = await call.services.chats.running(call.asked.key, branch=call.asked.branch)
    return Response(status_code=204) if turn is None else TurnResponse(call, turn, AI_SDK)


async def load_chat(call: Incoming[Loading]) -> Response:
    """`GET /v1/ai-sdk/chat/{id}`: the messages of the branch of a chat that was used last, as `useChat` takes them.

    The newest turns come first, each of them whole; the `Link` header with `rel="prev"` leads to those before. Of a
    turn that runs there is the user's message: the rest comes with its stream.
    """
    asked = call.asked
    wanted = AskedExchanges(asked.limit, asked.before)
    row, page, turn = await call.while_there(call.services.chats.page(asked.key, wanted, written, branch=asked.branch))
    messages = [one for one in page.written if one]
    if turn is not None and turn.origin == "message" and asked.before is None:
        messages.append(dumped(user(row.thread_id, turn.id, turn.request.content)))
    headers = {}
    if page.next is not None:
        again = {**asked.model_dump(exclude_unset=True, exclude={"id"}), "before": page.next}
        headers["Link"] = f'<?{urllib.parse.urlencode(again)}>; rel="prev"'
    return Response(f"[{','.join(messages)}]".encode(), media_type="application/json", headers=headers)
