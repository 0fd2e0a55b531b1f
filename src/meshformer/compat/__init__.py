"""Every private name of another library that this project uses, one file a library: the version, the reason, and a test (tests/test_compat.py).

Nothing outside this room reaches for a name with a leading underscore of another library; tests/test_compat.py counts.
"""
