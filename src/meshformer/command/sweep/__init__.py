"""`meshformer train -m`: grids and searches. Points, a record of the sweep, launchers, tables."""
