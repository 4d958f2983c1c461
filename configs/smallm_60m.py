"""A GPT-2-like model for TinyStories that is called 60M: 29,995,392 parameters with tied
embeddings, 49,294,080 with --config.model.tie_embeddings=False.

python -m tinylm.main --config=configs/smallm_60m.py
--config.data.source="text:TinyStories-train.txt"

32 rows x 32 accumulated x 128 tokens a step, 20,000 steps. One GPU of 16 GB or more; not timed
here.
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


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="text:data/TinyStories-train.txt", tokenizer="gpt2", seq_len=128, batch_size=1024
        ),
        model=ModelConfig(
            vocab_size=50_257,
            embed_dim=384,
            num_layers=6,
            num_heads=6,
            position="learned",
            norm="layernorm",
            bias=True,
            qkv_bias=True,
            dropout=0.1,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=1000, beta2=0.95, weight_decay=0.1, clip_norm=0.5
        ),
        train=TrainConfig(num_steps=20_000, accumulation_steps=32),
        eval=EvalConfig(every_steps=500, max_batches=20),
        sample=SampleConfig(prompts=("Once upon a time",), max_tokens=200),
    )
