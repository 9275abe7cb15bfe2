"""SIGTERM, SIGINT, and the notice that a cloud TPU is about to be taken away."""

import os
import signal
import threading
import time
import urllib.request

import jax

from alignjax.machine.processes import largest_of_all


class Signals:
    """Remembers SIGTERM or the first SIGINT, so that the loop can save before it stops; a second SIGINT interrupts.

    As a context it does so inside alone. In a thread that isn't the main one Python hears of no signals, nor does this.
    """

    def __init__(self):
        self.received = 0
        self.asked = None  # what all had received when it was asked last: an array, on its way
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self.remember)
                for number in (signal.SIGTERM, signal.SIGINT)
            }

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number, frame=None):
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number

    def received_anywhere(self) -> bool:
        """Whether any process has got one: all must save together.

        With several processes it is one that had come by the call before, so that nobody waits for the steps in flight.
        """
        if jax.process_count() == 1:
            return self.received > 0
        before, self.asked = self.asked, largest_of_all(self.received)
        number = 0 if before is None else int(before)
        self.received = number or self.received
        return number > 0


def watch_for_preemption(tell) -> None:
    """On a cloud TPU, see to it that tell() is called once its machine is to be taken away; elsewhere nothing happens.

    That is when the metadata server of Google Cloud says so; $GCE_METADATA_HOST names another server, on any machine.
    """
    host = os.environ.get("GCE_METADATA_HOST")
    if host or jax.default_backend() == "tpu":
        threading.Thread(
            target=watch, args=(host or "metadata.google.internal", tell), daemon=True
        ).start()


def watch(host: str, tell, every: float = 5.0) -> None:
    """Ask a metadata server every few seconds, until it says that this machine is preempted or must be stopped."""
    instance = f"http://{host}/computeMetadata/v1/instance"
    signs = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    while True:
        for name, sign in signs.items():
            asked = urllib.request.Request(
                f"{instance}/{name}", headers={"Metadata-Flavor": "Google"}
            )
            try:
                with urllib.request.urlopen(asked, timeout=every) as answer:
                    if answer.read().decode().strip() == sign:
                        tell()
                        return
            except OSError:  # of URLError too: no such server, or no answer this time
                pass
        time.sleep(every)
