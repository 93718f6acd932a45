"""The transcripts that the SDK and its CLI keep: found, read, copied, appended to, removed."""

from typing import NewType

Revision = NewType("Revision", int)
"""How far a transcript has come: the same while nobody has written to it, a greater one afterwards.

Nobody beyond this room looks into it. Of a file it is the size in bytes.
"""

NOTHING = Revision(0)
"""Of a transcript that is yet to be written."""
