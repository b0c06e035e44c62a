"""One GPU (or core) that an engine and a tower share."""

from __future__ import annotations

from collections.abc import Callable

from aiodisagg.simulate.clock import Clock


class Lane:
    """Work of one kind on a device, one piece at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.left_s = 0.0
        """Seconds of work left when the device was brought up to date last."""
        self.speed = 1.0
        self.busy = False
        self.busy_s = 0.0
        """Seconds with work, whatever the speed."""
        self.version = 0
        self._done: Callable[[], None] = _nothing

    def start(self, work_s: float, done: Callable[[], None]) -> None:
        """``done()`` when ``work_s`` seconds of an otherwise idle device are spent."""
        assert not self.busy
        self.device.before_change(self)
        self.left_s, self.busy, self._done = work_s, True, done
        self.device.changed(self)

    def shorten(self, left_s: float) -> None:
        """The piece at work is over after ``left_s``; the device must be up to date."""
        self.left_s = left_s
        self.device.arm(self)

    def ended(self, version: int) -> None:
        if version != self.version:
            return
        self.device.before_change(self)
        self.left_s, self.busy = 0.0, False
        self.device.changed(self)
        self._done()


LEFT = 0.05
"""Of a device, for who does not go first: the gaps between two kernels."""


class Device:
    """Two lanes. Alone, a lane runs at full speed; together the tower gets ``tower_share`` of ``shared_speed``.

    That is what two streams of a GPU or two threads of a core do. With ``priorities`` the share follows from what the
    engine does: ``LEFT`` for the tower beside prompts, for the engine else, see :mod:`aiodisagg.device.streams`.
    """

    def __init__(self, clock: Clock, tower_share: float, shared_speed: float, *, priorities: bool = False) -> None:
        self.clock = clock
        self.engine, self.tower = Lane(self), Lane(self)
        self._tower_share, self._shared_speed, self.priorities = tower_share, shared_speed, priorities
        self.prompts = False
        """The engine's step has prompt tokens; to be set before it starts."""
        self.step_waited_s = 0.0
        """Of the step at work or done last: beside batches that went first."""
        self.batch_waited_s = 0.0
        """Of the batch: beside steps that did."""
        self._since = 0.0
        self.busy_s = 0.0
        """Seconds in which at least one lane had work."""
        self.before_sharing: Callable[[], None] = _nothing
        """Called before the engine's speed changes."""

    def update(self) -> None:
        """Brings ``left_s`` and the busy times up to the clock's now."""
        passed = self.clock.now - self._since
        self._since = self.clock.now
        if passed <= 0:
            return
        if self.engine.busy or self.tower.busy:
            self.busy_s += passed
        for lane in (self.engine, self.tower):
            if lane.busy:
                lane.busy_s += passed
                lane.left_s = max(lane.left_s - passed * lane.speed, 0.0)
        if self.priorities and self.engine.busy and self.tower.busy:
            if self.prompts:
                self.batch_waited_s += passed
            else:
                self.step_waited_s += passed

    def before_change(self, lane: Lane) -> None:
        self.update()
        if lane is self.tower and self.engine.busy:
            self.before_sharing()

    def changed(self, lane: Lane) -> None:
        together = self.engine.busy and self.tower.busy
        for each in (self.engine, self.tower):
            speed = self._together(each) if together else 1.0
            if each.busy and (each is lane or speed != each.speed):
                each.speed = speed
                self.arm(each)

    def _together(self, lane: Lane) -> float:
        """Speed of a lane while both have work."""
        share = self._tower_share if not self.priorities else LEFT if self.prompts else 1 - LEFT
        return self._shared_speed * (share if lane is self.tower else 1 - share)

    def arm(self, lane: Lane) -> None:
        lane.version += 1
        self.clock.at(self.clock.now + lane.left_s / lane.speed, lane.ended, lane.version)


def _nothing() -> None:
    return None
