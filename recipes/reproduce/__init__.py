"""All runs of a table, one after another or as jobs of a cluster: ``python -m recipes.reproduce --help``."""
