"""Rules of data, optimizer, training, checkpoints and mesh."""

import dataclasses

from moejax import config as config_lib
from moejax.rules.checks import at_least, get, one_of, positive, require, unused


def validate_labels(config: config_lib.Config) -> None:
    data, kind = config.data, config.data.source.partition(":")[0]
    require(
        data.label in ("", "folder") or (data.label.startswith("field:") and len(data.label) > len("field:")),
        f"data.label={data.label} is not known; write field:NAME, folder, or leave it empty for the corpus's own",
    )
    if config.model.has_experts and config.model.moe.router == "label":
        require(
            kind in config_lib.CORPORA or (data.label != "" and kind != "prepared"),
            f"model.moe.router=label needs a label for each document, and data.source={data.source} has none; "
            "set data.label=field:NAME or folder, or use a source with labels (wikipedia has topics)",
        )


def validate_data(config: config_lib.Config) -> None:
    data = config.data
    for path, source in (("data.source", data.source), ("data.validation_source", data.validation_source)):
        kind, _, rest = source.partition(":")
        if path == "data.validation_source" and not source:
            continue
        one_of(path, kind, config_lib.SOURCES)
        require(
            bool(rest) == (kind not in config_lib.CORPORA),
            f"{path}={source} is not complete; write files:PATTERN, tfds:NAME/CONFIG:VERSION, prepared:FOLDER, "
            f"or one of {', '.join(config_lib.CORPORA)}",
        )
    require(
        not (data.validation_source and data.source.startswith("prepared:")),
        "data.validation_source has no effect with data.source=prepared:FOLDER, which has its own; leave it empty",
    )
    kind, _, rest = data.tokenizer.partition(":")
    one_of("data.tokenizer", kind, config_lib.TOKENIZERS)
    require(
        bool(rest) or kind not in ("sentencepiece", "hf"),
        f"data.tokenizer={data.tokenizer} names no file; write {kind}:FILE",
    )
    require(
        not rest or kind not in ("bpe", "bytes"),
        f"data.tokenizer={data.tokenizer} takes nothing after the colon; write {kind}",
    )
    require(
        not data.end_of_text or kind == "hf",
        f"data.end_of_text={data.end_of_text} has no effect with data.tokenizer={data.tokenizer}; leave it empty",
    )
    one_of("data.objective", data.objective, ("next_token", "span_corruption", "text_to_text"))
    one_of("data.packing", data.packing, ("best_fit", "concatenate", "sample", "pad"))
    at_least(config, 2, "data.seq_length")
    at_least(config, 1, "data.batch_size")
    at_least(config, 0, "data.num_workers", "data.validation_documents")
    for path, seed in (("data.seed", data.seed), ("training.seed", config.training.seed)):
        require(0 <= seed < 2**31, f"{path}={seed} must lie in [0, 2^31); change it")
    for path in ("data.validation_fraction", "data.noise_density"):
        require(0 < get(config, path) < 1, f"{path}={get(config, path)} must lie between 0 and 1; change it")
    at_least(config, 1, "data.mean_span_length")
    sentinels = config_lib.NUM_SENTINELS if data.objective == "span_corruption" else 0
    minimum = config_lib.NUM_BYTES + 1 + sentinels
    if data.tokenizer == "bpe":
        what = f"256 bytes, end-of-text and {sentinels} sentinels" if sentinels else "256 bytes and end-of-text"
        require(
            data.vocab_size >= minimum,
            f"data.vocab_size={data.vocab_size} must be {minimum} or more ({what}); raise it",
        )
    size = {"bpe": data.vocab_size, "bytes": minimum, "gpt2": config_lib.GPT2_VOCAB_SIZE}.get(kind, 0)
    require(
        config.model.vocab_size >= size,
        f"model.vocab_size={config.model.vocab_size} is below the {size} tokens of data.tokenizer={data.tokenizer}; "
        f"set it to {size} or more",
    )


def validate_pairs(config: config_lib.Config) -> None:
    """What data.objective=text_to_text needs, and no other reads."""
    data = config.data
    if data.objective != "text_to_text":
        unused(config, f"data.objective={data.objective}", "data.target_field", "data.target_length")
        return
    for path, source in (("data.source", data.source), ("data.validation_source", data.validation_source)):
        require(
            not source or source.partition(":")[0] in ("files", "tfds"),
            f"{path}={source} has no pairs of texts for data.objective=text_to_text; use files: or tfds: with records "
            "of two fields",
        )
    require(
        data.target_field not in ("", data.text_field),
        f"data.target_field={data.target_field} must name the field of the target, and data.text_field is "
        f"{data.text_field}, that of the input; change one of them",
    )
    require(
        data.packing == "pad",
        f"data.packing={data.packing} is for rows of several documents, and data.objective=text_to_text has a pair a "
        "row; set data.packing=pad",
    )
    require(
        data.target_length == 0 or data.target_length >= 2,
        f"data.target_length={data.target_length} must be 2 or more (a token and EOS), or 0 for data.seq_length",
    )


def validate_optimizer(config: config_lib.Config) -> None:
    optimizer, num_steps = config.optimizer, config.training.num_steps
    at_least(config, 0, "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.clip_norm")
    one_of("optimizer.name", optimizer.name, ("adamw", "adafactor"))
    of_adafactor = [f"optimizer.adafactor.{field.name}" for field in dataclasses.fields(optimizer.adafactor)]
    of_adamw = ["optimizer.beta1", "optimizer.beta2", "optimizer.eps"]
    others = of_adafactor if optimizer.name == "adamw" else of_adamw
    unused(config, f"optimizer.name={optimizer.name}", *others)
    at_least(config, 0, "optimizer.adafactor.clip_rms")
    at_least(config, 1, "optimizer.adafactor.min_factored_dim")
    positive(config, *(f"optimizer.adafactor.{name}" for name in ("decay_rate", "eps", "min_scale")))
    for path in ("optimizer.beta1", "optimizer.beta2"):
        require(0 <= get(config, path) < 1, f"{path}={get(config, path)} must lie in [0, 1); change it")
    positive(config, "optimizer.eps")
    one_of("optimizer.decay", optimizer.decay, ("matrices", "all"))
    one_of("optimizer.schedule", optimizer.schedule, ("cosine", "constant", "inverse_sqrt"))
    is_inverse_sqrt, name = optimizer.schedule == "inverse_sqrt", f"optimizer.schedule={optimizer.schedule}"
    at_least(config, 1 if is_inverse_sqrt else 0, "optimizer.warmup_steps")
    at_least(config, 0, "optimizer.final_steps")
    for path in ("optimizer.final_fraction", "optimizer.linear_decay"):
        require(0 <= get(config, path) <= 1, f"{path}={get(config, path)} must lie in [0, 1]; change it")
    of_cosine = ["optimizer.final_fraction", "optimizer.final_steps"]
    unused(config, name, *(["optimizer.linear_decay"] if optimizer.schedule == "cosine" else of_cosine))
    require(
        not optimizer.final_steps or optimizer.warmup_steps + optimizer.final_steps < num_steps,
        f"optimizer.final_steps={optimizer.final_steps} and optimizer.warmup_steps={optimizer.warmup_steps} leave no "
        f"step of training.num_steps={num_steps} to the cosine; lower one of them",
    )


def validate_training(config: config_lib.Config) -> None:
    training = config.training
    at_least(config, 1, "training.num_steps", "training.num_microbatches", "training.eval_every", "training.log_every")
    at_least(config, 0, "training.eval_batches", "checkpoint.keep_every")
    at_least(config, 1, "checkpoint.every", "checkpoint.keep_last")
    at_least(config, 0, "training.z_weight")
    if config.model.num_softmaxes > 1:  # its logits are log-probabilities, whose normaliser is 1
        unused(config, f"model.num_softmaxes={config.model.num_softmaxes}", "training.z_weight")
    require(0 < training.ema_alpha <= 1, f"training.ema_alpha={training.ema_alpha} must lie in (0, 1]; change it")
    require(
        config.data.batch_size % training.num_microbatches == 0,
        f"training.num_microbatches={training.num_microbatches} does not divide "
        f"data.batch_size={config.data.batch_size}; change one of them",
    )


def validate_mesh(config: config_lib.Config) -> None:
    sizes = dataclasses.asdict(config.mesh)
    del sizes["split_physical_axes"]
    for name, size in sizes.items():
        require(size >= 1 or size == -1, f"mesh.{name}={size} must be 1 or more, or -1 for the rest; change it")
    rest = [name for name, size in sizes.items() if size == -1]
    require(
        len(rest) <= 1, f"mesh has -1 for {' and '.join(rest)}; one axis can be the rest: set the others to numbers"
    )
