"""Write a run's figures for TensorBoard."""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from alignjax.machine import outputs

FLUSH_INTERVAL = 60  # seconds, at most, until TensorBoard sees a step


class TensorBoard:
    """An event file of TensorBoard.

    It uses the `EventsWriter` directly. A `SummaryWriter` writes in a thread of its own; an error,
    such as a full disk, would end that thread and leave the run waiting for it forever.
    """

    def __init__(self, directory: Path, start: int):
        """Open a new event file, and tell TensorBoard that steps from `start` on are new."""
        self.directory = directory
        with outputs.writing(directory):
            directory.mkdir(exist_ok=True)
            self.events = EventsWriter(str(directory / "events"))
            self.last_flush = 0.0
            restart = SessionLog(status=SessionLog.START)
            self.events.write_event(Event(wall_time=time.time(), step=start, session_log=restart))

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of a step."""
        with outputs.writing(self.directory):
            for name, value in figures.items():
                summary = scalar(name, value)
                self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() - self.last_flush > FLUSH_INTERVAL:
                self.events.flush()
                self.last_flush = time.monotonic()

    def close(self) -> None:
        """Write out what is buffered, and close the file."""
        with outputs.writing(self.directory):
            self.events.close()
