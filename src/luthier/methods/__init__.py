"""Methods: which weights move. One file is one method, with its paper and its own `Params`.

A part declares `Params` and `attach(model, params, seed) -> model` (what trains, from a seed of its own),
`save(model, folder, base_name)`, `load(model, folder)`, `report(model)` (what moves, counted) and
`STARTS_AS_BASE` (freshly attached it changes nothing; default: not so) and
`trainable(model, params)` (the same in closed form, on a model without weights). A method never sees a
loss. The format on disk is PEFT's.
"""
