"""What TensorFlow Datasets itself prepares and reads back is what we read, document for document."""

import sys

import numpy as np
import pytest

from moejax.data import sources

tfds = pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.parity

TEXTS = [f"document {i} é \u2028\r\n x" * (1 + i % 7) for i in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set that TensorFlow Datasets has prepared as ArrayRecord, with the fields of C4."""
    features = {"text": tfds.features.Text(), "url": tfds.features.Text()}
    features["content-length"] = tfds.features.Scalar(np.int64)

    class MoejaxParity(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.1.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="en"),)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(TEXTS), "validation": self._generate_examples(TEXTS[:7])}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text, "url": f"https://{i}", "content-length": len(text)}

    path = tmp_path_factory.mktemp("tfds")
    builder = MoejaxParity(data_dir=str(path), config="en", file_format="array_record")
    builder.download_and_prepare()
    return path


@pytest.mark.parametrize(("split", "count"), [("train", 50), ("validation", 7)])
def test_we_read_what_tfds_wrote_in_the_order_in_which_tfds_reads_it(folder, split, count):
    theirs = tfds.builder_from_directory(str(folder / "moejax_parity" / "en" / "3.1.0")).as_data_source(split=split)
    ours = sources.open_source("tfds:moejax_parity/en:3.1.0", split=split, tfds_dir=str(folder))
    assert list(ours) == [theirs[i]["text"].decode() for i in range(len(theirs))]
    assert sorted(ours) == sorted(TEXTS[:count])
    assert sources.splits("tfds:moejax_parity/en", tfds_dir=str(folder)) == ("train", "validation")
    assert "tensorflow" not in sys.modules
