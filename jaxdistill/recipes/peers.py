"""End this process when another one of the run has died, with one line that names it.

A collective operation waits for all processes, on accelerators without an end. JAX finds a dead
process too, but ends the others with a stack trace that names no host.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from typing import Any

import jax
from jax._src.distributed import global_state  # the key-value store is not public

HEARTBEAT = 100.0  # seconds without a beat after which a process counts as dead; JAX's own default
_BEATS = "jaxdistill/beats/"
_DONE = "done"
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection", "Socket closed")


def coordinator() -> str:
    """Return the address and port of the first process of the run that this process has joined."""
    return global_state.coordinator_address or ""


class Peers:
    """A thread that beats for this process and watches the others."""

    def __init__(self, coordinator: str, heartbeat: float = HEARTBEAT) -> None:
        """Start the thread.

        Args:
            coordinator: address and port of the first process.
            heartbeat: seconds.
        """
        self._client: Any = global_state.client
        self._coordinator, self._heartbeat = coordinator, heartbeat
        self._me, self._closed = jax.process_index(), threading.Event()
        self._names = {0: coordinator.rsplit(":", 1)[0]}
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        self._beat("0")
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Stop watching; the others no longer wait for this process."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            with contextlib.suppress(RuntimeError):  # the first process has ended already
                self._beat(_DONE)

    def wait(self, error: Exception) -> None:
        """Wait for as long as it takes to find a dead process, if an error may come of one."""
        if any(word in str(error) for word in _LOST):
            self._closed.wait(self._heartbeat + 3 * self._pause)

    @property
    def _pause(self) -> float:
        return min(2.0, self._heartbeat / 5)

    def _beat(self, text: str) -> None:
        key = f"{_BEATS}{self._me}"
        self._client.key_value_set(key, f"{text} {socket.gethostname()}", allow_overwrite=True)

    def _watch(self) -> None:
        count = 0
        while not self._closed.wait(self._pause):
            count += 1
            try:
                self._beat(str(count))
                beats = self._client.key_value_dir_get(_BEATS)
            except RuntimeError:  # the first process holds the store
                if not self._closed.is_set() and self._coordinator_is_dead():
                    self._end(0)
                continue
            now = time.monotonic()
            for key, value in beats:
                index, (text, name) = int(key.rsplit("/", 1)[-1]), value.split(" ", 1)
                self._names[index] = name
                if self._seen.get(index, ("", 0))[0] != text:
                    self._seen[index] = text, now
                elif text != _DONE and now - self._seen[index][1] > self._heartbeat:
                    self._end(index)

    def _coordinator_is_dead(self) -> bool:
        host, port = self._coordinator.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), 1).close()
        except OSError:
            return True
        return False

    def _abort(self, _: int) -> None:
        """JAX aborts at once where the first process has died."""
        if self._me and self._coordinator_is_dead():
            self._end(0)

    def _end(self, index: int) -> None:
        name = self._names.get(index, "unknown")
        line = f"error: process {index} on host {name} has died; start all again with --resume\n"
        os.write(2, line.encode())
        os._exit(1)
