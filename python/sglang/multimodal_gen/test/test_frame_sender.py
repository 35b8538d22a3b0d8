"""Frames leave by a thread, in order, and what keeps them from leaving is told to their own request."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang.multimodal_gen.errors import InsufficientStorage
from sglang.multimodal_gen.runtime.managers.frame_sender import FrameSender
from sglang.multimodal_gen.runtime.managers.messages import MappedArray, Message
from sglang.multimodal_gen.runtime.managers.run_dir import RunDir
from sglang.multimodal_gen.runtime.managers.worker_messages import OutputChunk
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch


class GatedRunDir(RunDir):
    """Writes when it is let, and has no room for frames of 9."""

    def __init__(self, base: Path) -> None:
        super().__init__(base, None)
        self.gate = threading.Event()

    def send(self, array: np.ndarray) -> MappedArray:
        assert self.gate.wait(20)
        if array.flat[0] == 9:
            raise InsufficientStorage("no room")
        return super().send(array)


def chunk(request_id: str, first_frame: int, *, last: bool = False, value: int = 0) -> OutputBatch:
    """One frame."""
    frames = torch.full((1, 2, 2, 3), value, dtype=torch.uint8)
    return OutputBatch(request_id=request_id, first_frame=first_frame, last=last, frames=frames)


@pytest.fixture
def sent() -> list[Message]:
    return []


@pytest.fixture
def sender(tmp_path: Path, sent: list[Message]) -> FrameSender:
    return FrameSender(GatedRunDir(tmp_path), sent.append)


def gate_of(sender: FrameSender) -> threading.Event:
    run_dir = sender._run_dir
    assert isinstance(run_dir, GatedRunDir)
    return run_dir.gate


def test_the_next_unit_does_not_wait_for_frames_and_the_last_ones_have_left(
    sender: FrameSender, sent: list[Message]
) -> None:
    sender.put(chunk("a", 0, value=1))
    sender.put(chunk("b", 0, value=2))
    assert not sent, "nothing was written yet, and nobody waited for it"
    gate_of(sender).set()
    sender.put(chunk("a", 1, value=3))
    sender.put(chunk("a", 2, last=True, value=4))
    assert [(each.request_id, each.first_frame, each.last) for each in sent if isinstance(each, OutputChunk)] == [
        ("a", 0, False),
        ("b", 0, False),
        ("a", 1, False),
        ("a", 2, True),
    ]
    assert [sender._run_dir.take(each.frames).max() for each in sent if isinstance(each, OutputChunk)] == [1, 2, 3, 4]


def test_frames_without_room_fail_their_request_and_no_other(sender: FrameSender, sent: list[Message]) -> None:
    gate_of(sender).set()
    sender.put(chunk("a", 0, value=9))
    sender.put(chunk("b", 0, last=True))
    with pytest.raises(InsufficientStorage, match="no room"):
        sender.put(chunk("a", 1, last=True))
    assert [each.request_id for each in sent if isinstance(each, OutputChunk)] == ["b"]


def test_last_frames_without_room_fail_their_own_unit(sender: FrameSender) -> None:
    gate_of(sender).set()
    with pytest.raises(InsufficientStorage, match="no room"):
        sender.put(chunk("a", 0, last=True, value=9))


def test_nothing_follows_a_request_that_has_left(sender: FrameSender, sent: list[Message]) -> None:
    gate_of(sender).set()
    sender.put(chunk("a", 0, value=9))
    sender.forget("a")
    sender.put(chunk("b", 0))
    sender.forget("b")
    assert len(sent) == 1
    sender.put(chunk("a", 0, last=True))
    sender.forget("never seen")
