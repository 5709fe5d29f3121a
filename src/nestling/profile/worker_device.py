"""WorkerDevice: a device behind a worker, which is asked to measure and run ONNX files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nestling.file_keys import content_key
from nestling.profile.address import Address
from nestling.profile.kernels import Kernel, MadeUp, OptimizedOp
from nestling.profile.measurement import Conditions, Elsewhere, Fingerprint, Measurement
from nestling.profile.quiet import QuietTimes
from nestling.profile.reference import reference_model
from nestling.profile.runtimes import RUNTIMES
from nestling.profile.store import MeasurementStore
from nestling.profile.transport import (
    Answer,
    DeviceError,
    DevicesGoneError,
    LineLostError,
    TooSlowError,
    Transport,
    WorkerLostError,
)

START_SECONDS = 60.0
"""What starting a worker may take: Python, the runtime's libraries, the reference model."""
START_PAUSES = (1.0, 4.0)
"""Seconds before each further try to start a worker that was lost while it started."""
TOO_SLOW = (
    "all that is asked of a file at once may take {:.4g} s, of which timing needs three calls; for a slower "
    "file raise profile.timeout_seconds, or --seconds of nestling profile, which allows three times as long"
)
REFERENCE = "reference"
CANDIDATE = "candidate"
BESIDE = "beside"
_COPY = re.compile(r"_token_\d+$")
"""What the runtime appends to a node's name when it changes the node's layout."""


class WorkerDevice:
    """A device behind a worker: one call at a time; the call after a loss starts another worker.

    Args:
        address: of the device.
        transport: how its worker is reached.
        seconds, tolerance, timeout_seconds: as `connect` has them.
        store: where measurements are kept.
        quiet: by which a machine that is busy all the time is told.
        start_pauses: seconds before each further try to start a worker that was lost while it started; none
            where another device is tried first, as in a pool.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        address: Address,
        *,
        transport: Transport,
        seconds: float,
        tolerance: float,
        timeout_seconds: float,
        store: MeasurementStore | None = None,
        quiet: QuietTimes | None = None,
        start_pauses: Sequence[float] = START_PAUSES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = address
        self.transport = transport
        self.seconds, self.tolerance, self.timeout_seconds = seconds, tolerance, timeout_seconds
        self.store, self.quiet = store, quiet
        self._start_pauses, self._sleep = tuple(start_pauses), sleep
        self._fingerprint: Fingerprint | None = None
        self._machine = ""
        self._held: dict[tuple[str, tuple[int, ...]], str] = {}
        self._alone = threading.RLock()

    @property
    def name(self) -> str:
        """The address, in full."""
        return self.address.name

    @property
    def settings(self) -> str:
        """How it measures, as measurements are stored by."""
        return json.dumps({"seconds": self.seconds, "tolerance": self.tolerance}, sort_keys=True)

    @property
    def fingerprint(self) -> Fingerprint:
        """What the device is; the worker is asked once."""
        if self._fingerprint is None:
            return self.start()
        return self._fingerprint

    def start(self) -> Fingerprint:
        """What the device is, with a worker running from now on.

        A worker that is lost while it starts, as where memory runs out for a moment, is started again.

        Raises:
            DeviceError: the worker cannot be started, or lacks the runtime.
            LineLostError: there is no line to it.
            DevicesGoneError: it was there before, and cannot be started any more or is another device: no
                file is to blame, and none could be measured.
        """
        with self._alone:
            known = self._fingerprint
            if known is not None and self.transport.running:
                return known
            self._held.clear()
            try:
                fingerprint = self._introduced()
            except DeviceError as error:
                if known is None or isinstance(error, LineLostError):
                    raise
                raise DevicesGoneError(
                    f"{self.name} was there and cannot be started any more: {error}; the same command "
                    "continues when it can"
                ) from error
            if known not in (None, fingerprint):
                self.transport.stop()
                raise DevicesGoneError(f"{self.name} was {known} and is now {fingerprint}")
            self._fingerprint = fingerprint
            return fingerprint

    def measure(self, path: Path) -> Measurement:
        """How long the file takes, from the store where it has been measured before.

        An unstable measurement is kept for the record only: asked again, the file is timed again. So is one
        from when the device was slower than it was seen to be since, until a stable one takes its place.

        Raises:
            DeviceError: no such file; the runtime refuses it; the worker crashed or took too long.
        """
        model = self._read(path)
        key = content_key(model)
        with self._alone:
            known = self._stored(key)
            if known is not None and not known.unstable:
                return known
            measurement = self._time(path, model)
        if self.store is None:
            return measurement
        return self.store.put(measurement, file=key, settings=self.settings, instead=known)

    def judged(self, measurement: Measurement) -> Measurement:
        """`measurement`, if it was taken here, judged by how fast the device is known to be by now."""
        if self.quiet is None or not self._machine or measurement.machine != self._machine:
            return measurement
        here = replace(measurement, fingerprint=self.fingerprint)  # a pool gives them another
        return replace(self.quiet.judged(here), fingerprint=measurement.fingerprint)

    def doubts(self, path: Path) -> bool:
        """Whether the store's time of the file is from when the device was slower than it was seen since.

        Raises:
            DeviceError: no such file.
        """
        known = self._stored(content_key(self._read(path)))
        return known is not None and known.unstable

    def predict(
        self, path: Path, images: NDArray[np.float32], *, key: str | None = None
    ) -> NDArray[np.float32]:
        """The logits (N, classes) of the file for `images` (N, 3, H, W), in batches of the file's own size.

        With a `key` the worker keeps the images, and what it holds under that key and shape is not sent
        again, unless its checksum has changed.

        Raises:
            ValueError: `images` is empty or not float32.
            DeviceError: as `measure`; or the file's input has another shape.
        """
        if images.dtype != np.float32 or images.size == 0:
            raise ValueError(f"images must be float32 and not empty, not {images.dtype} {images.shape}")
        model = self._read(path)
        with self._alone:
            self.start()
            until = self._until()
            array = self._hold(path, np.ascontiguousarray(images), key=key, until=until)
            try:
                answer = self._ask("predict", model, path=path, until=until, array=array)
            finally:
                if key is None:
                    self._drop(arrays=[array])
        logits = np.frombuffer(answer.blob, dtype="<f4").reshape(answer.message["shape"])
        return logits.astype(np.float32, copy=False)

    def optimized_ops(self, path: Path) -> tuple[OptimizedOp, ...] | None:
        """The nodes that are left after the runtime's optimizations, in order, those of subgraphs last.

        None where the runtime does not tell them, as providers of ONNX Runtime that compile what they run.

        Raises:
            DeviceError: as `measure`.
        """
        model = self._read(path)
        with self._alone:
            self.start()
            answer = self._ask("optimized", model, path=path, until=self._until())
        if answer.message["nodes"] is None:
            return None
        return tuple(
            OptimizedOp(
                name=_COPY.sub("", node["name"]),
                op=node["op"],
                reads=tuple(node["reads"]),
                writes=tuple(node["writes"]),
                precision=node.get("precision"),
            )
            for node in answer.message["nodes"]
        )

    def kernels(self, path: Path, *, runs: int = 1) -> tuple[Kernel, ...]:
        """The kernels that the runtime runs for one input of the file, in order, as its profile tells them.

        Args:
            path: the file.
            runs: over how many runs the median of their times is taken; 50 at most, and about 2 s.

        Raises:
            DeviceError: as `measure`.
        """
        model = self._read(path)
        with self._alone:
            self.start()
            answer = self._ask("kernels", model, path=path, until=self._until(), runs=runs)
        return tuple(
            Kernel(
                name=_COPY.sub("", kernel["name"]),
                op=kernel["op"],
                provider=kernel["provider"],
                reads=tuple(kernel["reads"]),
                writes=tuple(kernel["writes"]),
                microseconds=kernel["microseconds"],
            )
            for kernel in answer.message["kernels"]
        )

    def compare(self, path: Path, other: Path, *, seconds: float, fresh: bool = False) -> Measurement:
        """How long the file takes beside `other`, which stands for the reference model; kept nowhere.

        Args:
            path, other: the files.
            seconds: the longest that timing may take after warm-up on a device that is not slowed.
            fresh: whether it is done by another worker than what was done before.

        Raises:
            DeviceError: as `measure`.
        """
        model, beside = self._read(path), self._read(other)
        with self._alone:
            if fresh:
                self.transport.stop()
            self.start()
            try:
                self._ask("load", beside, path=other, until=self._until(), model=BESIDE)
                measurement = self._time(path, model, reference=BESIDE, seconds=seconds)
            finally:
                self._drop(models=[BESIDE])
        key = content_key(beside)[:12]
        return replace(measurement, fingerprint=replace(measurement.fingerprint, reference=key))

    def calibrate(self, *, seconds: float) -> Measurement:
        """How long the reference model takes, beside itself; kept nowhere.

        Raises:
            DeviceError: the device is not ready, or lost its worker.
        """
        with self._alone:
            return self._time(Path("the reference model"), reference_model(), seconds=seconds)

    def energy(self, path: Path, *, seconds: float) -> Mapping[str, float]:
        """Joules of one call by the name of the machine's counter; empty where the machine has none.

        The file runs alone for `seconds`. A counter tells of a whole processor or board, idle parts included.

        Raises:
            DeviceError: as `measure`.
        """
        model = self._read(path)
        with self._alone:
            self.start()
            until = self._until()
            try:
                self._ask("load", model, path=path, until=until, model=CANDIDATE)
                told = self._ask("energy", path=path, until=until, model=CANDIDATE, seconds=seconds).message
            finally:
                self._drop(models=[CANDIDATE])
        return {name: joules / told["calls"] for name, joules in told["joules"].items()}

    def inputs(self, path: Path) -> tuple[MadeUp, ...]:
        """The inputs that the file is timed with.

        Raises:
            DeviceError: as `measure`.
        """
        model = self._read(path)
        with self._alone:
            self.start()
            try:
                told = self._ask("load", model, path=path, until=self._until(), model=CANDIDATE).message
            finally:
                self._drop(models=[CANDIDATE])
        return tuple(MadeUp(one["name"], one["dtype"], tuple(one["shape"])) for one in told["inputs"])

    def close(self) -> None:
        """Ends the worker."""
        with self._alone:
            self.transport.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _introduced(self) -> Fingerprint:
        """What a new worker says of the device, after as many tries as the pauses allow; else none runs."""
        pauses = list(self._start_pauses)
        while True:
            try:
                self.transport.start()
                return self._introduce()
            except DeviceError as error:
                self.transport.stop()
                lost = isinstance(error, WorkerLostError) and not isinstance(error, LineLostError)
                if not lost or not pauses:
                    raise
            self._sleep(pauses.pop(0))

    def _introduce(self) -> Fingerprint:
        until = time.monotonic() + START_SECONDS
        address = self.address
        module = RUNTIMES[f"{address.engine}:{address.runtime}"].module
        said = self._ask(
            "hello",
            b"" if module is None else module.read_bytes(),
            until=until,
            engine=address.engine,
            runtime=address.runtime,
            threads=address.threads,
            memory_mb=address.memory_mb,
            options=dict(address.options),
        ).message
        reference = reference_model()
        self._ask("load", reference, until=until, model=REFERENCE)
        # boards may all have one name and no identity of their own, as phones do
        told = f"{address.place or ''} {said.get('machine', '')}"
        self._machine = hashlib.sha256(told.encode()).hexdigest()[:12]
        return Fingerprint(
            device=self.name,
            cpu=said["cpu"],
            instructions=tuple(said["instructions"]),
            cores=said["cores"],
            platform=said["platform"],
            runtime=said["runtime"],
            reference=content_key(reference)[:12],
            int8_saturates=said["int8_saturates"],
        )

    def _time(
        self, path: Path, model: bytes, *, reference: str = REFERENCE, seconds: float | None = None
    ) -> Measurement:
        fingerprint = self.start()
        best = None if self.quiet is None else self.quiet.best(fingerprint, machine=self._machine)
        gauge: dict[str, Any] = {} if best is None else {"gauge": REFERENCE, "best": best * 1e9}
        until = self._until()
        try:
            shares = ("allow_fallback", "1") in self.address.options
            loaded = self._ask("load", model, path=path, until=until, model=CANDIDATE, shares=shares).message
            answer = self._ask(
                "time",
                path=path,
                until=until,
                model=CANDIDATE,
                reference=reference,
                seconds=self.seconds if seconds is None else seconds,
                tolerance=self.tolerance,
                **gauge,
            )
        finally:
            self._drop(models=[CANDIDATE])
        candidate, beside = np.frombuffer(answer.blob, dtype="<i8").reshape(2, -1) / 1e9
        measurement = Measurement(
            fingerprint=fingerprint,
            seconds=tuple(candidate.tolist()),
            reference_seconds=tuple(beside.tolist()),
            load_seconds=loaded["load_seconds"],
            first_seconds=loaded["first_seconds"],
            conditions=Conditions.of(answer.message.get("conditions", {})),
            elsewhere=Elsewhere(**moved) if (moved := loaded.get("elsewhere")) else None,
            machine=self._machine,
        )
        if self.quiet is not None and reference == REFERENCE:
            return self.quiet.heard(measurement)
        if best is None:
            return measurement
        slowed = answer.message["gauged"] / (best * 1e9)
        return replace(measurement, conditions=replace(measurement.conditions, slowed=slowed))

    def _stored(self, key: str) -> Measurement | None:
        """What the store has of the file with this key, judged by how fast the device is known to be."""
        if self.store is None:
            return None
        known = self.store.get(key, fingerprint=self.fingerprint, settings=self.settings)
        return None if known is None else self.judged(known)

    def _hold(self, path: Path, images: NDArray[np.float32], *, key: str | None, until: float) -> str:
        """The name under which the worker holds `images`."""
        content = images.data.cast("B")
        name = "images" if key is None else f"{key} {images.shape} {zlib.crc32(content):08x}"
        slot = ("" if key is None else key, images.shape)
        held = self._held.get(slot)
        if key is not None and held == name:
            return name
        if held is not None:
            self._drop(arrays=[held])
        self._ask("hold", content, path=path, until=until, array=name, shape=images.shape, dtype="<f4")
        if key is not None:
            self._held[slot] = name
        return name

    def _drop(self, *, models: Sequence[str] = (), arrays: Sequence[str] = ()) -> None:
        """Has the worker forget what is named, unless it is gone and has forgotten all."""
        if self.transport.running:
            self._ask("drop", until=time.monotonic() + START_SECONDS, models=models, arrays=arrays)

    def _until(self) -> float:
        return time.monotonic() + self.timeout_seconds

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DeviceError(f"{self.name}: model {path} cannot be read: {error.strerror}") from None

    def _ask(
        self,
        verb: str,
        blob: bytes | memoryview = b"",
        *,
        until: float,
        path: Path | None = None,
        **fields: Any,
    ) -> Answer:
        limit = max(until - time.monotonic(), 0.0)
        request = {"verb": verb, "limit_seconds": limit, **fields}
        about = self.name if path is None else f"{self.name}, {path}"
        try:
            answer = self.transport.exchange(request, blob, timeout_seconds=limit)
        except WorkerLostError as error:
            late = path is not None and time.monotonic() >= until
            hint = f" ({TOO_SLOW.format(self.timeout_seconds)})" if late else ""
            kind = TooSlowError if late and not isinstance(error, LineLostError) else type(error)
            raise kind(f"{about}: {error}{hint}") from None
        if "refused" in answer.message:
            if "ends" in answer.message:  # it goes, and what it held with it: the next call starts another
                self.transport.stop()
            raise DeviceError(f"{about}: {answer.message['refused']}")
        return answer
