"""A small MoE-Mamba on whatever copy of C4 is at hand, with rows drawn as MoE-Mamba draws them (arXiv 2401.04081).

GPT-2 tokens, documents drawn with replacement (data.packing=sample), so training needs no tokenised copy, whatever the
size. The paper's code lets the documents of a row see one another, which data.isolate_documents=False does. The model
is ours, sized for two CPU cores, and reproduces no figure of the paper.

Model: 3 periods of mamba + moe, d_model 128, 8 experts of width 256; 8.36M parameters, 6.98M of them active, 6.43M of
both the embedding of 50,257 tokens.
Data: say where it is. Only files: needs the held-out documents to be named, too. The first start on TFRecord or JSON
makes an index, which reads every file once. Random reads are quick from ArrayRecord, TFRecord and plain JSON, and some
hundred documents a second from Parquet and .gz, which are better prepared first.

    moejax train --config=configs/c4.py --workdir=runs/c4 --config.data.source=tfds:c4/en:3.1.0
    moejax train --config=configs/c4.py --workdir=runs/c4 --config.data.source='files:c4/en/c4-train.*.json.gz' \\
        --config.data.validation_source='files:c4/en/c4-validation.*.json.gz'
    moejax data prepare --config=configs/c4.py --config.data.source=tfds:c4/en:3.1.0 --output=c4_gpt2
    moejax train --config=configs/c4.py --workdir=runs/c4 --config.data.source=prepared:c4_gpt2
"""

from moejax import config


def get_config() -> config.Config:
    """The small MoE-Mamba on C4."""
    c = config.Config()
    c.model.d_model = 128
    c.model.period = ("mamba", "moe")
    c.model.num_periods = 3
    c.model.vocab_size = config.GPT2_VOCAB_SIZE
    c.model.moe.num_experts = 8
    c.model.moe.d_expert = 256
    c.data.source = "tfds:c4/en:3.1.0"
    c.data.tokenizer = "gpt2"
    c.data.packing = "sample"
    c.data.seq_length = 512
    c.data.batch_size = 8
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 50
    c.training.num_steps = 1000
    c.training.ema_alpha = 0.05  # MoE-Mamba's 0.001 needs thousands of steps
    c.training.eval_every = 200
    c.training.eval_batches = 16
    return c
