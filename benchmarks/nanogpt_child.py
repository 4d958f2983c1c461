"""nanoGPT's own model and optimizer as its train.py uses them; needs torch alone.

A process of its own for nanogpt.py and gpu.py.
On a GPU: bfloat16 autocast, TF32 where float32 is left, fused AdamW, batches through pinned memory.
"""

import contextlib
import json
import pathlib
import sys
import time

import numpy as np
import torch

job = json.loads(sys.argv[1])
sys.path.insert(0, str(pathlib.Path(job["checkout"]).resolve()))
import model as nanogpt  # noqa: E402  (nanoGPT's model.py)

device = job["device"]
on_gpu = device == "cuda"
config = nanogpt.GPTConfig(**job["shape"])
autocast = contextlib.nullcontext()
if on_gpu:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    autocast = torch.amp.autocast(device_type="cuda", dtype=torch.bfloat16)
model = nanogpt.GPT(config).to(device)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
if job["compiled"]:
    model = torch.compile(model)
data = np.random.default_rng(0).integers(0, config.vocab_size, 1 << 20).astype(np.uint16)


def batch():
    """Return inputs and targets as nanoGPT's get_batch does."""
    ix = torch.randint(len(data) - config.block_size, (job["rows"],))
    x, y = (
        torch.stack(
            [torch.from_numpy(data[i + d : i + d + config.block_size].astype(np.int64)) for i in ix]
        )
        for d in (0, 1)
    )
    if on_gpu:
        x = x.pin_memory().to(device, non_blocking=True)
        y = y.pin_memory().to(device, non_blocking=True)
    return x, y


def step(inputs, targets):
    """Make one step as nanoGPT's loop does, without accumulation; return the loss and the next
    batch, which is fetched while the device computes.
    """
    with autocast:
        _, loss = model(inputs, targets)
    following = batch()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, following


inputs_and_targets = batch()
for line in sys.stdin:
    if line.strip() == "memory":
        answer = torch.cuda.max_memory_allocated() if on_gpu else 0
    else:
        start = time.perf_counter()
        for _ in range(int(line)):
            loss, inputs_and_targets = step(*inputs_and_targets)
        loss.item()
        answer = time.perf_counter() - start
    print("answer", answer, flush=True)
