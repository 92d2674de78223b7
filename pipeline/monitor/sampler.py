"""Samples the GPUs of this node beside training and tells of a sick one; never disturbs what it watches."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.publish import APPEND, plain
from pipeline.monitor import health
from pipeline.monitor.fold import Fold
from pipeline.monitor.health import Finding

if TYPE_CHECKING:
    from pipeline.monitor import nvml

FLUSH_S = 10.0  # one write for all GPUs, so that many nodes do not trouble a shared file system
SILENT_S = 10.0  # without an answer of the driver
STOP_S = 1.0  # stop() does not wait longer: a call into the driver may hang for ever
NOT_SAMPLED = ("remap_pending", "remap_failed", "recovery_action")


class Sampler:
    """Writes one line per GPU and window to ``folder/NODE.jsonl`` and judges what it reads, in daemon threads.

    A GPU is read every ``interval_s``; the windows (`Fold`) grow with the age of the stage, ``begun`` in Unix time.
    The file is the run's: each line has stage and attempt, of ``labels`` (stage, attempt, node), and ``begun``.
    ``say`` gets a line about the monitoring itself (no driver), each at most once. ``on_warning(line, facts)`` gets
    each new finding once, ``on_fatal(line)`` the first fatal one, whose facts are then in ``fatal``; facts are stage,
    attempt, node, gpu, uuid, verdict and line. All are called from the sampler's threads. Nothing here raises, and no
    call into the driver, however long it blocks, delays ``start`` or ``stop``: each GPU has a thread of its own.
    """

    def __init__(
        self,
        folder: Path,
        labels: Mapping[str, str | int],
        *,
        say: Callable[[str], None],
        on_warning: Callable[[str, dict[str, Any]], None],
        on_fatal: Callable[[str], None],
        interval_s: float = 1.0,
        begun: float,
    ) -> None:
        self.fatal: dict[str, Any] | None = None
        self._folder, self._labels, self._interval_s, self._begun_at = folder, dict(labels), interval_s, begun
        self._node = str(labels["node"])
        self._say, self._on_warning, self._on_fatal = say, on_warning, on_fatal
        self._told: set[str] = set()
        self._telling = threading.Lock()
        self._stopping = threading.Event()
        self._lines: deque[str] = deque(maxlen=100_000)  # a bound should the file system hang for hours
        self._asked: dict[int, float] = {}  # when the driver was asked about a GPU and has not answered yet
        self._uuids: dict[int, str] = {}
        self._unsaid: dict[int, str] = {}  # UUIDs that no line has yet
        self._main = self._thread(self._run)
        self._writable, self._begun = True, False

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to sample; returns at once."""
        self._main.start()

    def stop(self) -> None:
        """Write what is left and end; returns within about a second even when the driver hangs."""
        self._stopping.set()
        self._main.join(STOP_S)

    def _thread(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*arguments)
            except Exception as error:
                self._say_once(f"GPU monitoring on {self._node} ended: {type(error).__name__}: {error}")

        return threading.Thread(target=guarded, name="gpu-sampler", daemon=True)

    def _run(self) -> None:
        """Start a thread for each GPU; then write their lines and notice those that fall silent."""
        try:
            from pipeline.monitor import nvml  # here, since importing pynvml needs the package, and time
        except ImportError as error:
            self._say_once(f"no GPU monitoring on {self._node}: {error}; pip install nvidia-ml-py")
            return
        try:
            indices = nvml.visible(os.environ, nvml.open_library())
        except nvml.NvmlFault as fault:
            _, meaning = health.RETURN_CODES.get(fault.code, ("", f"NVML return code {fault.code}"))
            self._say_once(f"no GPU monitoring on {self._node}: {meaning}")
            return
        watchers = [self._thread(self._watch, index) for index in indices]
        for watcher in watchers:
            watcher.start()
        written = float("-inf")
        while not self._stopping.wait(self._interval_s):
            now = time.monotonic()
            for index, asked in list(self._asked.items()):
                if now - asked > SILENT_S:
                    meaning = f"the driver has not answered for {SILENT_S:.0f} s"
                    self._judge(index, [Finding("silent", "warn", meaning)])
            if now - written > FLUSH_S:
                self._write()
                written = now
        deadline = time.monotonic() + STOP_S / 2
        for watcher in watchers:
            watcher.join(max(0.0, deadline - time.monotonic()))
        self._write()

    def _watch(self, index: int) -> None:
        from pipeline.monitor import nvml

        self._asked[index] = time.monotonic()
        try:
            gpu = nvml.Gpu(index)
        except nvml.NvmlFault as fault:
            self._asked.pop(index)
            unread = Finding("not sampled", "warn", f"is not sampled: {health.RETURN_CODES[fault.code][1]}")
            self._judge(index, health.of_code(fault.code) or [unread])
            return
        self._uuids[index] = self._unsaid[index] = gpu.uuid
        before: dict[str, Any] = {}
        fold, now = Fold(max(0.0, time.time() - self._begun_at)), time.time()
        while not self._stopping.is_set():
            now = time.time()
            started = self._asked[index] = time.monotonic()
            reading, codes = gpu.read()
            self._asked.pop(index)
            if reading:
                sampled = {key: value for key, value in reading.items() if key not in NOT_SAMPLED}
                self._keep(now, gpu, fold.add(started, sampled))
            findings = [finding for code in sorted(codes) for finding in health.of_code(code)]
            self._judge(index, health.of_xids(reading.get("xid", ())) + findings + health.of_reading(reading, before))
            before |= reading
            self._stopping.wait(max(0.0, started + self._interval_s - time.monotonic()))
        self._keep(now, gpu, fold.close())

    def _keep(self, now: float, gpu: nvml.Gpu, window: dict[str, Any] | None) -> None:
        """Have a window written, where there is one."""
        if window is not None:
            head = {"time": round(now, 3), "stage": self._labels["stage"], "begun": self._begun_at}
            head |= {"attempt": self._labels["attempt"], "gpu": gpu.index}
            which = {"uuid": self._unsaid.pop(gpu.index, ""), "name": gpu.name}
            which = {key: text for key, text in which.items() if text}
            self._lines.append(json.dumps({**head, **which, **window}, separators=(",", ":")) + "\n")

    def _judge(self, index: int, findings: list[Finding]) -> None:
        """Tell what is new."""
        for finding in findings:
            uuid = self._uuids.get(index, "")
            facts: dict[str, Any] = {
                **self._labels,
                "gpu": index,
                "uuid": uuid,
                "verdict": finding.verdict,
                "line": health.line(self._node, index, uuid, finding.meaning),
            }
            fatal = finding.verdict == "fatal"
            with self._telling:
                key = f"gpu {index} {finding.key}"
                if key in self._told or (fatal and self.fatal) or self._stopping.is_set():
                    continue
                self._told.add(key)
                if fatal:
                    self.fatal = facts
            try:
                if fatal:
                    self._on_fatal(facts["line"])
                else:
                    self._on_warning(facts["line"], facts)
            except Exception as error:
                self._say_once(f"{facts['line']} (and telling it failed: {type(error).__name__}: {error})")

    def _say_once(self, text: str) -> None:
        with self._telling:
            if text in self._told or self._stopping.is_set():
                return
            self._told.add(text)
        with contextlib.suppress(Exception):
            self._say(text)

    def _write(self) -> None:
        """Append the lines so far. After a fault no more is written, since it may have left half a line."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if not lines or not self._writable:
            return
        path = self._folder / f"{self._node}.jsonl"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(plain(path, APPEND), "ab+") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                cut = not self._begun and file.read(1) not in (b"", b"\n")  # an attempt before ended within a line
                file.write(("\n" * cut + "".join(lines)).encode())
                self._begun = True
        except OSError as error:
            self._writable = False
            self._say_once(f"GPU samples of {self._node} end here: {error.strerror}: {path}")
