"""The paper's comparisons, each run by one command: compare_methods.py (Table 1), two_moons.py (the first figure)."""
