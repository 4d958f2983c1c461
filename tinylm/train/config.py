"""The sections of the config that training owns (optimizer, train, writers), and the whole Config of a run.

Each other section is the dataclass of the room that uses it; here they are put together, resolved (every size that
follows from another or from the data becomes a number) and checked against each other.
"""

import dataclasses
import math

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig
from tinylm.core.settings import setting, settings_of
from tinylm.data.config import DataConfig
from tinylm.inference.config import EvalConfig, SampleConfig
from tinylm.model.config import ModelConfig
from tinylm.run.checkpoint import CheckpointConfig
from tinylm.train.guard import POLICIES

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclasses.dataclass
class OptimizerConfig:
    """Which optimizer, at which learning rate over the run."""

    name: str = setting("adamw", "adamw, or muon (for matrices; adamw for the rest)")
    learning_rate: float = setting(1e-3, "peak learning rate")
    min_ratio: float = setting(0.1, "learning rate at the end, as a part of the peak")
    schedule: str = setting("cosine", "after warm-up: cosine, linear, constant or wsd (warm-up, stable, decay)")
    warmup_steps: int = setting(0, "steps of linear warm-up, part of the schedule")
    decay_fraction: float = setting(0.2, "last part of the schedule in which wsd decays")
    weight_decay: float = setting(0.1, "decay of matrices and embeddings (with muon: of its matrices alone)")
    beta1: float = setting(0.9, "decay of the first moment")
    beta2: float = setting(0.95, "decay of the second moment")
    epsilon: float = setting(1e-8, "added to the root of the second moment")
    clip_norm: float = setting(1.0, "largest global norm of the gradient (0: no limit)")
    adam_learning_rate: float = setting(0.0, "with muon: peak rate of what is not a matrix (0: learning_rate)")
    muon_momentum: float = setting(0.95, "decay of the first moment of what muon optimizes")

    def check(self, num_steps: int) -> None:
        """Raise UserError for what no optimizer could follow over `num_steps`."""
        if self.name not in OPTIMIZERS:
            raise UserError(f"optimizer.name={self.name!r} must be one of {', '.join(OPTIMIZERS)}.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"optimizer.schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}.")
        if not 0 <= self.warmup_steps <= num_steps:
            raise UserError(
                f"optimizer.warmup_steps={self.warmup_steps} must be at most the schedule's length "
                f"(train.num_steps={num_steps}); make one shorter or the other longer."
            )
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        for name in ("clip_norm", "weight_decay", "adam_learning_rate", "epsilon"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0.")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not (0 <= self.min_ratio <= 1 and 0 < self.decay_fraction <= 1):
            raise UserError("optimizer.min_ratio and decay_fraction must lie between 0 and 1.")


@dataclasses.dataclass
class TrainConfig:
    """How long, and how a step is carried out."""

    num_steps: int = setting(1000, "length of the schedule, and of the run")
    stop_step: int = setting(0, "stop after this step (0: num_steps); the schedule stays as long", free=True)
    accumulation_steps: int = setting(1, "micro-batches that one step adds up")
    steps_per_dispatch: int = setting(1, "most steps that one call to the device makes", free=True)
    init_from: str = setting("", "start from the parameters of another run's folder, an imported model's too")
    init_optimizer: bool = setting(False, "with init_from: take the optimizer's moments as well")
    deterministic: bool = setting(False, "the same bits in every run on GPU and TPU too (slower)")
    log_every_steps: int = setting(10, "steps between lines of metrics", free=True)
    hang_secs: float = setting(600.0, "end a job that passes no step boundary for this long (0: never)", free=True)
    replicas_every_steps: int = setting(
        0, "compare the bits of parameters that several devices hold (0: never)", free=True
    )
    on_bad_step: str = setting(
        "halt", "on a loss or gradient that is not finite, or a spike: " + ", ".join(POLICIES), free=True
    )
    spike_sigmas: float = setting(0.0, "a loss this many deviations above its mean is a spike (0: none is)", free=True)
    max_bad_steps: int = setting(10, "bad steps in a row (rollback: since a checkpoint) that end the run", free=True)

    @property
    def last_step(self) -> int:
        """The step after which this run stops."""
        return min(self.stop_step or self.num_steps, self.num_steps)

    def check(self) -> None:
        """Raise UserError for counts below their least."""
        for name in ("num_steps", "accumulation_steps", "steps_per_dispatch", "log_every_steps", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 1.")
        if self.num_steps >= 2**31:
            raise UserError(f"train.num_steps={self.num_steps} must be below 2^31.")
        for name in ("stop_step", "spike_sigmas", "hang_secs", "replicas_every_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 0.")
        if self.on_bad_step not in POLICIES:
            raise UserError(f"train.on_bad_step={self.on_bad_step!r} must be one of {', '.join(POLICIES)}.")


@dataclasses.dataclass
class WritersConfig:
    """Where metrics go beside metrics.jsonl."""

    plot: bool = setting(True, "draw loss.png", free=True)
    tensorboard: bool = setting(False, "TensorBoard event files, below tensorboard/ in the run's folder", free=True)
    wandb: bool = setting(False, "Weights & Biases (WANDB_MODE=offline: without a network)", free=True)


def _section(cls: type):
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass
class Config:
    """All settings of a run."""

    seed: int = setting(0, "seed of initialization, data order and dropout")
    data: DataConfig = _section(DataConfig)
    model: ModelConfig = _section(ModelConfig)
    mesh: MeshConfig = _section(MeshConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig)
    train: TrainConfig = _section(TrainConfig)
    eval: EvalConfig = _section(EvalConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    sample: SampleConfig = _section(SampleConfig)
    writers: WritersConfig = _section(WritersConfig)

    def check(self) -> None:
        """Raise UserError for any mistake that needs neither data nor devices to be seen."""
        for key, _, value in settings_of(self):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} must be a finite number.")
        for section in (self.data, self.model, self.mesh, self.train, self.eval, self.checkpoint, self.sample):
            section.check()
        self.optimizer.check(self.train.num_steps)
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} must be at least 0 and below 2^31.")
        if self.eval.patience and not self.eval.every_steps:
            raise UserError("eval.patience needs evaluations; set eval.every_steps.")
        if self.data.batch_size % self.train.accumulation_steps:
            raise UserError(
                f"data.batch_size={self.data.batch_size} must be divisible by "
                f"train.accumulation_steps={self.train.accumulation_steps}; change one of them."
            )
        if self.data.seq_len % self.model.loss_chunks:
            raise UserError(
                f"data.seq_len={self.data.seq_len} must be divisible by model.loss_chunks={self.model.loss_chunks}."
            )
        if self.model.context and self.model.context < self.data.seq_len:
            raise UserError(
                f"data.seq_len={self.data.seq_len} must be at most model.context={self.model.context}; change one."
            )

    def check_mesh(self, batch_shards: int) -> None:
        """Raise UserError unless the mesh's `batch_shards` divide a micro-batch."""
        micro = self.data.batch_size // self.train.accumulation_steps
        if micro % batch_shards:
            raise UserError(
                f"data.batch_size={self.data.batch_size} must be divisible by the data axis ({batch_shards}) times "
                f"train.accumulation_steps ({self.train.accumulation_steps}); set data.batch_size or mesh.data."
            )

    def resolve(self, vocab_size: int) -> None:
        """Write numbers over every size that was left open; `vocab_size` is the tokenizer's."""
        if self.model.vocab_size and self.model.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size={self.model.vocab_size} must be at least the tokenizer's ({vocab_size}), or 0."
            )
        self.model.resolve(vocab_size, self.data.seq_len)
