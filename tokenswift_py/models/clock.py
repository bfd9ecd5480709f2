"""Clocks for the time that a pass takes on its device. On a GPU that is not the time that the host takes to launch it.

An executor owns a clock. A lap lasts from its start until the device has done all work that was launched before its
stop. It is read when the host has waited for the results anyway. A lap in which the executor compiled or captured
something says nothing about later ones, and is NaN.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import torch


class Lap(Protocol):
    def stop(self) -> None: ...

    @property
    def ms(self) -> float:
        """The milliseconds from start to stop, NaN where the clock was spoiled in between. Waits for the device."""


class Clock:
    """A clock of one device. spoiled: number of calls of `spoil`."""

    def __init__(self) -> None:
        self.spoiled = 0

    def start(self) -> Lap:
        raise NotImplementedError

    def spoil(self) -> None:
        """Makes all laps that are not over NaN, because they include work that later passes will not do."""
        self.spoiled += 1


class HostClock(Clock):
    """The clock of an executor that has done its work when it returns."""

    def start(self) -> Lap:
        return HostLap(self)


class HostLap:
    def __init__(self, clock: Clock):
        self.clock, self.spoiled = clock, clock.spoiled
        self.ms = math.nan
        self.began = time.perf_counter()

    def stop(self) -> None:
        if self.spoiled == self.clock.spoiled:
            self.ms = 1e3 * (time.perf_counter() - self.began)


class CudaClock(Clock):
    """A clock of events in the device's current stream. Time in which the GPU waits for the host counts, too."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def start(self) -> Lap:
        return CudaLap(self)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class CudaLap:
    def __init__(self, clock: CudaClock):
        self.clock, self.spoiled = clock, clock.spoiled
        self.began = clock.mark()
        self.ended: torch.cuda.Event | None = None

    def stop(self) -> None:
        self.ended = self.clock.mark() if self.spoiled == self.clock.spoiled else None

    @property
    def ms(self) -> float:
        if self.ended is None:
            return math.nan
        self.ended.synchronize()
        return float(self.began.elapsed_time(self.ended))


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()
