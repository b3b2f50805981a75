"""The engine: tensors, and nothing about recipes, stores or part names.

`batch` lays rows end to end, `attention` keeps documents apart, `head` turns hidden states into
log-probabilities, `base` loads a model and proves all this on it, `loop` descends, `checkpoint` survives,
`memory` and `host` say what fits, `generate` answers. Read them in that order.
"""
