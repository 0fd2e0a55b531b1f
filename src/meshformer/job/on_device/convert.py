# pyright: reportMissingImports=false
"""Runs in the environment of litert-torch, as a file: convert.py GRAPH.pt2 MODEL.tflite DATA.npz

Converts the exported graph, runs the result on the inputs in DATA.npz and prints the largest difference from the outputs in it, which are named
`in.NAME` and `out.NAME`.
"""

import sys

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter

graph, target, data = sys.argv[1:]
program = torch.export.load(graph)
assert program.example_inputs is not None
model = litert_torch.signature("serving_default", program.module(), (), program.example_inputs[1]).convert()
model.export(target)
stored = dict(np.load(data, allow_pickle=False))
inputs, wanted = ({name.partition(".")[2]: x for name, x in stored.items() if name.startswith(kind)} for kind in ("in.", "out."))
found = Interpreter(target).get_signature_runner("serving_default")(**inputs)
assert found.keys() == wanted.keys(), (sorted(found), sorted(wanted))
print("largest difference", max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted))
