"""Train on the embedded corpus: works anywhere, offline.

python -m tinylm.main --config=configs/tales.py
"""

from tinylm.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(source="tales", tokenizer="bpe:1024", seq_len=112, batch_size=16, packing="single"),
        model=ModelConfig(embed_dim=128, num_layers=3, num_heads=4, qk_norm=True, mlp="relu2", unroll=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, clip_norm=1.0),
        train=TrainConfig(num_steps=200, steps_per_dispatch=10, log_every_steps=10),
        eval=EvalConfig(every_steps=100),
        sample=SampleConfig(prompts=("", "", "Once upon a time"), max_tokens=120),
    )
