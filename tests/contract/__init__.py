"""What illava promises, on every family of the zoo; `test_traps.py` says which tests guard which trap."""
