"""Weights from outside: models of other programs and other people, by tensor name.

    parts.py                            what a description of a foreign layout is made of
    gpt2.py  llama.py  bert.py  vit.py  one layout each: its settings in our words, where each of our tensors lies, and the way back
    source.py                           what a path holds, and the model's settings, without reading the weights
    pinned.py                         the two pretrained models that travel inside Python packages
    load.py  write.py                   the tensors, in and out

All but the last two import no torch: what is wrong with a source is found before a process starts.
"""
