"""Every private name of another library that this project uses, one file per library: the version, the reason, and a test.

Nothing outside this package uses a private name of another library; tests/test_compat.py checks it.
"""
