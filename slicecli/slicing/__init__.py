"""Slicing proper: second moments, the basis, the refit, and the pass over the blocks.

`moments`, `basis` and `ridge` are pure functions on tensors. `blocks` runs the model's own modules. `pipeline`
ties them together and knows nothing of files: weights come in through a reader and go out through a sink.
"""
