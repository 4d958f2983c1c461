"""Text to batches: sources, tokenizers, token stores, packing, and the pipeline that training
reads.
"""

from tinylm.data.open import known_vocab_size, open_data, open_validation, store_names
from tinylm.data.run_data import Data, Validation

__all__ = ["Data", "Validation", "known_vocab_size", "open_data", "open_validation", "store_names"]
