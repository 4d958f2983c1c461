"""What a run will read, in numbers: counts over its stores, and hashes of its first batches.

Hashes of batches show without training that two machines, or any number of hosts, would read the
same.
"""

import hashlib
from typing import Any

import numpy as np

from tinylm.data.prepare import SKIPPED
from tinylm.data.run_data import Data


def summary(data: Data) -> dict[str, Any]:
    """Return counts over all stores of a run, and where they are, for `prepare --json`."""
    stores = data.every_store
    manifests = [store.manifest for store in stores]
    skipped_lists = []
    for store in stores:
        if store.manifest.skipped.count:
            skipped_lists.append(str(store.folder / SKIPPED))
    return {
        "tokens": sum(manifest.tokens for manifest in manifests),
        "documents": sum(manifest.documents for manifest in manifests),
        "skipped": sum(manifest.skipped.count for manifest in manifests),
        "unknown_tokens": sum(manifest.unknown for manifest in manifests),
        "skipped_lists": skipped_lists,
        "held_out": [manifest.held_out for manifest in manifests if manifest.held_out],
        "vocab_size": data.vocab_size,
        "end_of_text": data.tokenizer.describe_end(),
        "rows": len(data.train),
        "valid_rows": len(data.valid) if data.valid else 0,
        "split_documents": data.split_documents,
        "tokenizer": data.tokenizer.fingerprint,
        "stores": [str(store.folder) for store in stores],
    }


def batch_hashes(data: Data, batch_size: int, count: int) -> list[str]:
    """Return the hash of each of the first `count` global batches of training."""
    hashes = []
    for batch in range(count):
        first_row = batch * batch_size
        rows = first_row + np.arange(batch_size)
        examples = data.train.read(rows)
        digest = hashlib.sha256()
        for name in sorted(examples):
            array = np.ascontiguousarray(examples[name])
            digest.update(array.tobytes())
        hashes.append(digest.hexdigest()[:32])
    return hashes
