# pyright: reportMissingImports=false
"""Continues a text, taking the likeliest token each time: python run.py TEXT [TOKENS]. Needs ai-edge-litert, numpy and tokenizers."""

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tokenizers import Tokenizer

here = Path(__file__).parent
tokenizer, model = Tokenizer.from_file(str(here / "tokenizer.json")), Interpreter(str(here / "model.tflite"))
length, run = model.get_input_details()[0]["shape"][1], model.get_signature_runner("serving_default")
window = tokens = tokenizer.encode(sys.argv[1], add_special_tokens=False).ids or sys.exit("the text is empty")
window = window[-length:]
for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 64):
    if len(window) > length:  # as meshformer's generate: go on from the second half of a full context
        window = window[-(length // 2 or 1) :]
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(window)] = window  # what stands behind the last token does not change what comes after it
    token = int(run(tokens=padded)["logits"][0, len(window) - 1].argmax())
    tokens, window = [*tokens, token], [*window, token]
print(tokenizer.decode(tokens, skip_special_tokens=False))
