"""The highest resident set of this process, and setting it back, so that a part of a program has a peak of its own."""

from __future__ import annotations

from pathlib import Path

__all__ = ["host_peak", "reset_host_peak"]


def host_peak() -> int:
    """Bytes of the highest resident set (VmHWM). Not ru_maxrss: a child's begins with its parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(kibibytes)


def reset_host_peak() -> bool:
    """Sets the peak back to what is resident now; False where the system forbids it: the peak is then the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
