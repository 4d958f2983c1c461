#!/bin/sh
# What a machine with an NVIDIA GPU can tell of tinylm in at most 8 minutes, the most important
# first: whether it computes right, how fast it trains (with nanoGPT as its peer), Shakespeare to its
# best loss, decoding, and what XLA's flags for GPUs change.
#
#   benchmarks/gpu.sh --out=DIR --nanogpt=CHECKOUT --shakespeare=input.txt [--parts=speed,peer] [--tiny]
#
# It needs no network: nanoGPT's checkout (its model.py is enough, with a torch next to jax) and the
# text of Shakespeare are brought along, and so are tinylm's needs, on PYTHONPATH. Every figure is
# printed and appended to DIR/figures.jsonl as soon as it is known; DIR/log.txt has all output.
# --tiny is the same with sizes for a CPU.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

missing=$("$python" -c '
import importlib.util as find
needs = "jax flax optax orbax.checkpoint tensorstore grain ml_collections tensorflow_datasets absl matplotlib tokenizers"
def is_here(name):
    try:
        return find.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(" ".join(name for name in needs.split() if not is_here(name)))
')
if [ -n "$missing" ]; then
    echo "error: $python has no $missing; bring them as wheels, and put them on PYTHONPATH." >&2
    exit 2
fi
exec "$python" "$root/benchmarks/gpu.py" "$@"
