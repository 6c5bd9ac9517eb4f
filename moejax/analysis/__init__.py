"""What a model costs and what a run did: parameter counts, baselines, the report."""
