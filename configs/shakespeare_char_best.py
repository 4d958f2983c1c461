"""A character model of Shakespeare as good as nanoGPT's small CPU budget gives: 0.81 M parameters,
2,000 steps of 768.

python -m tinylm.main --config=configs/shakespeare_char_best.py
--config.data.source=text:PATH/input.txt

Two CPU cores: 2 to 4 minutes. Loss over the whole validation tenth with bfloat16 products 1.484,
1.472 and 1.484 nats a character with three seeds (nanoGPT's own setting: 1.8857;
`shakespeare_char_cpu.py`, which keeps its shape and AdamW: 1.667). NorMuon for the matrices, six
times the context with a sixth of the rows, short convolutions, half of the heads looking at the
last 8 characters only.
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
        data=DataConfig(source="text:data/input.txt", tokenizer="char", seq_len=384, batch_size=2),
        model=ModelConfig(
            embed_dim=128,
            num_layers=4,
            num_heads=4,
            qk_norm=True,
            mlp="relu2",
            attention_window=(8,),
            local_heads=2,
            conv_taps=4,
            logit_softcap=15.0,
            tie_embeddings=False,
            unroll=0,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.008,
            muon_momentum=0.9,
            muon_beta2=0.95,
            adam_learning_rate=0.008,
            beta1=0.8,
            clip_norm=0.0,
            schedule="linear",
            min_ratio=0.0,
            warmup_steps=50,
        ),
        train=TrainConfig(num_steps=2000, steps_per_dispatch=10, log_every_steps=10),
        eval=EvalConfig(every_steps=500),
        checkpoint=CheckpointConfig(every_steps=500),
        sample=SampleConfig(prompts=("",), max_tokens=500),
    )
