"""The models of the TinyStories paper (Eldan and Li 2023): GPT-Neo, windows in every other layer.

python -m tinylm.main --config=configs/tinystories.py:33m \\
    --config.data.source="text:TinyStories-train.txt"

    size   layers   width   parameters
    1m        8        64     3,745,984
    3m        8       128     8,278,400
    8m        8       256    19,702,528
    28m       8       512    51,987,968
    33m       4       768    68,514,048

Parameters are those with the 50,257 ids that the published weights carry; the paper trained on the
10,000 most common ones: --config.data.vocab_top_k=10000 --config.model.vocab_size=0.
One GPU of 16 GB or more; not timed here.
"""

from tinylm.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)

# Size: layers, width.
SIZES = {"1m": (8, 64), "3m": (8, 128), "8m": (8, 256), "28m": (8, 512), "33m": (4, 768)}


def get_config(size: str = "33m") -> Config:
    """Return the config of one of SIZES, given after a colon: --config=tinystories:3m."""
    if size not in SIZES:
        raise ValueError(f"tinystories:{size} must end in one of {', '.join(SIZES)}.")
    num_layers, embed_dim = SIZES[size]
    return Config(
        data=DataConfig(
            source="text:data/TinyStories-train.txt", tokenizer="gpt2", seq_len=512, batch_size=64
        ),
        model=ModelConfig(
            vocab_size=50_257,
            context=2048,
            embed_dim=embed_dim,
            num_layers=num_layers,
            num_heads=16,
            position="learned",
            norm="layernorm",
            bias=True,
            attention_window=(0, 256),
            attention_scale=1.0,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup_steps=1000, beta2=0.95, weight_decay=0.1
        ),
        train=TrainConfig(num_steps=20_000),
        eval=EvalConfig(every_steps=1000, max_batches=20),
        sample=SampleConfig(prompts=("Once upon a time",), max_tokens=200),
    )
