"""Learn to recall values by their keys from the beginning of rows of 1,024 tokens, loss on the
answers alone: a task that only attention over the whole row solves.

python -m tinylm.main --config=configs/recall.py
Split by position: --cpu_devices=4 --config.mesh.data=1 --config.mesh.context=4

Two CPU cores: 100.00% of 128 texts right after 650 steps in 127 s, with mesh.context=4 simulated.

The answers don't depend on positions, so there is no position embedding. A convolution of two taps
adds each key to the value behind it, so that one layer of attention finds the value by its key.
Queries and keys are normalized, and the scale is so high that one of 1,024 keys can have all of the
weight.
"""

from tinylm.config import (
    CheckpointConfig,
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
            source="recall",
            tokenizer="char",
            seq_len=1024,
            batch_size=8,
            packing="single",
            loss_on="answer",
        ),
        model=ModelConfig(
            embed_dim=64,
            num_layers=1,
            num_heads=4,
            position="none",
            conv_taps=2,
            qk_norm=True,
            attention_scale=1.0,
            mlp="relu2",
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=5e-3,
            schedule="linear",
            min_ratio=0.1,
        ),
        train=TrainConfig(num_steps=650, steps_per_dispatch=10, log_every_steps=20),
        eval=EvalConfig(every_steps=650, max_batches=32, exact_match=128),
        checkpoint=CheckpointConfig(every_steps=200),
        sample=SampleConfig(prompts=(), max_tokens=0),
    )
