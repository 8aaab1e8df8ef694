"""The times of models: who is timed when, on which images, and what the median leaves out."""

import pytest
import torch

from cnn2gnn_dist.stages.shared import timing


def test_models_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    threads = torch.get_num_threads()

    def model(name: str, seconds: float):
        def classify(images):
            assert torch.get_num_threads() == 1
            warm_up = name not in {called for called, _ in calls}
            calls.append((name, images[:, 0, 0, 0].tolist()))
            clock[0] += 100 if warm_up else seconds * len(images)

        return classify

    images = torch.arange(64).view(64, 1, 1, 1).expand(64, 3, 2, 2)
    models = {"a": model("a", 0.002), "b": model("b", 0.004)}
    found = timing.milliseconds_per_image(models, images, 256)
    assert found["a"] == pytest.approx((2, 2))
    assert found["b"] == pytest.approx((4, 4))
    assert [name for name, _ in calls] == ["a", "b"] * (5 + 65)
    assert [shown for _, shown in calls[10::2]] == [[n % 64] for n in range(65)]
    assert torch.get_num_threads() == threads
