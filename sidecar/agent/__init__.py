"""The only place that knows the Claude Agent SDK: options, processes, transcripts."""

from sidecar.agent.options import Agents, Launch, safe_options
from sidecar.agent.process import AgentProcess
from sidecar.agent.transcripts import Transcripts

__all__ = ["AgentProcess", "Agents", "Launch", "Transcripts", "safe_options"]
