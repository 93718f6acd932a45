"""From the files of transcripts to what is asked of them, within bounds. No SDK here, and no HTTP.

So that a process that only copies does not load the SDK: that takes a second and 60 MiB.
"""

from sidecar.reading.pool import Readers

__all__ = ["Readers"]
