"""Where the time of recorded steps went: read traces, split steps into parts, say what to change, draw. Standard library and numpy only.

The recorder is callbacks/profile.py; `meshformer profile` prints what is written here.
"""
