"""A character model of Shakespeare at nanoGPT's GPU setting: 10.7 M parameters, 5,000 steps of
16,384 tokens.

python -m tinylm.main --config=configs/shakespeare_char.py --config.data.source=text:PATH/input.txt

Meant for one GPU, in bfloat16; nanoGPT's best validation loss at this setting is 1.4697 nats a
character.
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
        data=DataConfig(source="text:data/input.txt", tokenizer="char", seq_len=256, batch_size=64),
        model=ModelConfig(
            embed_dim=384,
            num_layers=6,
            num_heads=6,
            qk_norm=True,
            mlp="relu2",
            dropout=0.2,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        train=TrainConfig(num_steps=5000, steps_per_dispatch=10),
        eval=EvalConfig(every_steps=250),
        checkpoint=CheckpointConfig(every_steps=1000),
        sample=SampleConfig(prompts=("",), max_tokens=500),
    )
