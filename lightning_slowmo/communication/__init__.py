"""Who takes part, headers, and what carries messages between workers and counts their bytes."""

from lightning_slowmo.communication.meeting import Header, Meeting, Reason, Round, meet, require_equal
from lightning_slowmo.communication.workers import SyncError, Traffic, Workers

__all__ = ["Header", "Meeting", "Reason", "Round", "SyncError", "Traffic", "Workers", "meet", "require_equal"]
