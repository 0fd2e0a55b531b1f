# pyright: reportMissingImports=false
"""Tells the class of an image: python run.py IMAGE.npy, an array (height, width[, colours]) of pixels prepared as in training (mean 0,
deviation 1 over the training images). Needs ai-edge-litert and numpy."""

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

here = Path(__file__).parent
model = Interpreter(str(here / "model.tflite"))
image = np.load(sys.argv[1], allow_pickle=False).astype(np.float32).reshape(model.get_input_details()[0]["shape"])
(output,) = model.get_signature_runner("serving_default")(images=image).values()
names = (here / "labels.txt").read_text(encoding="utf-8").splitlines() if (here / "labels.txt").exists() else None
print(names[output[0].argmax()] if names else int(output[0].argmax()))
