"""The only place that knows the Claude Agent SDK: options, processes, transcripts."""

from sidecar.agent.options import Agents, Launch, safe_options
from sidecar.agent.pool import Fingerprint, ProcessPool, Spare
from sidecar.agent.process import AgentProcess, Prompt, without_session
from sidecar.agent.transcripts import Transcripts

__all__ = [
    "AgentProcess",
    "Agents",
    "Fingerprint",
    "Launch",
    "ProcessPool",
    "Prompt",
    "Spare",
    "Transcripts",
    "safe_options",
    "without_session",
]
