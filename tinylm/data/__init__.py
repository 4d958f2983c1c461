"""Text to batches: sources, tokenizers, token stores, packing, and the pipeline that training reads."""

from tinylm.data.open import Data, open_data

__all__ = ["Data", "open_data"]
