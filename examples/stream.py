"""A training script that uses the stream and nothing else from this package.

torchrun --nproc_per_node 2 examples/stream.py 'runs/demo/shards/train-*.tar' /tmp/example.pt 3

Stop it at any moment and start it again, with a different --nproc_per_node if you like: it resumes at the
batch after the last one it saved.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cnn2gnn_dist.data import Stream, ViewSpec

shards, checkpoint, epochs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo")
model = torch.nn.Linear(3 * 32 * 32, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

stream = Stream(shards, global_batch=64, views=ViewSpec("shift", 32), workers=1)
if checkpoint.exists():
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    stream.load_state_dict(state["stream"])

while stream.epoch < epochs:
    for batch in stream:
        images, labels, valid = batch.tensors()
        loss_B = torch.nn.functional.cross_entropy(
            model(images.flatten(1).float() / 255), labels, reduction="none"
        )
        optimizer.zero_grad()
        (loss_B * valid).sum().div(64).backward()
        for weight in model.parameters():
            dist.all_reduce(weight.grad)  # sums: the loss was divided by the global batch
        optimizer.step()
        if dist.get_rank() == 0 and stream.batch % 10 == 0:
            print(f"epoch {stream.epoch} batch {stream.batch} loss {loss_B.mean():.3f}")
    if dist.get_rank() == 0:
        states = {"model": model.state_dict(), "stream": stream.state_dict()}
        torch.save(states, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
stream.close()
dist.destroy_process_group()
