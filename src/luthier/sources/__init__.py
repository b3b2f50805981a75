"""Sources: where rows and models come from. One file, one way to get labelled files onto this machine.

A source declares `Params`, `fetch(params, root, cache, tell) -> {label: path}` and
`fingerprint(params, root) -> {label: content}`, which is cheap and changes whenever the content would.
Labels: `train`, `validation`, `test` or `all` for rows; `model` for a base model.
`tell(message, done, total)` shows progress; it may raise to stop a download.
This package does not know what is inside a file; `_records` reads rows out of one.
"""
