"""What a run will need: parameters, memory, communication, seconds, and the layout to choose.

Arithmetic on two config.json files, a layout and a cluster; no weights, no GPU, no Megatron.
docs/planning.md has the formulas and what they were checked against.
"""
