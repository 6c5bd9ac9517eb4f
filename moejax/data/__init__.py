"""From documents to batches: corpora, tokenizers, packing, and the pipeline that feeds the trainer."""
