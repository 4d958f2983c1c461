"""llama2.c's story models (Karpathy 2023): Llama with the tokenizer of Llama 2.

python -m tinylm.main --config=configs/llama.py:15m \\
    --config.data.source="text:TinyStories-train.txt" \\
    --config.data.tokenizer=llama2c:PATH/tokenizer.bin

    size   layers   width   context    parameters
    15m       6       288       256    15,191,712
    42m       8       512     1,024    41,689,600
    110m     12       768     1,024   109,529,856

One GPU of 40 GB or more; not timed here. The published weights come in by
tinylm.convert --from_llama2c.
"""

from typing import NamedTuple

from tinylm.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)


class Size(NamedTuple):
    """What differs between the models."""

    num_layers: int  # and heads
    embed_dim: int
    mlp_dim: int
    context: int  # tokens
    accumulation_steps: int


SIZES = {
    "15m": Size(6, 288, 768, 256, 4),
    "42m": Size(8, 512, 1376, 1024, 4),
    "110m": Size(12, 768, 2048, 1024, 8),
}


def get_config(size: str = "15m") -> Config:
    """Return the config of one of SIZES, given after a colon: --config=llama:42m."""
    if size not in SIZES:
        raise ValueError(f"llama:{size} must end in one of {', '.join(SIZES)}.")
    shape = SIZES[size]
    return Config(
        data=DataConfig(
            source="text:data/TinyStories-train.txt",
            tokenizer="llama2c:data/tokenizer.bin",
            seq_len=shape.context,
            batch_size=512,
        ),
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=shape.embed_dim,
            num_layers=shape.num_layers,
            num_heads=shape.num_layers,
            mlp_dim=shape.mlp_dim,
            mlp="swiglu",
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, min_ratio=0.0, warmup_steps=1000, beta2=0.95, weight_decay=0.1
        ),
        train=TrainConfig(num_steps=100_000, accumulation_steps=shape.accumulation_steps),
        eval=EvalConfig(every_steps=2000, max_batches=20),
        sample=SampleConfig(prompts=("Once upon a time",), max_tokens=200),
    )
