"""Inference: what answers, over the engine's products; nothing about recipes, stores or part names.

`generate` answers as plain transformers and peft would, bit for bit; `sampling` chooses tokens, `grammar`
says which may come; `score` judges and `rollout` draws answers to learn from. What is served grows in
`decoder`: `growing` are its sequences, `schedule` says whose tokens are next, `pages` is the cache,
`adapters` are read and checked. It steps through `stack`, all layers in one call, or `answering`, layer by
layer over `decode`, once `proof` has held them against transformers. Read them in that order.
"""

from luthier import engine  # noqa: F401  what it tells other libraries' warnings holds here too
