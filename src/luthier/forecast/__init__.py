"""The forecast: what a training will take before it is taken. Bytes, operations and seconds, in closed forms.

`layout` turns rows into numbers, `footprint` makes bytes of them and `flops` operations, `pace` says for how
long, `host` what this machine can do, and `fit` chooses the way of training that fits. Read them in that
order.

Source: what `luthier.engine` computes and keeps, tensor by tensor; the engine knows nothing of this room.
It does not know recipes, prices, part names, or what else will run on the machine.
"""
