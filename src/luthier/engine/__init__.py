"""The engine: what trains. Tensors, and nothing about recipes, stores or part names.

`batch` lays rows end to end, `trie` finds what they share, `documents` says which attend together,
`attention` keeps them apart (`flash`: in C++, cut into `units`; `varlen`: on a GPU), `head` turns hidden
states into log-probabilities, `base` loads a model and proves all this on it, `kernels` are a layer's
formulas (`native`: in C++) and `fused` the layers made of them, `placement` says who computes what, `loop`
descends, `launch` starts several processes, `checkpoint` survives and `saver` writes it aside, `memory` says
what there is. Read them in that order. What answers is `luthier.inference`.
"""

import warnings

# Two libraries speak to their own developers here; a user can do nothing about either.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
warnings.filterwarnings(
    "ignore", message="Could not find a config file in luthier-base:", category=UserWarning
)
