"""The families import large packages, which the suite need not have: pytest does not look for doctests here."""

collect_ignore_glob = ["*.py"]
