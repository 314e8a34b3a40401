"""Process groups, headers, and collectives that count their bytes."""

from lightning_slowmo.communication.meeting import Header, Meeting, Reason, meet, require_equal
from lightning_slowmo.communication.workers import SyncError, Traffic, Workers

__all__ = ["Header", "Meeting", "Reason", "SyncError", "Traffic", "Workers", "meet", "require_equal"]
