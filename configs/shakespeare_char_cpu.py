"""A character model of Shakespeare at nanoGPT's small CPU setting: 0.8 M parameters, 2,000 steps of
768 tokens.

python -m tinylm.main --config=configs/shakespeare_char_cpu.py
--config.data.source=text:PATH/input.txt

Two CPU cores: 1 to 4 minutes, loss over the whole validation tenth 1.667 nats a character (nanoGPT:
1.8857 at this setting). The shape is nanoGPT's; rotary positions, query-key norm and squared ReLU
are not.
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
        seed=1337,
        data=DataConfig(source="text:data/input.txt", tokenizer="char", seq_len=64, batch_size=12),
        model=ModelConfig(
            embed_dim=128, num_layers=4, num_heads=4, qk_norm=True, mlp="relu2", unroll=0
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="linear", min_ratio=0.0, warmup_steps=100
        ),
        train=TrainConfig(num_steps=2000, steps_per_dispatch=10, log_every_steps=10),
        eval=EvalConfig(every_steps=500),
        checkpoint=CheckpointConfig(every_steps=500),
        sample=SampleConfig(prompts=("",), max_tokens=500),
    )
