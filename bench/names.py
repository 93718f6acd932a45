"""What is measured, by name and by size; no library is needed to read the figures again."""

SIZES = (2, 100, 1000)  # messages of the conversation before the turn that is measured
AT_ONCE = (1, 2, 4, 8, 16)  # threads

# Ways to bring a turn, or a delta, to its reader.
CONNECTED = "ClaudeSDKClient, connected"
OURS = "sidecar, all of it"
UI = "sidecar, in the AI SDK's dialect"
MADE = "asdict + json.dumps"
SENT = "asdict + json.dumps, sent by Starlette"

ROWS = (1_000, 1_000_000)  # of the session map
DEPTH = 100_000  # rows before the deepest page
STARTED = (0, 1_000_000, 10_000_000)  # rows of the map that a sidecar is started on

# A page of a list with what the transcripts tell.
FIRST = "50 threads with metadata, first time"
AGAIN = "50 threads with metadata, again"

RESUMED = (100, 2000)  # messages of a conversation that goes on on another replica

# Where the session map and the transcripts are.
ON_SQLITE = "SQLite"
ON_POSTGRES = "PostgreSQL"

# Where the next turn of a conversation is taken.
LOCAL = "SQLite"
HERE = "PostgreSQL, the same replica"
THERE = "PostgreSQL, another replica"

# Where conversations are had that go on at once.
ONE = "one replica"
FLEET = "three replicas, a thread on one of them"
SCATTERED = "three replicas, each turn on the next"

# How many processes to keep, for how many people; which of them make room; and how people go from thread to thread.
PEOPLE = (50, 100, 200, 500, 1000, 2000)
KEPT = (8, 16, 32, 64, 128, 256)
LIVE = (8,)  # of the real run
ORDERS = ("last use", "use lately", "age", "oracle")
LOADS = ("to old threads by Zipf", "to new threads")
