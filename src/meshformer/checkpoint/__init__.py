"""Save, find, verify and read checkpoints by tensor name, in one format for every layout.

    check.py            whether the weights a run is to start from exist and fit its model, from the settings alone
    find.py             which checkpoints a run has, and whether their files are whole
    write.py  read.py   a checkpoint folder: written by any number of ranks, read by any other number
    pieces.py           which rectangle of a tensor this process holds
    weights.py          weights into a model, by name; adapters
    optimizer.py        optimizer state, by parameter name
    lightning_io.py     Lightning's checkpoint dictionary to a folder and back, in the foreground or in the background
    single_file.py      a checkpoint or its weights in one file

check.py and find.py import no torch.
"""
