"""nanoGPT's own model and optimizer as its train.py uses them on a CPU, for nanogpt.py; needs torch
alone.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch

checkout, shape, rows, compiled = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(checkout).resolve()))
import model as nanogpt  # noqa: E402  (nanoGPT's model.py)

config = nanogpt.GPTConfig(**json.loads(shape))
model = nanogpt.GPT(config)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
if compiled == "1":
    model = torch.compile(model)
data = np.random.default_rng(0).integers(0, config.vocab_size, 1 << 20).astype(np.uint16)


def batch():
    """Return inputs and targets as nanoGPT's get_batch does."""
    ix = torch.randint(len(data) - config.block_size, (int(rows),))
    x, y = (
        torch.stack(
            [torch.from_numpy(data[i + d : i + d + config.block_size].astype(np.int64)) for i in ix]
        )
        for d in (0, 1)
    )
    return x, y


def step():
    """Make one step as nanoGPT's loop does, without accumulation."""
    _, loss = model(*batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        loss = step()
    loss.item()
    print("secs", time.perf_counter() - start, flush=True)
