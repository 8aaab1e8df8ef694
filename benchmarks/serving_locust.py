"""Users of a served model, for locust: one image per request, each user at a steady rate.

    locust -f benchmarks/serving_locust.py --headless -u 20 -r 20 -t 60s --host http://127.0.0.1:8000

``SERVING_IMAGES``: folder of images; ``SERVING_RATE``: requests per second of a user (1).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from locust import FastHttpUser, constant_throughput, task

IMAGES = [path.read_bytes() for path in sorted(Path(os.environ["SERVING_IMAGES"]).iterdir())]
RATE = float(os.environ.get("SERVING_RATE", "1"))


class Asking(FastHttpUser):
    """Asks about one image after another."""

    wait_time = constant_throughput(RATE)

    @task
    def predict(self) -> None:
        image = random.choice(IMAGES)
        self.client.post("/predict", data=image, headers={"Content-Type": "image/png"})
