"""Loss, optimizer, state, checkpoints, metrics, evaluation, and the loop that ties them."""
