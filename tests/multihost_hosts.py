"""Hosts made of network namespaces: each with its own card, address, host name and table of names."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

CARD = "eth0"
TUN = Path("/dev/net/tun")


def why_not() -> str:
    """Why this machine cannot make hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"no command {tool} here"
    try:
        with Hosts(1) as hosts:
            hosts.run(0, ["true"])
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


class Hosts:
    """`size` hosts `host0`, `host1`, ... at one switch, apart from this machine's own network.

    With `delay`, a wire joins two hosts, and every packet takes that many seconds on it. The wire runs in user space,
    because many kernels lack netem.
    """

    def __init__(self, size: int, delay: float = 0.0) -> None:
        self.size, self.delay = size, delay
        key = f"gd{secrets.token_hex(3)}"
        self.spaces = [f"{key}-host{host}" for host in range(size)]
        self.switch = f"{key}-switch"
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        try:
            for space in [*self.spaces, self.switch]:
                self._ip("netns", "add", space)
                self._undo.callback(self._remove, space)
                self._ip("-n", space, "link", "set", "lo", "up")
            for host in range(self.size):
                self._table_of_names(host)
                # The kernel gives a dead connection up after 6 s, not a quarter of an hour.
                self.run(host, ["sh", "-c", "echo 4 > /proc/sys/net/ipv4/tcp_retries2"])
            if self.delay:
                self._lay_wire()
            else:
                self._build_switch()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def start(self, host: int, command: Sequence[str], env: Mapping[str, str], output: Path) -> subprocess.Popen[str]:
        """Start the command as a process on this host; its output goes to a file."""
        with output.open("w") as file:
            return subprocess.Popen(
                self._on(host, command), env=dict(env), stdout=file, stderr=subprocess.STDOUT, text=True
            )

    def run(self, host: int, command: Sequence[str]) -> str:
        return subprocess.run(self._on(host, command), capture_output=True, text=True, check=True, timeout=20).stdout

    def processes(self) -> list[int]:
        """All processes on all hosts."""
        return [int(pid) for space in self.spaces for pid in self._ip("netns", "pids", space).split()]

    def cut(self, host: int) -> None:
        """Pull this host's cable."""
        self._ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def _on(self, host: int, command: Sequence[str]) -> list[str]:
        name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host{host}"]
        return ["ip", "netns", "exec", self.spaces[host], *name, *command]

    def _build_switch(self) -> None:
        self._ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.switch, "link", "set", "bridge", "up")
        for host, space in enumerate(self.spaces):
            port = f"port{host}"
            self._ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", CARD, "netns", space)
            self._ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            self._ip("-n", space, "address", "add", f"{self.address(host)}/24", "dev", CARD)
            self._ip("-n", space, "link", "set", CARD, "up")

    def _lay_wire(self) -> None:
        ends = []
        for host, space in enumerate(self.spaces):
            name = f"{self.switch[:8]}{host}"
            end = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            self._undo.callback(os.close, end)
            fcntl.ioctl(end, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF, TUN without header
            self._ip("link", "set", name, "netns", space, "name", CARD)
            self._ip("-n", space, "address", "add", self.address(host), "peer", self.address(1 - host), "dev", CARD)
            self._ip("-n", space, "link", "set", CARD, "up")
            ends.append(end)
        stop = threading.Event()
        relay = threading.Thread(target=_relay, args=(ends, self.delay, stop), daemon=True)
        relay.start()
        self._undo.callback(relay.join)
        self._undo.callback(stop.set)

    def _table_of_names(self, host: int) -> None:
        """Write the file that `ip netns exec` shows as /etc/hosts."""
        folder = Path("/etc/netns") / self.spaces[host]
        folder.mkdir(parents=True)
        self._undo.callback(shutil.rmtree, folder)
        lines = ["127.0.0.1 localhost", *(f"{self.address(other)} host{other}" for other in range(self.size))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def _remove(self, space: str) -> None:
        for pid in self._ip("netns", "pids", space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._ip("netns", "delete", space)

    @staticmethod
    def _ip(*arguments: str) -> str:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20).stdout


def _relay(ends: list[int], delay: float, stop: threading.Event) -> None:
    """Carries packets between the ends of a wire, each `delay` seconds after it arrived."""
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    while not stop.is_set():
        wait = max(on_the_way[0][0] - time.monotonic(), 0) if on_the_way else 0.1
        for end in select.select(ends, [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError, OSError):
                other = ends[1 - ends.index(end)]
                on_the_way.append((time.monotonic() + delay, other, os.read(end, 65536)))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, end, packet = on_the_way.popleft()
            with contextlib.suppress(OSError):  # a card that is down takes nothing
                os.write(end, packet)
