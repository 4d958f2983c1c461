"""Text to batches: sources, tokenizers, token stores, packing, and the pipeline that training
reads.
"""

from tinylm.data.open import Data, Validation, known_vocab_size, open_data, open_validation

__all__ = ["Data", "Validation", "known_vocab_size", "open_data", "open_validation"]
