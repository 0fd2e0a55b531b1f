"""`meshformer train -m`: grids and searches, with their points, launchers, sweep record and result tables."""
