"""How fast rows come beside how fast training eats them, in one run on this machine.

    python scripts/bench_data.py                       # needs 12 GB of memory
    python scripts/bench_data.py --skip_large_model    # 3 GB

Writes a 100 MB TFRecord shard of documents in C4's format (Wikipedia lead sections, four to a document), then measures:
building the shard's index, tokenising it on the fly with GPT-2's BPE, reading it prepared as documents and as rows, and
training steps of configs/quickstart.py and of MoE-Mamba 25M (arXiv 2401.04081, Table 5: 542M parameters, 26M active).
Readers take turns, and each figure is the median of its turns.
"""

import argparse
import copy
import itertools
import os
import pathlib
import statistics
import tempfile
import time

import bench_train
from tensorboardX import record_writer

from moejax import cli
from moejax import config as config_lib
from moejax.data import corpora, pipeline, preparation

SHARD_BYTES = 100_000_000
QUICKSTART = pathlib.Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of reading, a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--skip_large_model", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_data(pathlib.Path(folder), arguments.seconds, arguments.turns)
    quickstart = bench_train.measure(cli.read_config(str(QUICKSTART), []), 30)
    report("training configs/quickstart.py", quickstart.tokens_per_second)
    if not arguments.skip_large_model:
        large = bench_train.measure(bench_train.moe_mamba_25m(num_experts=42), 3)
        report("training MoE-Mamba 25M, batch of 1", large.tokens_per_second)


def measure_data(folder: pathlib.Path, seconds: float, turns: int) -> None:
    """Index, preparation and readers."""
    config = config_lib.Config().data
    config.source = f"files:{write_shard(folder / 'train.tfrecord-00000-of-00001')}"
    config.validation_source = f"files:{write_shard(folder / 'validation.tfrecord-00000-of-00001', 10**6)}"
    config.tokenizer, config.packing, config.seq_length, config.batch_size = "gpt2", "sample", 1024, 16

    index_times = []
    for turn in range(turns):
        os.environ["MOEJAX_CACHE"] = str(folder / f"cache_{turn}")  # where the index would be found again
        start = time.perf_counter()
        pipeline.open_texts(config)
        index_times.append(time.perf_counter() - start)
    report("index of a 100 MB TFRecord shard", statistics.median(index_times), "seconds")

    rows = copy.copy(config)
    rows.packing = "concatenate"
    for form, how in (("documents", config), ("rows", rows)):
        start = time.perf_counter()
        made = preparation.prepare(how, folder / form, form=form).manifest
        assert made is not None
        tokens = sum(shard["tokens"] for shard in made["splits"]["train"])
        report(f"preparing {form}", tokens / (time.perf_counter() - start))
    readers = {
        "GPT-2 BPE on the fly, packing=sample": pipeline.load(config),
        "prepared documents, packing=sample": pipeline.load(at(config, folder / "documents")),
        "prepared documents, packing=concatenate": pipeline.load(at(rows, folder / "documents")),
        "prepared rows": pipeline.load(at(rows, folder / "rows")),
    }
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(turns):
        for name, data in readers.items():
            speeds[name].append(read(data, config, seconds))
    for name, found in speeds.items():
        report(name, statistics.median(found))


def at(config: config_lib.DataConfig, folder: pathlib.Path) -> config_lib.DataConfig:
    """The same rows out of a prepared folder."""
    changed = copy.copy(config)
    changed.source, changed.validation_source = f"prepared:{folder}", ""
    return changed


def read(data: pipeline.Data, config: config_lib.DataConfig, seconds: float) -> float:
    """Tokens a second of the training batches, as the trainer reads them."""
    batches = pipeline.train_batches(data, config)
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += next(batches)["inputs_BL"].size
    elapsed = time.perf_counter() - start
    batches.close()
    return count / elapsed


# --- a shard in C4's format ------------------------------------------------------------------------------------------


def write_shard(path: pathlib.Path, num_bytes: int = SHARD_BYTES) -> pathlib.Path:
    """Writes a TFRecord file of tf.train.Example records with a field `text`."""
    texts = corpora.load("wikipedia").documents
    writer = record_writer.RecordWriter(str(path))
    for first in itertools.count(step=3):
        text = "\n".join(texts[(first + place) % len(texts)] for place in range(4))
        writer.write(example(text.encode()))
        if first % 999 == 0:
            writer.flush()
            if path.stat().st_size >= num_bytes:
                break
    writer.close()
    return path


def example(text: bytes) -> bytes:
    """A tf.train.Example in protobuf's wire format: features (1) of entries (1) of key (1) and value (2)."""
    feature = field(1, field(1, text))
    return field(1, field(1, field(1, b"text") + field(2, feature)))


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    size, length = [], len(data)
    while length >= 128:
        size.append(length % 128 + 128)
        length //= 128
    return bytes([number << 3 | 2, *size, length]) + data


def report(name: str, value: float, unit: str = "tokens/s") -> None:
    """One line of the table."""
    print(f"{name:45} {value:>14,.0f} {unit}" if unit == "tokens/s" else f"{name:45} {value:>14.3f} {unit}", flush=True)


if __name__ == "__main__":
    main()
