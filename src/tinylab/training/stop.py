"""How a run is asked to stop: a signal leaves a note, and the training loop obeys it between steps."""

import signal
import threading
from collections.abc import Callable

import torch
from torch import nn


class StopRequest:
    """While entered, SIGINT (Ctrl-C, a notebook's stop button) and SIGTERM only leave a note, so that no optimiser step
    is cut in two; the loop obeys between steps. A second signal takes its usual effect at once, unless `patient`: a
    launcher of several processes forwards what each has already received, and one that ended at once would leave the
    others waiting.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received: int | None = None
        self._patient = patient
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received = self.received or number
        if not self._patient:
            for each, handler in self._before.items():
                signal.signal(each, handler)


class Abandoned(Exception):
    """A pass through the network was given up half-way, as the run was asked to stop."""


def abandon_when(requested: Callable[[], bool], network: nn.Module) -> None:
    """From now on `network` raises `Abandoned` in the middle of a forward or backward pass, between two of its layers,
    once `requested()` is true.

    For CPUs, on which one step of the full network takes many seconds: a stop should not. The numbers stay the same.
    """

    def check(*_: object) -> None:
        if requested():
            raise Abandoned

    def watch_gradient(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(check)

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_pre_hook(check)
            module.register_forward_hook(watch_gradient)
