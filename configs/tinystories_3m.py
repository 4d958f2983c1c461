"""TinyStories-3M (Eldan and Li 2023): GPT-Neo of 8 layers and 16 heads of 8, windows of 256 in every other layer.

python -m tinylm.main --config=configs/tinystories_3m.py --config.data.source="text:TinyStories-train.txt"

8,278,400 parameters with the 50,257 ids that the published weights carry; the paper trained on the 10,000 most
common ones: --config.data.vocab_top_k=10000 --config.model.vocab_size=0. One GPU of 16 GB or more; not timed here.
"""

from tinylm.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(source="text:data/TinyStories-train.txt", tokenizer="gpt2", seq_len=512, batch_size=64),
        model=ModelConfig(
            vocab_size=50_257,
            context=2048,
            embed_dim=128,
            num_layers=8,
            num_heads=16,
            position="learned",
            norm="layernorm",
            bias=True,
            attention_window=(0, 256),
            attention_scale=1.0,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=1000, beta2=0.95, weight_decay=0.1),
        train=TrainConfig(num_steps=20_000),
        eval=EvalConfig(every_steps=1000, max_batches=20),
        sample=SampleConfig(prompts=("Once upon a time",), max_tokens=200),
    )
