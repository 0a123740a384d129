"""Take the network away from this process and its children, before any model file is read.

A network namespace of its own, with loopback only, where the kernel allows one; otherwise a
Landlock rule set that refuses every TCP connect and bind (Linux 6.7, docs.kernel.org
userspace-api/landlock), which needs no privilege and works within containers. With Landlock UDP
stays possible, and a job on several accelerators, whose ranks talk to each other, is refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from bitmill.errors import ResourceError

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_BIND_TCP, _CONNECT_TCP = 1, 2
_PR_SET_NO_NEW_PRIVS = 38
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_libc = ctypes.CDLL(None, use_errno=True)


def isolate_network(*, ranks: bool = False) -> str:
    """Cut this process off and answer how: "namespace" or "landlock".

    ranks: it starts processes that talk to each other. Call it while the process has a single
    thread. Raises `ResourceError` (code `cannot_isolate`) where the system allows neither.
    """
    if _enter_namespace():
        return "namespace"
    if ranks:
        raise ResourceError(
            "the ranks of a job on several devices need a network namespace of their own, which "
            "this system refuses: allow user namespaces, give devices 1, or set "
            "BITMILL_RUNNER_NETWORK=keep",
            code="cannot_isolate",
            param="devices",
        )
    if _landlock():
        return "landlock"
    raise ResourceError(
        "the runner cannot be cut off from the network here: allow user namespaces or Landlock, "
        "or set BITMILL_RUNNER_NETWORK=keep",
        code="cannot_isolate",
    )


def _enter_namespace() -> bool:
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_CLONE_NEWNET) == 0:
        _loopback_up()
        return True
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _loopback_up()
    return True


def _loopback_up() -> None:
    """Ranks of one job talk over loopback; without it only they would suffer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle, suppress(OSError):
        request = struct.pack("16sh14x", b"lo", 0)
        answer = fcntl.ioctl(handle, _SIOCGIFFLAGS, request)
        (flags,) = struct.unpack("16xh14x", answer)
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _landlock() -> bool:
    handled = struct.pack("QQ", 0, _BIND_TCP | _CONNECT_TCP)
    rules = _libc.syscall(_LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    if rules < 0:
        return False
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        return bool(_libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0) == 0)
    finally:
        os.close(rules)
