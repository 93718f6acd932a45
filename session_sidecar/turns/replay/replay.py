"""The turns that can be read again: by who rejoins a thread, and by a retry under an `Idempotency-Key`.

They are held in one budget of memory, the running ones included. Beyond it go, in this order,
  - the ended turns that nobody reads, the least recently used first;
  - of the turns in use (they run, or are being read) the oldest events of the one that holds most: a reader that keeps
    up misses nothing. Each keeps its two newest, so that whoever waits for an answer gets it.
So the sum is the budget, or the two newest events of each turn in use if these are more. A turn's message is not
counted, and is let go when the turn ends. A key outlives its turn, without anything that was said: what was run is not
run twice.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from session_sidecar.errors import HeldElsewhere, IdempotencyMismatch, ReplayGone, ThreadExists, ThreadMoved
from session_sidecar.settings import Settings
from session_sidecar.turns.events import EventLog
from session_sidecar.turns.replay.keys import KEY_SECONDS, digest, gone, mismatch
from session_sidecar.turns.turn import Turn, TurnRequest
from session_store import ThreadKey

# Beyond so many keys the oldest ended ones are forgotten here; `Keys` still knows them.
MAX_KEYS = 10_000
# What a turn takes in memory beside its events and its text.
TURN_BYTES = 5 * 2**10
SWEEP_SECONDS = 1.0
# What was refused for the thread that it would make or that moved on, for its key, or is another replica's, is no turn
# of the thread.
_REFUSED = (ThreadExists, ThreadMoved, IdempotencyMismatch, ReplayGone, HeldElsewhere)

_Key = tuple[str, str]


@dataclass(slots=True)
class _Attempt:
    """What was asked for under a key, as a digest, and the turn that this began: None once it is no longer held."""

    digest: bytes
    turn: Turn | None
    turn_id: str
    ended: float | None = None


class Replay:
    """All turns from their beginning until they are forgotten, by thread and by idempotency key."""

    def __init__(self, settings: Settings) -> None:
        """The memory that turns may take, and for how long they do, is in the settings."""
        self._settings = settings
        self._most_bytes = settings.replay_bytes_of_all
        self._bytes = 0
        self._running: set[Turn] = set()
        self._ended: dict[Turn, None] = {}  # least recently used first
        self._threads: dict[ThreadKey, dict[str, Turn]] = {}  # the ended turns of each by ID, oldest first
        self._attempts: dict[_Key, _Attempt] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def held_bytes(self) -> int:
        """The memory that is taken at the moment."""
        return self._bytes

    def log(self) -> EventLog:
        """A log for a turn that is about to begin."""
        limits = self._settings
        return EventLog(max_events=limits.replay_events, max_bytes=limits.replay_bytes, on_growth=self._grow)

    def find(self, request: TurnRequest) -> Turn | None:
        """The turn that an earlier attempt of this request began; None also for a request without a key.

        Raises IdempotencyMismatch for a key that was used with another body, ReplayGone for a turn that is not held.
        """
        attempt = self._attempts.get(_key(request))
        if attempt is None:
            return None
        if attempt.digest != digest(request):
            raise mismatch()
        if attempt.turn is None:
            raise gone(attempt.turn_id)
        self._use(attempt.turn)
        return attempt.turn

    def begun(self, request: TurnRequest) -> TurnRequest | None:
        """What an earlier attempt under the same key has asked for, whatever this one does; None where there is none.

        Raises ReplayGone for a turn that is not held.
        """
        attempt = self._attempts.get(_key(request)) if request.idempotency_key is not None else None
        if attempt is None:
            return None
        if attempt.turn is None:
            raise gone(attempt.turn_id)
        return attempt.turn.request

    def again(self, request: TurnRequest, turn: Turn | None, turn_id: str) -> Turn:
        """The turn that a reader comes back to with what had begun it.

        Raises ReplayGone for one that is not held, IdempotencyMismatch for one that something else has begun.
        """
        if turn is None:
            raise replay_gone(turn_id)
        if turn.digest != digest(request):
            raise IdempotencyMismatch("`Last-Event-ID` names a turn that another body has begun. Leave the header out.")
        return turn

    def latest(self, key: ThreadKey) -> Turn | None:
        """The turn that ended last on a thread, for a while."""
        turns = self._threads.get(key)
        return self._used(next(reversed(turns.values()))) if turns else None

    def named(self, key: ThreadKey, turn_id: str) -> Turn | None:
        """The turn of this ID that has ended on a thread, for a while."""
        return self._used(self._threads.get(key, {}).get(turn_id))

    def _used(self, turn: Turn | None) -> Turn | None:
        if turn is None or not self._can_be_rejoined(turn):
            return None
        self._use(turn)
        return turn

    def keep(self, turn: Turn) -> None:
        """Hold a turn that has just begun, whose log is from here."""
        self._running.add(turn)
        turn.digest = digest(turn.request)
        if turn.request.idempotency_key is not None:
            self._attempts[_key(turn.request)] = _Attempt(turn.digest, turn, turn.id)
            if len(self._attempts) > MAX_KEYS:
                self._forget_a_key()
        self._grow(TURN_BYTES)

    def ended(self, turn: Turn) -> None:
        """Hold a turn, which has just ended, as long as it may be asked for.

        One that never reached the agent leaves its key: nothing of it was run, so the retry may.
        """
        self._running.discard(turn)
        self._ended[turn] = None
        if (attempt := self._attempt(turn)) is not None:
            attempt.ended = turn.times["end"]
            if turn.session is None:
                del self._attempts[_key(turn.request)]
        earlier = self._threads.setdefault(turn.request.key, {})
        of_thread = list(earlier.values())
        if not isinstance(turn.error, _REFUSED):
            earlier[turn.id] = turn
        self._bytes += sys.getsizeof(turn.text)
        # They ended one after the other: behind one that can be rejoined there is none that cannot be, for its age.
        self._tidy([*itertools.takewhile(lambda before: not self._can_be_rejoined(before), of_thread), turn])
        self._make_room()
        self._sweep_later()

    def forget(self, key: ThreadKey) -> None:
        """Let nobody read again what ended on this thread; the keys stay used."""
        turns = list(self._threads.pop(key, {}).values())
        for turn in turns:
            if (attempt := self._attempt(turn)) is not None:
                attempt.turn = None
        self._tidy(turns)

    def close(self) -> None:
        """Sweep no more."""
        if self._sweeping is not None:
            self._sweeping.cancel()

    # The budget

    def _grow(self, size: int) -> None:
        self._bytes += size
        self._make_room()

    def _make_room(self) -> None:
        while self._bytes > self._most_bytes:
            unread = next((turn for turn in self._ended if not turn.is_read), None)
            if unread is not None:
                self._drop(unread)
                continue
            in_use = [turn.log for turn in (*self._running, *self._ended) if turn.log.can_shrink]
            if not in_use:
                return
            # No further than to its half at once: then another one may be the largest.
            largest = max(in_use, key=lambda log: log.size)
            self._bytes -= largest.shrink(max(largest.size // 2, largest.size - self._bytes + self._most_bytes))

    def _use(self, turn: Turn) -> None:
        """Put a turn behind those that were used less recently."""
        if turn in self._ended:
            del self._ended[turn]
            self._ended[turn] = None

    def _drop(self, turn: Turn) -> None:
        """Hold an ended turn no longer."""
        del self._ended[turn]
        self._bytes -= TURN_BYTES + turn.log.size + sys.getsizeof(turn.text)
        if (attempt := self._attempt(turn)) is not None:
            attempt.turn = None
        if (turns := self._threads.get(turn.request.key)) is not None:
            turns.pop(turn.id, None)
            if not turns:
                del self._threads[turn.request.key]

    # Time

    def _sweep_later(self) -> None:
        if self._sweeping is None and (self._ended or self._attempts):
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Forget what its time is over for, and what only a reader kept that has left."""
        self._sweeping = None
        limit = time.monotonic() - KEY_SECONDS
        for key, attempt in list(self._attempts.items()):
            if attempt.ended is not None and attempt.ended < limit:
                del self._attempts[key]
        self._tidy(list(self._ended))
        self._make_room()
        self._sweep_later()

    def _tidy(self, turns: Iterable[Turn]) -> None:
        """Drop those of these ended turns that nobody reads nor can ask for."""
        for turn in turns:
            wanted = self._can_be_rejoined(turn) or self._attempt(turn) is not None
            if not wanted and not turn.is_read:
                self._drop(turn)

    def _can_be_rejoined(self, turn: Turn) -> bool:
        age = time.monotonic() - turn.times["end"]
        return age < self._settings.replay_seconds and turn.id in self._threads.get(turn.request.key, {})

    def _attempt(self, turn: Turn) -> _Attempt | None:
        """The attempt that began this turn, if it can still be repeated for that."""
        attempt = self._attempts.get(_key(turn.request))
        return attempt if attempt is not None and attempt.turn is turn else None

    def _forget_a_key(self) -> None:
        oldest = next((key for key, attempt in self._attempts.items() if attempt.ended is not None), None)
        if oldest is not None:
            turn = self._attempts.pop(oldest).turn
            self._tidy([turn] if turn is not None else [])


def replay_gone(turn_id: str) -> ReplayGone:
    """What a reader is told who comes back to a turn that is held nowhere."""
    return ReplayGone(
        "The turn that `Last-Event-ID` names is no longer held, and nothing was started. Read its answer from the "
        "session's messages; to send the message once more, leave the header out.",
        turn_id=turn_id,
    )


def _key(request: TurnRequest) -> _Key:
    return request.key.resource_id, request.idempotency_key or ""
