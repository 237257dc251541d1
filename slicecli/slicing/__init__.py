"""Slicing proper: second moments, the basis, the refit, and the passes over the blocks.

`equations`, `basis`, `ridge` and `maps` are pure functions on tensors; `folding` knows which tensors go through which
map. `blocks` runs the model's own modules. `step` fits what reads and writes the stream at one place, `pipeline` goes
over the whole model with the `state` of a pass; `published` does so by the published method. What both do is in `walk`.
None of them reads or writes files.
"""
